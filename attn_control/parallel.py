"""Context parallelism: plans of a site whose tokens are spread over processes.

Every stream (text; image with its references) is cut in as many parts as there are processes, so
that each holds ``[text_r, image_r]``. The model's own attention runs as diffusers spreads it; what
a plan changes afterwards is computed on the gathered tokens, in the layout's order, and each
process keeps its share. That costs one gather of q, k, v and the output at each planned site.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_control.call import Call, Layout, Segment, Site, Step
from attn_control.errors import AttnControlError
from attn_control.plan import Plan


def spread(plan: Plan, model: Any, layout: Layout | None) -> Plan | SpreadPlan:
    """The plan as this model's processes must run it: unchanged, unless tokens are spread."""
    config = getattr(model, "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    if context is None:
        return plan
    mesh = context._flattened_mesh
    group = mesh.get_group()
    rank, size = torch.distributed.get_rank(group), mesh.size()
    q = None if layout is None else Shards(_streams(layout.q), rank, size, group)
    k = None if layout is None else Shards(_streams(layout.k), rank, size, group)
    return SpreadPlan(plan, q, k, rank, size, group)


def refuse_spread_series(model: Any, site: Site) -> None:
    """Raises AttnControlError under context parallelism, for a call of several softmaxes."""
    config = getattr(model, "_parallel_config", None)
    if getattr(config, "context_parallel_config", None) is not None:
        raise AttnControlError(
            f"attach: {site.label} makes several softmaxes a call; how context parallelism cuts"
            " them is not known; expected one process"
        )


def refuse_spread_heads(model: Any) -> None:
    """Raises AttnControlError under tensor parallelism, where no process sees all heads."""
    config = getattr(model, "_parallel_config", None)
    if getattr(config, "tensor_parallel_config", None) is not None:
        raise AttnControlError(
            "attach: tensor parallelism spreads the heads over processes, so that L0H0 is another"
            " head in each; expected context parallelism or one process"
        )


def _streams(segments: tuple[Segment, ...]) -> tuple[int, ...]:
    """Lengths of the tensors that are cut on their own: all text, or all that is no text."""
    lengths: list[int] = []
    was_text: bool | None = None
    for segment in segments:
        is_text = segment.role == "text"
        if is_text == was_text:
            lengths[-1] += segment.length
        else:
            lengths.append(segment.length)
        was_text = is_text
    return tuple(lengths)


@dataclass(frozen=True)
class Shards:
    """How a sequence of streams lies over the processes of a group.

    streams: their lengths, in order; rank, size: of this process, and how many there are.
    """

    streams: tuple[int, ...]
    rank: int
    size: int
    group: Any

    def parts(self, rank: int) -> list[int]:
        """Tokens of each stream that a process holds; the first processes take the remainder."""
        return [n // self.size + (rank < n % self.size) for n in self.streams]

    @property
    def local(self) -> int:
        return sum(self.parts(self.rank))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All tokens along ``dim``, stream by stream."""
        sizes = [sum(self.parts(rank)) for rank in range(self.size)]
        padding = max(sizes) - x.shape[dim]
        if padding:
            shape = list(x.shape)
            shape[dim] = padding
            x = torch.cat([x, x.new_zeros(shape)], dim)
        every = _all_gather(x.contiguous(), dim, self.group).split(max(sizes), dim)
        pieces = [
            every[rank].narrow(dim, start, length)
            for stream in range(len(self.streams))
            for rank in range(self.size)
            for start, length in [self._place(rank, stream)]
        ]
        return torch.cat(pieces, dim)

    def _place(self, rank: int, stream: int) -> tuple[int, int]:
        parts = self.parts(rank)
        return sum(parts[:stream]), parts[stream]

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This process's share of gathered tokens."""
        return torch.cat([x.narrow(dim, *place) for place in self._own_places()], dim)

    def _own_places(self) -> Iterator[tuple[int, int]]:
        start = 0
        for stream, length in enumerate(self.streams):
            before = sum(self.parts(rank)[stream] for rank in range(self.rank))
            yield start + before, self.parts(self.rank)[stream]
            start += length


def _all_gather(x: Tensor, dim: int, group: Any) -> Tensor:
    import torch.distributed._functional_collectives as collectives

    # torch 2.13 calls them all_gather_single, and warns at the names of before.
    kind = "_autograd" if torch.is_grad_enabled() and x.requires_grad else ""
    gather: Any = getattr(collectives, f"all_gather_single{kind}", None)
    gather = gather or getattr(collectives, f"all_gather_tensor{kind}")
    return gather(x, dim, group)


@dataclass(frozen=True, eq=False)
class SpreadPlan:
    """A plan on gathered tokens. q, k: None where the layout is not known: then every control acts
    on all tokens alike, and their order does not matter.
    """

    plan: Plan
    q: Shards | None
    k: Shards | None
    rank: int
    size: int
    group: Any

    def prepare(self, step: Step) -> None:
        self.plan.prepare(step)

    def at(self, index: int) -> SpreadPlan:
        """As ``Plan.at``."""
        return self

    def run(self, call: Call, fired: Tensor | None) -> Tensor:
        """As ``Plan.run``, for this process's tokens."""
        q_local, k_local = call.q.shape[2], call.k.shape[2]
        q = self._shards(self.q, call, q_local)
        if q is None:
            return self.plan.run(call, fired)
        # Keys that no process shares out (the text of some cross-attention) are whole already.
        k = self._shards(self.k, call, k_local)
        if self.k is None and q_local != k_local:
            k = None
        mask = call.mask
        if mask is not None and k is not None and mask.shape[-1] == k_local:
            mask = k.gather(mask, mask.ndim - 1)
        if mask is not None and mask.ndim > 2 and mask.shape[-2] == q_local > 1:
            mask = q.gather(mask, mask.ndim - 2)

        def original(heads: tuple[int, ...] | None = None) -> Tensor:
            # All heads, whatever is asked: processes may share them out among themselves.
            out = q.gather(call.original(), 2)
            return out if heads is None else out[:, list(heads)]

        whole = replace(
            call,
            q=q.gather(call.q, 2),
            k=call.k if k is None else k.gather(call.k, 2),
            v=call.v if k is None else k.gather(call.v, 2),
            mask=mask,
            original=original,
        )
        return q.own(self.plan.run(whole, fired), 2)

    def _shards(self, known: Shards | None, call: Call, local: int) -> Shards | None:
        """How tokens of that many a process are spread, or None if every process has all."""
        if known is None:  # equal parts, and no order to keep
            return Shards((local * self.size,), self.rank, self.size, self.group)
        if local == known.local:
            return known
        if local == sum(known.streams):
            return None
        raise AttnControlError(
            f"attach: {call.site.label} runs {local} tokens in process {self.rank} of {self.size};"
            f" expected {known.local}, or all {sum(known.streams)}: controls do not know how"
            " context parallelism cuts this model"
        )
