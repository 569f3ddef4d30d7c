"""``impl="triton"``: checks, the mask's lists, and the operator."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.kernels.triton.lists import lower, turned
from attn_control.kernels.triton.tune import side, tiles
from attn_control.masks.block import BlockMask

WIDEST = 256
BLOCK = 128
"""Of the mask that stands for none."""


def attend_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockMask | None,
    mask: Tensor | None,
    scale: float,
    *,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and lse; arguments as `kernels.attend` has checked them.

    q_order: int32 (batch | 1, heads | 1, q_tokens), a permutation: which token stands at each of
        the plan's places. Rows are read and written where they lie: nothing is copied.
    k_order: int32 (batch | 1, kv_heads | 1, k_tokens), likewise for keys and values.

    Deterministic. float32 is multiplied as torch.get_float32_matmul_precision() says: "highest" is
    exact and slow, all else is tf32.

    Raises:
        AttnControlError: neither a GPU nor the interpreter; no triton; float64, and bfloat16 in the
            interpreter; head_dim over 256; orders that do not fit.
    """
    missing = _missing(q.device.type, q.dtype)
    if missing:
        raise AttnControlError(f"attend: impl='triton' {missing}")
    if q.dtype == torch.float64:
        raise AttnControlError("attend: impl='triton' has no float64; take 'torch' or 'reference'")
    if not 1 <= q.shape[3] <= WIDEST:
        raise AttnControlError(
            f"attend: impl='triton' goes up to head_dim {WIDEST}, got {q.shape[3]}; take 'torch'"
        )
    _check_order("q_order", q_order, q)
    _check_order("k_order", k_order, k)
    batch, heads, queries, _ = q.shape
    if not k.shape[2] or not q.numel():
        # Nothing to read, or nobody who reads; with a gradient of zeros.
        return (q @ k.mT).sum(-1, keepdim=True) * q, q.new_full(
            (batch, heads, queries), float("-inf"), dtype=torch.float32
        )
    if plan is None:
        plan = _everything(queries, k.shape[2])
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    lists, numbers = _prepared(plan, q, heads // k.shape[1], needs_grad)

    from attn_control.kernels.triton.op import block_sparse

    return block_sparse(q, k, v, lists, numbers, scale, q_order, k_order, mask)


@torch.compiler.assume_constant_result
def _missing(device: str, dtype: torch.dtype) -> str:
    """What stands in the way of tensors on such a device; empty if nothing does."""
    if find_spec("triton") is None:
        return "needs triton, which is not installed"
    if device == "cuda":
        return ""
    from attn_control.kernels.triton.launch import interpreted

    if not interpreted():
        return (
            f"needs a GPU, q is on {device}; take 'auto' or 'torch', or set TRITON_INTERPRET=1"
            " before Python starts, to run the kernels slowly as Python"
        )
    if dtype == torch.bfloat16:
        # It keeps them as integers, and tl.dot multiplies those.
        return "has no bfloat16 in triton's interpreter, which would multiply its bits"
    return ""


def _check_order(name: str, order: Tensor | None, x: Tensor) -> None:
    if order is None:
        return
    sizes = zip(order.shape, x.shape, strict=False)
    fits = order.dim() == 3 and order.shape[2] == x.shape[2]
    if not fits or any(size not in (1, whole) for size, whole in sizes):
        raise AttnControlError(
            f"attend: expected {name} of shape {tuple(x.shape[:3])}, 1 where shared, got"
            f" {tuple(order.shape)}"
        )
    if order.dtype != torch.int32 or order.device != x.device or order.stride(-1) != 1:
        raise AttnControlError(
            f"attend: expected {name} as int32 on {x.device}, its places next to each other, got"
            f" {order.dtype} on {order.device} with strides {order.stride()}"
        )


@lru_cache(maxsize=64)
def _everything(queries: int, keys: int) -> BlockMask:
    blocks = -(-queries // BLOCK), -(-keys // BLOCK)
    table = torch.ones(1, *blocks, dtype=torch.bool)
    return BlockMask.from_table(table, block_size=BLOCK, q_len=queries, k_len=keys)


def _prepared(
    plan: BlockMask, q: Tensor, group: int, needs_grad: bool
) -> tuple[list[Tensor], list[int]]:
    """A plan's lists for all kernels, or for forward alone; made once, and kept with the plan."""
    kept = plan.__dict__.setdefault("_triton", {})
    half = q.dtype != torch.float32
    key = (q.device, q.shape[3], half, group, needs_grad)
    if key not in kept:
        kept[key] = _lists(plan, q.device, q.shape[3], half, group, needs_grad)
    return kept[key]


@torch.compiler.disable
def _lists(
    plan: BlockMask, device: torch.device, dim: int, half: bool, group: int, needs_grad: bool
) -> tuple[list[Tensor], list[int]]:
    from attn_control.kernels.triton.launch import Walk
    from attn_control.kernels.triton.op import flatten

    plan = plan.to(device)
    chosen = tiles(dim, half, _target(device))
    made, lowered = [], {}
    for name, by_keys in (("forward", False), ("of_queries", False), ("of_keys", True)):
        if name != "forward" and not needs_grad:
            break
        tile = getattr(chosen, name)
        mask = turned(plan) if by_keys else plan
        tile = tile._replace(m=side(mask.q_block, tile.m), n=side(mask.k_block, tile.n))
        if (by_keys, tile.n) not in lowered:
            lowered[by_keys, tile.n] = lower(mask, tile.n, group if by_keys else 1)
        heads = mask.heads
        made.append(Walk(lowered[by_keys, tile.n], mask.batch, heads, tile))
    return flatten(made)


def _target(device: torch.device) -> str:
    """As `tune.tiles` takes it; the interpreter has no registers to run out of."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
