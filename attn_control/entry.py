"""A control at work on one denoiser: what it selects there, whether it acted, and the evidence."""

from __future__ import annotations

from torch import Tensor

from attn_control.call import Site, Step
from attn_control.errors import AttnControlError
from attn_control.processors.control import Control
from attn_control.report import Stopwatch
from attn_control.select import Window
from attn_control.steps import Run


class Entry:
    """One control on one denoiser.

    Attributes:
        number: its place among the controls in force on that denoiser.
        heads: selected heads by site.
        proven: every selected site has been seen to act since the last change of processors.
        moved: its guidance has been seen to change a prediction.
        runs: ids of the runs that it saw begin; last: (index, total) of the last step it saw.
    """

    def __init__(self, control: Control, heads: dict[Site, tuple[int, ...]]) -> None:
        self.control, self.heads = control, heads
        self.number = -1
        self.proven = self.moved = False
        self.watch = Stopwatch()
        self.runs: list[int] = []
        self.last: tuple[int | None, int | None] | None = None
        self._history: list[tuple[Step, list[Site], Tensor]] = []
        self._negative: dict[int, int | None] = {}  # run -> None, or the step since which it lacks

    def begin(self, step: Step, run: Run | None) -> None:
        """Note a denoiser call; at the first of a run, refuse a window without any of its steps."""
        self.last = (step.index, step.total)
        if step.run_id in self.runs:
            return
        if run is not None:
            check_window(self.control, self.control.when, run.values, run.sigmas, run.first)
        self.runs.append(step.run_id)

    def expect_negative(self, step: Step, split: bool) -> None:
        """Refuse a run without a negative pass. In split guidance that comes after the conditional
        call, so that its lack shows at the next step.
        """
        since = self._negative.get(step.run_id, step.index)
        if "uncond" in step.branch or (since is None and step.index is not None):
            self._negative[step.run_id] = None
            return
        if not split or step.index is None or since != step.index:
            raise AttnControlError(
                f"{self.control}: fused into the negative pass, which this run does not have; turn"
                " classifier-free guidance on, or use fused=False"
            )
        self._negative[step.run_id] = since

    def saw(self, step: Step, sites: list[Site], counts: Tensor) -> None:
        """Keep a forward's counts, int64 (sites,). The first time, every site must have acted.

        A site stands there once for each module of its own that has a plan, of whichever control.
        """
        if not self.proven:
            due = self.control.sites_at(step, self.heads)
            acted: dict[Site, int] = {}
            for site, count in zip(sites, counts.tolist(), strict=True):
                acted[site] = acted.get(site, 0) + count
            for site, count in acted.items():
                if site in due and not count:
                    processor = type(site.module.processor)
                    raise AttnControlError(
                        f"{self.control}: did not act at {site.label} ({site.name}) at its first"
                        f" due step {step.index}:"
                        f" {processor.__module__}.{processor.__name__} ran no attention that can"
                        " be seen; expected a call"
                        " of dispatch_attention_fn or F.scaled_dot_product_attention from its own"
                        " module"
                    )
            self.proven = True
        self._history.append((step, sites, counts))

    @property
    def fired(self) -> bool:
        return bool(self._history)

    def evidence(self) -> tuple[dict[Site, int], dict[int, list[int]]]:
        """Calls by site, and the steps of each run (by run id) at which it acted."""
        calls = dict.fromkeys(self.heads, 0)
        steps: dict[int, list[int]] = {}
        for step, sites, counts in self._history:
            numbers = counts.tolist()
            for site, count in zip(sites, numbers, strict=True):
                if site in calls:
                    calls[site] += count
            if step.index is not None and any(numbers):
                seen = steps.setdefault(step.run_id, [])
                if step.index not in seen:
                    seen.append(step.index)
        return calls, steps


def check_window(
    control: Control, window: Window, values: list[float], sigmas: list[float] | None, first: int
) -> list[int]:
    """The steps of a run that lie in the window.

    Args:
        values: the run's timesteps; sigmas: their noise levels, if known; first: position at which
            the run begins.

    Raises:
        AttnControlError: there are none.
    """
    if window.kind == "sigma":
        if sigmas is None:
            return list(range(first, len(values)))  # holds() will refuse it with the reason
        due = [n for n in range(first, len(values)) if window.contains(sigmas[n])]
        span = f"sigma {sigmas[first]:.4g} to {sigmas[len(values) - 1]:.4g}"
    else:
        due = [n for n in range(first, len(values)) if window.contains(n / len(values))]
        span = f"progress {first / len(values):.3g} to {(len(values) - 1) / len(values):.3g}"
    if not due:
        raise AttnControlError(
            f"{control}: window {window.text!r} holds no step of this run of {len(values)} steps"
            f" ({span})"
        )
    return due
