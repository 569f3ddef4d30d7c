"""How many key blocks a query block keeps, of scores as `scores` makes them. No row is left empty:
the best block is kept, whatever the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.masks.say import at_least
from attn_control.masks.selectors.scores import Blocks


class Budget(Protocol):
    """From scores (batch, heads, q_blocks, k_blocks) to a bool table of the blocks to keep."""

    def keep(self, scores: Tensor, k_blocks: Blocks) -> Tensor: ...


@dataclass(frozen=True)
class TopK:
    """So many blocks with the highest scores: a count, or a share of all, rounded up."""

    k: int | float

    def __post_init__(self) -> None:
        if isinstance(self.k, float):
            _share("TopK", "k", self.k)
        else:
            at_least("TopK", "k", self.k, 1)

    def keep(self, scores: Tensor, k_blocks: Blocks) -> Tensor:
        blocks = scores.shape[-1]
        # A tenth of 30 blocks is 3, although 0.1 * 30 is a little more in floating point.
        k = math.ceil(self.k * blocks - 1e-9) if isinstance(self.k, float) else self.k
        best = scores.topk(max(1, min(k, blocks)), dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


@dataclass(frozen=True)
class TopP:
    """The fewest blocks whose shares add up to ``p``, at most ``most`` of them (a count, or a share
    of all).
    """

    p: float
    most: int | float = 1.0

    def __post_init__(self) -> None:
        _share("TopP", "p", self.p)
        TopK(self.most)

    def keep(self, scores: Tensor, k_blocks: Blocks) -> Tensor:
        shares, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = shares.cumsum(-1) - shares  # of the blocks that are better
        kept = before < self.p
        kept[..., 0] = True
        table = torch.zeros_like(kept).scatter_(-1, order, kept)
        return table & TopK(self.most).keep(scores, k_blocks)


@dataclass(frozen=True)
class Threshold:
    """Blocks whose share of the row is at least ``share``."""

    share: float

    def __post_init__(self) -> None:
        _share("Threshold", "share", self.share)

    def keep(self, scores: Tensor, k_blocks: Blocks) -> Tensor:
        return (scores.softmax(-1) >= self.share) | TopK(1).keep(scores, k_blocks)


@dataclass(frozen=True)
class PerRegion:
    """Runs of keys that do not compete with each other, each with a budget of its own, or None for
    none of it (SparseD keeps the prompt and what is generated apart, arXiv 2509.24014).

    runs: (tokens, budget) in the order of the keys; borders lie between blocks.
    """

    runs: Sequence[tuple[int, Budget | None]]

    def keep(self, scores: Tensor, k_blocks: Blocks) -> Tensor:
        bounds, start, kept = k_blocks.bounds.tolist(), 0, []
        for tokens, budget in self.runs:
            stop = start + tokens
            if stop not in bounds or tokens < 1:
                raise AttnControlError(
                    f"PerRegion: keys {start}..{stop} do not end where a block does; blocks that "
                    "straddle no border come from a Grid with before=, after= or split="
                )
            first, last = bounds.index(start), bounds.index(stop)
            part = scores[..., first:last]
            if budget is None:
                kept.append(torch.zeros_like(part, dtype=torch.bool))
            else:
                kept.append(budget.keep(part, k_blocks.part(first, last)))
            start = stop
        if start != bounds[-1]:
            raise AttnControlError(f"PerRegion: runs of {start} keys, but there are {bounds[-1]}")
        return torch.cat(kept, -1)


@dataclass(frozen=True)
class PerHead:
    """A budget for each head."""

    budgets: Sequence[Budget]

    def keep(self, scores: Tensor, k_blocks: Blocks) -> Tensor:
        if len(self.budgets) != scores.shape[1]:
            raise AttnControlError(
                f"PerHead: {len(self.budgets)} budgets for {scores.shape[1]} heads"
            )
        return torch.cat(
            [b.keep(scores[:, h : h + 1], k_blocks) for h, b in enumerate(self.budgets)], 1
        )


def _share(owner: str, name: str, value: object) -> None:
    if not isinstance(value, float) or not 0 < value <= 1:
        raise AttnControlError(f"{owner}: {name}={value!r} has to be a share in (0, 1]")
