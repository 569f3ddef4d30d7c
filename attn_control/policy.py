"""StepPolicy: at which steps a sparse control leaves attention dense, and when it looks anew.

Counted in *levels*, the positions among a run's distinct timesteps: a solver that calls the model
twice at one timestep (Heun) has both calls treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, fields
from typing import Any

from attn_control.call import Step
from attn_control.errors import AttnControlError

DENSE, REFRESH, SPARSE, SHARED = "dense", "refresh", "sparse", "shared"
OUTCOMES = DENSE, REFRESH, SPARSE, SHARED
"""What a call can come to: stock attention; stock attention that is kept for later; the mask; the
last refresh's output once more."""


@dataclass(frozen=True)
class StepPolicy:
    """Where attention stays dense.

    Args:
        first: levels at the beginning, a count, or a share of all rounded down (at least one).
        last: levels at the end, in the same way.
        layers: selector of layers that stay dense, e.g. ``"L0"``; "" for none.
        refresh: levels from one refresh to the next. A refresh is dense; what it computes is kept
            for the correction and for masks that depend on queries and keys. None: once, at the
            first sparse level, where something has to be kept at all.
        drift: refresh too when pooled queries and keys have turned away by more than this from
            those of the last refresh: 1 - cosine, 0 to 2. Costs a comparison a call.
        min_tokens: calls of fewer keys stay dense.

    Raises:
        AttnControlError: a value out of range.

    >>> StepPolicy(first=0.25, refresh=5).outcomes(20, keeps=True)[5:11]
    ['refresh', 'sparse', 'sparse', 'sparse', 'sparse', 'refresh']
    """

    first: int | float = 0.25
    last: int | float = 0
    layers: str = ""
    refresh: int | None = 5
    drift: float | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            value = getattr(self, name)
            share = isinstance(value, float) and 0 <= value < 1
            if not share and (type(value) is not int or value < 0):
                self._refuse(name, "a number of levels or a share in [0, 1)")
        if not isinstance(self.layers, str):
            self._refuse("layers", "a selector such as 'L0' or 'L0-1', or ''")
        if self.refresh is not None and (type(self.refresh) is not int or self.refresh < 1):
            self._refuse("refresh", "a number of levels from 1, or None")
        number = isinstance(self.drift, (int, float)) and not isinstance(self.drift, bool)
        if self.drift is not None and not (number and 0 <= self.drift <= 2):
            self._refuse("drift", "a distance from 0 to 2, or None")
        if type(self.min_tokens) is not int or self.min_tokens < 0:
            self._refuse("min_tokens", "a number of tokens from 0")

    def _refuse(self, name: str, expected: str) -> None:
        raise AttnControlError(
            f"StepPolicy: {name} must be {expected}, got {name}={getattr(self, name)!r}"
        )

    @classmethod
    def of(cls, owner: str, given: Any) -> StepPolicy:
        """A policy as it is, or from a mapping of its options, as jobs and presets have it."""
        if isinstance(given, cls):
            return given
        known = [f.name for f in fields(cls)]
        if not isinstance(given, dict):
            raise AttnControlError(
                f"{owner}: policy must be a StepPolicy, or its options, got {given!r}"
            )
        for name in given:
            if name not in known:
                raise AttnControlError(
                    f"{owner}: unknown option {name!r} of policy; known: {', '.join(known)}"
                )
        return cls(**given)

    def __repr__(self) -> str:
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        return f"StepPolicy({', '.join(f'{n}={getattr(self, n)!r}' for n in given)})"

    @property
    def counts(self) -> bool:
        """Whether it has to know where the sampler is."""
        return bool(self.first or self.last or self.refresh is not None or self.drift is not None)

    def span(self, levels: int) -> tuple[int, int]:
        """Half-open range of the levels that are not dense; empty where first and last meet."""

        def count(value: int | float) -> int:
            if isinstance(value, int):
                return value
            return max(1, math.floor(value * levels + 1e-9)) if value else 0

        return min(count(self.first), levels), max(levels - count(self.last), 0)

    def covers(self, level: int, levels: int) -> bool:
        """Whether a level, of so many, may be other than dense."""
        start, stop = self.span(levels)
        return not self.counts or start <= level < stop

    def stays_dense(self, step: Step, who: str) -> bool:
        """Whether every site is dense at this step.

        Raises:
            AttnControlError: it counts levels, and the sampler is not known; no level is left.
        """
        if not self.counts:
            return False
        if step.level is None or step.levels is None:
            raise AttnControlError(
                f"{who}: its policy counts steps, but the sampler is not known here; attach to the"
                " whole pipeline, or use policy=StepPolicy(first=0, refresh=None) and"
                " correction='none'"
            )
        self.refuse_empty(step.levels, who)
        return not self.covers(step.level, step.levels)

    def refuse_empty(self, levels: int, who: str) -> None:
        """Raises AttnControlError for a run so short that all of it is dense."""
        start, stop = self.span(levels)
        if self.counts and start >= stop:
            raise AttnControlError(
                f"{who}: policy leaves no level of {levels} to be sparse: first={self.first!r}"
                f" and last={self.last!r} keep all of them dense"
            )

    def due(self, level: int | None, kept: int | None) -> bool:
        """Whether a call at a level is a refresh, the last having been at level ``kept``. Further
        calls at the level of a refresh are refreshes too.
        """
        if level is None or kept is None or level < kept:
            return True
        return level == kept or (self.refresh is not None and level - kept >= self.refresh)

    def outcomes(
        self,
        levels: int,
        keeps: bool,
        *,
        steps: Sequence[int] | None = None,
        due: Container[int] | None = None,
    ) -> list[str]:
        """What each step of a run comes to, as far as the schedule decides it.

        keeps: whether anything is kept from a refresh; without, and without a period, there is
            none. steps: the level of each step, None for one a level; due: the steps at which
            anything acts, None for all.
        """
        found: list[str] = []
        kept = None
        for step, level in enumerate(range(levels) if steps is None else steps):
            if (due is not None and step not in due) or not self.covers(level, levels):
                found.append(DENSE)
            elif (keeps or self.refresh is not None) and self.due(level, kept):
                found.append(REFRESH)
                kept = level
            else:
                found.append(SPARSE)
        return found
