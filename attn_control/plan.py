"""Plan: what one softmax call executes, compiled from all controls that select its site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from attn_control.call import Call, Site, Step
from attn_control.ledger import Ledger
from attn_control.state import Memory

Epilogue = Callable[[Tensor, Call], Tensor]
"""From an output (batch, heads, q_tokens, head_dim) and its Call to a new output."""


class Attention(Protocol):
    """What stands in for the softmax of some heads.

    heads: ascending; no other attention of the plan has any of them.
    """

    @property
    def heads(self) -> tuple[int, ...]: ...

    def prepare(self, step: Step) -> None:
        """Before each forward: where the sampler is, and the branch of every row."""

    def run(self, call: Call, whole: Callable[[], Tensor]) -> Tensor | None:
        """The heads' output (batch, heads, q_tokens, head_dim); None: what the stock call returns.

        whole: the stock call of all heads; it runs at most once, however many ask.
        """


@dataclass(frozen=True)
class Part:
    """One control's share of a plan: a change of the attention output, confined to its own rows,
    heads and tokens; or an attention of its own, in place of the stock one.

    ``control`` is the control's number within the attachment. Changes may overlap: they run in the
    order in which they were listed, after all attentions.
    """

    control: int
    epilogue: Epilogue | None = None
    attention: Attention | None = None


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
            prepare = getattr(part.epilogue or part.attention, "prepare", None)
            if prepare is not None:
                prepare(step)

    def at(self, index: int) -> Plan | None:
        """The plan of the index-th softmax of a processor call: this one, whichever it is."""
        return self

    def run(self, call: Call, fired: Tensor | None) -> Tensor:
        """Execute and count in ``fired``; returns (batch, heads, q_tokens, head_dim)."""
        out = self._attend(call)
        for part in self.parts:
            if part.epilogue is not None:
                out = part.epilogue(out, call)
        if fired is not None:
            fired.add_(self.touch)
        return out

    def _attend(self, call: Call) -> Tensor:
        """The stock call, but for heads that have an attention of their own."""
        attentions = [part.attention for part in self.parts if part.attention is not None]
        if not attentions:
            return call.original()
        stock: list[Tensor] = []

        def whole() -> Tensor:
            if not stock:
                stock.append(call.original())
            return stock[0]

        made = [(each.heads, each.run(call, whole)) for each in attentions]
        found = [(heads, out) for heads, out in made if out is not None]
        own = {head for heads, _ in found for head in heads}
        others = tuple(head for head in range(call.q.shape[1]) if head not in own)
        if not found:
            return whole()
        if len(found) == 1 and not others:
            return found[0][1]
        if stock:
            out = whole().clone()
        else:
            out = torch.empty_like(call.q)
            if others:
                out = _put(out, others, call.original(others))
        for heads, part in found:
            out = _put(out, heads, part)
        return out


def _put(out: Tensor, heads: tuple[int, ...], part: Tensor) -> Tensor:
    index = torch.tensor(heads, device=out.device)
    return out.index_copy(1, index, part.to(out.dtype))


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


@dataclass(frozen=True)
class Records:
    """What outlives plans: the denoiser's memory, and the ledger of each control by number."""

    memory: Memory = field(default_factory=Memory)
    ledgers: dict[int, Ledger] = field(default_factory=dict)


class PlanBuilder:
    """Collects the parts that controls contribute to one site in one phase.

    part: number of the softmax among those of one processor call; span: the batch rows that it
        holds, None for all.
    """

    def __init__(
        self,
        controls: int,
        site: Site,
        device: torch.device,
        rows: int | None = None,
        *,
        records: Records | None = None,
        part: int = 0,
        span: tuple[int, int] | None = None,
    ) -> None:
        self.site, self.device, self.rows = site, device, rows
        self.records, self.part, self.span = records or Records(), part, span
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
