"""Plan: what one softmax call executes, compiled from all controls that select its site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_control.call import Call, Site, Step

Epilogue = Callable[[Tensor, Call], Tensor]
"""From an output (batch, heads, q_tokens, head_dim) and its Call to a new output."""


@dataclass(frozen=True)
class Part:
    """One control's share of a plan: a change of the attention output, confined to its own rows,
    heads and tokens.

    ``control`` is the control's number within the attachment; ``density`` the share of query-key
    pairs that the part reads. Parts without a kernel of their own may overlap: they run in the
    order in which they were listed.
    """

    control: int
    epilogue: Epilogue
    density: float = 1.0


@dataclass(frozen=True, eq=False)
class Plan:
    """Frozen, and never empty: where nothing is to be done there is no plan, and the original call
    runs untouched.

    Attributes:
        parts: in the order of the user's controls.
        touch: int64 (controls,), added to the site's ``fired`` counter inside the graph at each
            execution.
    """

    parts: tuple[Part, ...]
    touch: Tensor

    def prepare(self, step: Step) -> None:
        """Before each forward, outside the graph: what changes with the step, changed in place."""
        for part in self.parts:
            prepare = getattr(part.epilogue, "prepare", None)
            if prepare is not None:
                prepare(step)

    def at(self, index: int) -> Plan | None:
        """The plan of the index-th softmax of a processor call: this one, whichever it is."""
        return self

    def run(self, call: Call, fired: Tensor | None) -> Tensor:
        """Execute and count in ``fired``; returns (batch, heads, q_tokens, head_dim)."""
        out = call.original()
        for part in self.parts:
            out = part.epilogue(out, call)
        if fired is not None:
            fired.add_(self.touch)
        return out


@dataclass(frozen=True, eq=False)
class PlanSeries:
    """The plans of a processor call that makes several softmaxes, in their order; None where one
    runs untouched.
    """

    plans: tuple[Plan | None, ...]

    def prepare(self, step: Step) -> None:
        """As `Plan.prepare`, for each."""
        for plan in self.plans:
            if plan is not None:
                plan.prepare(step)

    def at(self, index: int) -> Plan | None:
        """The plan of the index-th softmax."""
        return self.plans[index]


class PlanBuilder:
    """Collects the parts that controls contribute to one site in one phase."""

    def __init__(
        self, controls: int, site: Site, device: torch.device, rows: int | None = None
    ) -> None:
        self.site, self.device, self.rows = site, device, rows
        self._controls = controls
        self._parts: list[Part] = []

    def add(self, part: Part) -> None:
        self._parts.append(part)

    def build(self) -> Plan | None:
        """The plan, or None if no control contributed."""
        if not self._parts:
            return None
        touch = torch.zeros(self._controls, dtype=torch.int64, device=self.device)
        for part in self._parts:
            touch[part.control] += 1
        return Plan(tuple(self._parts), touch)
