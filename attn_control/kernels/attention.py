"""attend(): softmax attention of some queries to some keys, by whichever executor."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.kernels.choose import explain
from attn_control.kernels.grouped import attend_sorted
from attn_control.masks.block import BlockMask
from attn_control.masks.group import GroupMask

IMPLS = ("reference", "torch", "flex", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockMask | GroupMask | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(q k^T scale + mask) v`` over the pairs that ``plan`` allows.

    Args:
        q: (batch, heads, q_tokens, head_dim), of float32, bfloat16, float16 or float64.
        k, v: (batch, kv_heads, k_tokens, head_dim); heads a multiple of kv_heads: query head h
            reads key head ``h // (heads // kv_heads)``.
        plan: which query may read which key, by blocks or by groups of tokens; None: every one
            every one. Its batch and heads are those of q, or 1.
        mask: the model's own, broadcastable to (batch, heads, q_tokens, k_tokens): bool, True where
            a query may attend, or additive. A pair needs both masks' leave.
        scale: of the scores; ``head_dim ** -0.5`` by default.
        impl: "reference" (dense, float32 at least, memory of tokens squared), "torch" (tiles that
            skip what the plan skips; any device, made for CPUs), "flex" (compiled flex_attention),
            "triton" (kernels of ours, for GPUs), or "auto", whose choice `explain` tells.
        need_lse: whether the log-sum-exp of the scores is wanted; sometimes None is cheaper.

    Returns:
        The output, as q, and the lse, float32 (batch, heads, q_tokens), or None. A query without
        any key has 0 as its output and -inf as its lse, and no gradient goes through it.

        Differentiable in q, k and v, through both. With "torch", keys that the plan gives to no
        query of their head, and queries that it gives no key, may hold anything, nan too, as
        padding does. Any other key that is masked has weight 0, as in torch's own attention: it
        has to be finite.

    Raises:
        AttnControlError: an argument that does not fit, by name, with what was expected.
    """
    check(q, k, v, plan, mask)
    scale = checked_scale(q, scale)
    if impl == "auto":
        impl = explain(q, k, plan, mask=mask).impl
        if impl == "dense":
            if not need_lse and mask is None and k.shape[2]:
                grouped = q.shape[1] != k.shape[1]
                sdpa = torch.nn.functional.scaled_dot_product_attention
                return sdpa(q, k, v, scale=scale, enable_gqa=grouped), None
            impl, plan = "torch", None
    if impl not in IMPLS:
        names = ", ".join(map(repr, ("auto", *IMPLS)))
        raise AttnControlError(f"attend: expected {names} as impl, got {impl!r}")
    if isinstance(plan, GroupMask) and impl in ("torch", "flex"):
        run = partial(attend, scale=scale, impl=impl, need_lse=need_lse)
        return attend_sorted(run, q, k, v, plan.to(q.device).sorted, mask)
    # Imported here: dynamo, which three of them need, takes as long to load as torch itself.
    if impl == "flex":
        from attn_control.kernels.flex import attend_flex

        assert not isinstance(plan, GroupMask)
        return attend_flex(q, k, v, plan, mask, scale, need_lse)
    if impl == "reference":
        from attn_control.kernels.reference import attend_reference as execute
    elif impl == "triton":
        from attn_control.kernels.triton.run import attend_triton as execute
    else:
        from attn_control.kernels.tiles.run import attend_tiles as execute
    out, lse = execute(q, k, v, plan, mask, scale)
    return out, lse if need_lse else None


def checked_scale(q: Tensor, scale: float | None, *, who: str = "attend") -> float:
    """The scale of the scores: given, and then a finite number, or ``head_dim ** -0.5``."""
    given = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        raise AttnControlError(f"{who}: expected a finite number as scale, got {given!r}")
    return float(given)


def check(
    q: Tensor, k: Tensor, v: Tensor, plan: object, mask: object, *, who: str = "attend"
) -> None:
    """Raise for arguments of `attend`, or of ``who``, that do not fit each other."""
    for name, given in (("q", q), ("k", k), ("v", v)):
        if not isinstance(given, Tensor) or given.dim() != 4:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise AttnControlError(
                f"{who}: expected {name} as a tensor (batch, heads, tokens, head_dim), got {got}"
            )
        if given.dtype not in DTYPES or given.dtype != q.dtype:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            expected = f"one of {names}" if given.dtype not in DTYPES else f"q's {q.dtype}"
            raise AttnControlError(f"{who}: expected {name} of {expected}, got {given.dtype}")
        if given.device != q.device:
            raise AttnControlError(f"{who}: {name} is on {given.device}, q on {q.device}")
    if k.shape != v.shape:
        raise AttnControlError(
            f"{who}: expected k and v of one shape, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise AttnControlError(
            f"{who}: expected k of batch {q.shape[0]} and head_dim {q.shape[3]} as q, got"
            f" {tuple(k.shape)}"
        )
    heads, kv_heads = q.shape[1], k.shape[1]
    if not kv_heads or heads % kv_heads:
        raise AttnControlError(f"{who}: {heads=} has to be a multiple of {kv_heads=} (k, v)")
    if plan is not None:
        _check_plan(q, k, plan, who)
    if mask is not None:
        _check_mask(q, k, mask, who)


def _check_plan(q: Tensor, k: Tensor, plan: object, who: str) -> None:
    if not isinstance(plan, (BlockMask, GroupMask)):
        raise AttnControlError(
            f"{who}: expected a BlockMask, a GroupMask or None as plan, got {type(plan).__name__}"
        )
    if (plan.q_len, plan.k_len) != (q.shape[2], k.shape[2]):
        raise AttnControlError(
            f"{who}: plan is for {plan.q_len} queries and {plan.k_len} keys, q has {q.shape[2]}"
            f" tokens and k {k.shape[2]}"
        )
    for name, given, expected in (
        ("batch", plan.batch, q.shape[0]),
        ("heads", plan.heads, q.shape[1]),
    ):
        if given not in (1, expected):
            raise AttnControlError(f"{who}: expected plan.{name} of 1 or {expected}, got {given}")


def _check_mask(q: Tensor, k: Tensor, mask: object, who: str) -> None:
    full = (*q.shape[:3], k.shape[2])
    if not isinstance(mask, Tensor):
        raise AttnControlError(f"{who}: expected a tensor as mask, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise AttnControlError(f"{who}: expected mask as bool or float, got {mask.dtype}")
    if mask.device != q.device:
        raise AttnControlError(f"{who}: mask is on {mask.device}, q on {q.device}")
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    if mask.dim() > 4 or any(size not in (1, whole) for size, whole in sizes):
        raise AttnControlError(
            f"{who}: expected mask broadcastable to (batch, heads, q_tokens, k_tokens) ="
            f" {full}, got {tuple(mask.shape)}"
        )
    if mask.requires_grad and torch.is_grad_enabled():
        raise AttnControlError(
            f"{who}: mask requires grad, which {who} does not compute: detach it, or add it to"
            " the scores in a softmax of your own"
        )
