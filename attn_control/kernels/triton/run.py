"""``impl="triton"``: checks, the mask's lists, and the operator."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.kernels.triton.after import mix, soften
from attn_control.kernels.triton.prepare import chosen, everything, prepared
from attn_control.masks.block import BlockMask
from attn_control.masks.group import GroupMask

WIDEST = 256


def attend_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockMask | GroupMask | None,
    mask: Tensor | None,
    scale: float,
    *,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
    onto: tuple[Tensor, Tensor] | None = None,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and lse; arguments as `kernels.attend` has checked them.

    q_order: int32 (batch | 1, heads | 1, q_tokens), a permutation: which token stands at each of
        the plan's places. Rows are read and written where they lie: nothing is copied. Only blocks
        know of places; atoms and the model's mask are the tokens' own.
    k_order: int32 (batch | 1, kv_heads | 1, k_tokens), likewise for keys and values.
    onto: output (as q) and lse (float32 (batch, heads, q_tokens)) of the same queries over other
        keys, to go on from: what comes back is attention to both sets of keys.
    u: float32 (batch | 1, heads | 1, q_tokens | 1), SoftPAG's strengths: at last the output becomes
        ``(1 - u) O + u V``, V the value of the query's own token; the lse stays.

    Both are done in the forward kernel, or, where a gradient is wanted, after it.

    Deterministic. float32 is multiplied as torch.get_float32_matmul_precision() says: "highest" is
    exact and slow, all else is tf32.

    Raises:
        AttnControlError: neither a GPU nor the interpreter; no triton; float64, and bfloat16 in the
            interpreter; head_dim over 256; orders, onto or u that do not fit.
    """
    refuse(q)
    _check_order("q_order", q_order, q)
    _check_order("k_order", k_order, k)
    _check_after(q, k, onto, u)
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, *(onto or ()), u)
    )
    batch, heads, queries, _ = q.shape
    if not k.shape[2] or not q.numel():
        # Nothing to read, or nobody who reads; with a gradient of zeros.
        out = (q @ k.mT).sum(-1, keepdim=True) * q
        lse = q.new_full((batch, heads, queries), float("-inf"), dtype=torch.float32)
        return (out, lse) if onto is None else mix(out, lse, *onto)
    if plan is None:
        plan = everything(queries, k.shape[2])
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    sorts = isinstance(plan, GroupMask) and plan.blocks is None
    ordered = not sorts and (q_order is not None or k_order is not None)
    made = prepared(
        plan, q, heads // k.shape[1], needs_grad, ordered=ordered, biased=mask is not None
    )
    if sorts:  # no block speaks of places: the caller's orders would change nothing
        q_order, k_order = made.q_order, made.k_order
    extras = [q_order, k_order, mask, made.words, made.q_atom, made.k_atom]

    from attn_control.kernels.triton.op import block_sparse, block_sparse_then

    given = q, k, v, made.lists, made.numbers, scale, extras
    if onto is None and u is None:
        found: tuple[Tensor, Tensor] = block_sparse(*given)
        return found
    if not needs_grad:
        then = [*(onto or (None, None)), u]
        return block_sparse_then(*given, then)  # type: ignore[no-any-return]
    out, lse = block_sparse(*given)
    if onto is not None:
        out, lse = mix(out, lse, *onto)
    return out if u is None else soften(out, v, u), lse


def probe_triton(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: tuple[int, ...] | None,
    plan: BlockMask | GroupMask | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """As `kernels.probe`, which has checked the arguments; keys: int64; values: the same, where
    they are known, to keep what a plan says of them.
    """
    refuse(q, "probe")
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    if plan is None:
        plan = everything(q.shape[2], k.shape[2])
    bounds, *looked, words, q_atom, k_atom = chosen(plan, keys, values)

    from attn_control.kernels.triton.probe import key_columns

    given = [*looked, mask, words, q_atom, k_atom]
    found: Tensor = key_columns(q, k, lse, keys.int(), scale, bounds, given)
    return found


def refuse(q: Tensor, who: str = "attend") -> None:
    """Raise for queries that no kernel of ours can take."""
    missing = _missing(q.device.type, q.dtype)
    if missing:
        raise AttnControlError(f"{who}: impl='triton' {missing}")
    if q.dtype == torch.float64:
        raise AttnControlError(f"{who}: impl='triton' has no float64; take 'torch' or 'reference'")
    if not 1 <= q.shape[3] <= WIDEST:
        raise AttnControlError(
            f"{who}: impl='triton' goes up to head_dim {WIDEST}, got {q.shape[3]}; take 'torch'"
        )


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


def _check_after(
    q: Tensor, k: Tensor, onto: tuple[Tensor, Tensor] | None, u: Tensor | None
) -> None:
    wanted = []
    if onto is not None:
        wanted += [("onto[0]", onto[0], q.shape, q.dtype, False)]
        wanted += [("onto[1]", onto[1], q.shape[:3], torch.float32, False)]
    if u is not None:
        wanted += [("u", u, q.shape[:3], torch.float32, True)]
        if q.shape[2] != k.shape[2]:
            raise AttnControlError(
                f"attend: u needs query i and key i to be one token, got {q.shape[2]} queries and"
                f" {k.shape[2]} keys"
            )
    for name, x, shape, dtype, shared in wanted:
        fits = len(x.shape) == len(shape) and all(
            size == whole or (shared and size == 1)
            for size, whole in zip(x.shape, shape, strict=True)
        )
        if not fits or x.dtype != dtype or x.device != q.device:
            raise AttnControlError(
                f"attend: expected {name} as {str(dtype).removeprefix('torch.')} {tuple(shape)}"
                f"{', 1 where shared,' if shared else ''} on {q.device}, got"
                f" {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"
            )
