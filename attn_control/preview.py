"""What a run of so many steps would do, before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from attn_control.entry import check_window
from attn_control.errors import AttnControlError
from attn_control.families import Family
from attn_control.foresight import Expected, expected
from attn_control.masks.line import Line
from attn_control.masks.place import Place
from attn_control.policy import DENSE
from attn_control.processors.control import Control
from attn_control.processors.sparse import SparseControl
from attn_control.steps import levels_of, noise_levels


class Due(NamedTuple):
    """When a control would act, and what it costs.

    extra: an extra forward at each of its steps; again: cond rows run twice at each of them;
        rides: its perturbed rows are part of the pipeline's own forward.
    """

    control: str
    idle: str | None
    steps: list[int]
    extra: bool
    again: bool
    rides: bool = False


@dataclass(frozen=True)
class Preview:
    """Steps of a run to come, control by control.

    ``exact`` is False where a sigma window counts as the whole run, because the noise levels depend
    on the picture's size. ``sparse``: density by step and over the run, of each sparse control.
    """

    steps: int
    rows: list[Due]
    exact: bool = True
    sparse: tuple[Expected, ...] = ()

    @property
    def extra_forwards(self) -> int:
        """Extra denoiser forwards of the whole run."""
        return sum(len(row.steps) for row in self.rows if row.extra)

    def row_forwards(self, rows: int) -> int:
        """Single rows through the denoiser over the run, for a picture.

        rows: of the pipeline's own calls at one step: 2 under classifier-free guidance, else 1.
        Extra forwards take the conditional row alone.
        """
        total = 0
        for step in range(self.steps):
            again = any(row.again and step in row.steps for row in self.rows)
            rides = sum(row.rides and step in row.steps for row in self.rows)
            extra = sum(row.extra and step in row.steps for row in self.rows)
            total += rows + again + rides + extra * (1 + again)
        return total

    def __str__(self) -> str:
        lines = [
            f"{name}: "
            + (
                f"idle, {idle}"
                if idle
                else f"{len(due)} of {self.steps} steps" + (", one extra forward each" * extra)
            )
            for name, idle, due, extra, *_ in self.rows
        ]
        bound = "" if self.exact else "at most "
        lines.append(f"extra forwards: {bound}{self.extra_forwards} beside {self.steps} steps")
        return "\n".join([*lines, *(line for each in self.sparse for line in each.lines())])


def _schedule(scheduler: Any, family: Family, steps: int) -> tuple[list[float], list[float] | None]:
    """Timesteps and sigmas of a run to come; positions alone if the scheduler cannot tell yet."""
    if scheduler is not None:
        trial = copy.deepcopy(scheduler)
        try:
            if family.sigmas is None:
                trial.set_timesteps(steps)
            else:
                trial.set_timesteps(sigmas=list(family.sigmas(steps)))
        except Exception:  # with dynamic shift it needs the picture's size, not known beforehand
            pass
        else:
            values = [float(t) for t in trial.timesteps.flatten()]
            return values, noise_levels(trial, values)
    return [float(n) for n in range(steps)], None


def foresee(
    controls: Sequence[Control],
    scheduler: Any,
    family: Family,
    steps: int,
    *,
    place: Place | Line | None = None,
    sites: Sequence[tuple[int, int]] = (),
) -> Preview:
    """When each control would act in a run of ``steps``, and what that would cost.

    place: the tokens, where they are known; sites: of each control, how many attention modules it
    selects, and how many of those its policy keeps dense.

    Raises:
        AttnControlError: steps is no number of steps, or a window holds none of them.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise AttnControlError(f"preview: steps must be a positive whole number, got {steps!r}")
    values, sigmas = _schedule(scheduler, family, steps)
    rows, sparse, levels = [], [], levels_of(values)
    for number, control in enumerate(controls):
        due = [] if control.idle else check_window(control, control.when, values, sigmas, 0)
        if isinstance(control, SparseControl):
            control.refuse_run(due, levels)
            counts = sites[number] if sites else (1, 0)
            sparse.append(expected(control, due, levels, place, *counts))
            acts = [n for n, outcome in enumerate(sparse[-1].outcomes) if outcome != DENSE]
            due = acts
        guides = control.guidance_scale is not None
        rides = guides and control.rides
        rows.append(
            Due(str(control), control.idle, due, guides and not rides, control.appends, rides)
        )
    guessed = sigmas is None and any(control.when.kind == "sigma" for control in controls)
    return Preview(len(values), rows, exact=not guessed, sparse=tuple(sparse))
