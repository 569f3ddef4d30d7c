"""A control at work on one denoiser: what it selects there, whether it acted, and the evidence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from attn_control.caches import StepCaches
from attn_control.call import Site, Step
from attn_control.errors import AttnControlError
from attn_control.ledger import Ledger, label
from attn_control.policy import DENSE
from attn_control.processors.control import Control
from attn_control.report import Stopwatch
from attn_control.select import Window
from attn_control.steps import Run


class Entry:
    """One control on one denoiser.

    Attributes:
        number: its place among the controls in force on that denoiser.
        heads: selected heads by site.
        moved: its guidance has been seen to change a prediction.
        runs: ids of the runs that it saw begin; last: (index, total) of the last step it saw.
        ledger: what its calls came to, if it is sparse; spared: sites that its policy keeps dense.
    """

    def __init__(
        self,
        control: Control,
        heads: dict[Site, tuple[int, ...]],
        spared: Iterable[Site] = (),
    ) -> None:
        self.control, self.heads, self.spared = control, heads, tuple(spared)
        self.ledger = Ledger() if control.sparse else None
        self.number = -1
        self.moved = False
        self._unproven = set(heads)  # sites not yet seen to act
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
            due = check_window(self.control, self.control.when, run.values, run.sigmas, run.first)
            self.control.refuse_run(due, run.levels)
        self.runs.append(step.run_id)

    def due_at(self, step: Step) -> bool:
        """Whether it has anything to do at a step; a sparse control notes what stays dense."""
        due = self.control.when.holds(step, str(self.control))
        due = due and not self.control.stays_dense(step)
        if self.ledger is not None:
            self.ledger.dense(step, self.spared if due else (*self.heads, *self.spared))
            if due:
                self.ledger.dense(step, self.ledger.spared)
        return due

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

    def doubt(self) -> None:
        """Processors changed: every site has to be seen to act again."""
        self._unproven = set(self.heads)

    def saw(
        self, step: Step, sites: list[Site], counts: Tensor, ran: list[bool], caches: StepCaches
    ) -> None:
        """Keep a forward's counts.

        The first time that a site's attention runs it must have acted. Where a step cache answers
        in its place it cannot, and the step is marked.

        Args:
            sites: that had a plan of its kind, once for each module; counts: int64 (sites,), how
                often it acted there; ran: whether those modules were called at all.
        """
        if self._unproven:
            due = self.control.sites_at(step, self.heads) & self._unproven
            due -= self.ledger.spared if self.ledger is not None else set()
            self._prove(step, due, zip(sites, counts.tolist(), ran, strict=True), caches)
        self._history.append((step, sites, counts))

    def _prove(
        self,
        step: Step,
        due: set[Site],
        found: Iterable[tuple[Site, int, bool]],
        caches: StepCaches,
    ) -> None:
        acted: dict[Site, int] = {}
        called: dict[Site, bool] = {}
        for site, count, entered in found:
            acted[site] = acted.get(site, 0) + count
            called[site] = called.get(site, False) or entered
        for site in [site for site in acted if site in due and not acted[site]]:
            if called[site]:
                processor = type(site.module.processor)
                why = (
                    f"{processor.__module__}.{processor.__name__} ran no attention that can be"
                    " seen; expected a call of dispatch_attention_fn or"
                    " F.scaled_dot_product_attention from its own module"
                )
            elif not caches.hooks():
                why = "the model never called it"
            else:
                continue
            raise AttnControlError(
                f"{self.control}: did not act at {site.label} ({site.name}) at its first due step"
                f" {step.index}: {why}"
            )
        self._unproven -= {site for site, count in acted.items() if count}

    @property
    def acted(self) -> bool:
        """Whether it acted anywhere in the last forward that it was part of."""
        return bool(self._history and self._history[-1][2].any())

    @property
    def fired(self) -> bool:
        """Whether it acted anywhere, ever."""
        if self.ledger is not None:
            return any(row.outcome != DENSE for row in self.ledger.rows)
        return any(bool(counts.any()) for _, _, counts in self._history)

    @property
    def due(self) -> bool:
        """Whether a forward had it in its plans, acting or not."""
        return bool(self._history)

    def evidence(self) -> Evidence:
        """What it did, by site and by step."""
        if self.ledger is not None:
            return self._booked(self.ledger)
        calls = dict.fromkeys(self.heads, 0)
        steps: dict[int, list[int]] = {}
        skipped: dict[int, list[int]] = {}
        for step, sites, counts in self._history:
            numbers = counts.tolist()
            here = dict.fromkeys(self.control.sites_at(step, self.heads), 0)
            for site, count in zip(sites, numbers, strict=True):
                if site in here:
                    here[site] += count
            for site, count in here.items():
                calls[site] += count
            if step.index is None:
                continue
            if any(here.values()):
                _note(steps, step)
            if not all(here.values()):
                _note(skipped, step)
        return Evidence(calls, steps, skipped)

    def _booked(self, ledger: Ledger) -> Evidence:
        """As the ledger has it: its plans also run where a call then stays dense."""
        sites = {label(site): site for site in self.heads}
        calls, steps = dict.fromkeys(self.heads, 0), {}
        for row in ledger.rows:
            if row.outcome == DENSE:
                continue
            calls[sites[row.layer]] += 1
            seen = steps.setdefault(row.run, [])
            if row.index is not None and row.index not in seen:
                seen.append(row.index)
        return Evidence(calls, steps, {})


@dataclass(frozen=True)
class Evidence:
    """calls by site; by run id, the steps at which a control acted, and those at which a step cache
    answered in place of at least one of its sites.
    """

    calls: dict[Site, int]
    steps: dict[int, list[int]]
    skipped: dict[int, list[int]]


def _note(steps: dict[int, list[int]], step: Step) -> None:
    seen = steps.setdefault(step.run_id, [])
    if step.index is not None and step.index not in seen:
        seen.append(step.index)


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
