"""Which executor ``impl="auto"`` takes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from attn_control.kernels.cost import estimate
from attn_control.kernels.tiles.schedule import schedule
from attn_control.masks.block import BlockMask
from attn_control.masks.group import GroupMask

DENSE = 0.999
"""Share of the pairs from which on nothing worth the name is skipped."""


@dataclass(frozen=True)
class Choice:
    """What auto does with a call.

    impl: "dense" (torch's own attention, nothing masked by blocks), "torch", "flex" or "triton".
    visited: share of all pairs in the blocks that the plan keeps, 1 without a plan.
    computed: share that is computed. Above ``visited`` where rows are cheaper together, each with
        a bias on what it may not read; 1 where skipping does not pay at all.
    predicted: time over dense attention's, by this machine's table of costs or its GPU's report;
        None where there is neither.
    reason: one sentence for a report.
    """

    impl: str
    visited: float
    computed: float
    predicted: float | None
    reason: str


def explain(
    q: Tensor,
    k: Tensor,
    plan: BlockMask | GroupMask | None = None,
    *,
    mask: Tensor | None = None,
) -> Choice:
    """The choice of ``attend(q, k, v, plan, mask=mask, impl="auto")``, without running it.

    q, k: (batch, heads, tokens, head_dim); only shapes, dtype and device are looked at. The tiles
    of a plan are compiled here and kept for the call.
    """
    if plan is None:
        return Choice("dense", 1.0, 1.0, 1.0, "no block mask: dense")
    if isinstance(plan, GroupMask):
        plan = plan.sorted.mask
    visited = plan.visited_density()
    if visited == 1.0 and plan.is_fully_block_sparse():
        return Choice("dense", 1.0, 1.0, 1.0, "every block is kept whole: dense")
    if q.device.type == "cuda":
        batch, heads, queries, dim = q.shape
        return _on_gpu(str(q.device), q.dtype, batch * heads, queries, k.shape[2], dim, visited)
    tiles = schedule(plan, q.dtype)
    computed = tiles.computed
    predicted = tiles.cost if q.device.type == "cpu" else None
    if computed >= DENSE:
        reason = (
            f"at {visited:.0%} of the pairs skipping costs more than it saves: all are computed,"
            " with the mask as a bias"
        )
    else:
        reason = f"{visited:.0%} of the pairs are kept, {computed:.0%} computed"
    if predicted is not None:
        reason += f"; predicted {predicted:.2f} of dense"
        if predicted >= 1:
            reason += ": above break-even, the mask is kept for its own sake"
    return Choice("torch", visited, computed, predicted, reason)


@torch.compiler.assume_constant_result
def _on_gpu(
    device: str, dtype: torch.dtype, heads: int, queries: int, keys: int, dim: int, visited: float
) -> Choice:
    """flex, or triton where a report of this GPU shows it right, and faster.

    A dense kernel is no choice, even where it would be faster: under a mask it is another one, and
    takes memory of tokens squared.
    """
    found = estimate(queries, keys, visited, dim, dtype, device, heads=heads)
    impl, predicted = "flex", None
    if found.measured:
        impl = found.impl if _has_triton(dtype, dim) else "flex"
        predicted = found.ratios.get(impl)
    reason = f"{impl} visits {visited:.0%} of the pairs; {found.why}"
    return Choice(impl, visited, visited, predicted, reason)


def _has_triton(dtype: torch.dtype, dim: int) -> bool:
    return find_spec("triton") is not None and dtype != torch.float64 and dim <= 256
