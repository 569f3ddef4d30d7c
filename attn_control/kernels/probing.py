"""probe(): the attention to a few chosen keys, without a map of tokens by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.kernels.attention import check, checked_scale
from attn_control.masks.block import BlockMask
from attn_control.masks.columns import columns
from attn_control.masks.group import GroupMask

IMPLS = ("auto", "torch", "triton")


def probe(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    keys: Tensor | Sequence[int],
    plan: BlockMask | GroupMask | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Columns of the attention probabilities: ``exp(q k_j^T scale + mask - lse)`` for j in keys.

    What heat maps of words need (as DAAM, arXiv 2210.04885, has them), at the price of the chosen
    keys alone: memory is queries x chosen.

    Args:
        q, k, plan, mask, scale: as `attend` was given them.
        lse: float32 (batch, heads, q_tokens), as `attend` returned it.
        keys: which, int64 (chosen,) or a sequence; in any order, also repeated.
        impl: "torch", "triton" (as with `attend`), or "auto": triton on a GPU, where installed.

    Returns:
        float32 (batch, heads, q_tokens, chosen), float64 for float64 inputs: 0 where a query may
        not read a key, and where it has none. Differentiable in q, k and lse: through attend's own
        lse the gradients are those of the softmax.

    Raises:
        AttnControlError: an argument that does not fit, by name, with what was expected.
    """
    check(q, k, k, plan, mask, who="probe")
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32 or lse.device != q.device:
        raise AttnControlError(
            f"probe: expected lse as float32 {tuple(q.shape[:3])} on {q.device}, got"
            f" {str(lse.dtype).removeprefix('torch.')} {tuple(lse.shape)} on {lse.device}"
        )
    scale = checked_scale(q, scale, who="probe")
    if impl not in IMPLS:
        names = ", ".join(map(repr, IMPLS))
        raise AttnControlError(f"probe: expected {names} as impl, got {impl!r}")
    chosen, values = _chosen(keys, k)
    if impl == "auto":
        on_gpu = q.device.type == "cuda" and q.dtype != torch.float64 and q.shape[3] <= 256
        impl = "triton" if on_gpu and find_spec("triton") else "torch"
    if impl == "triton":
        from attn_control.kernels.triton.run import probe_triton

        return probe_triton(q, k, lse, chosen, values, plan, mask, scale)
    return _probe(q, k, lse, chosen, plan, mask, scale)


def _chosen(keys: Tensor | Sequence[int], k: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """int64 (chosen,), and the same in Python: None while a graph without values is traced."""
    values: tuple[int, ...] | None = None
    if not isinstance(keys, Tensor):
        values = tuple(keys)
    elif not torch.compiler.is_compiling():
        values = tuple(keys.flatten().tolist())
    chosen = keys if isinstance(keys, Tensor) else torch.tensor(values, device=k.device)
    if chosen.dim() != 1 or (len(chosen) and chosen.dtype not in (torch.int32, torch.int64)):
        raise AttnControlError(
            "probe: expected keys as one row of integers, got"
            f" {str(chosen.dtype).removeprefix('torch.')} {tuple(chosen.shape)}"
        )
    for value in values or ():
        if not 0 <= value < k.shape[2]:
            raise AttnControlError(f"probe: keys has {value}, which is not in 0..{k.shape[2] - 1}")
    return chosen.to(k.device, torch.int64), values


def _probe(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    keys: Tensor,
    plan: BlockMask | GroupMask | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    picked = k[:, :, keys].to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.to(wide) @ picked.mT * scale
    off = lse.isneginf()[..., None]
    if plan is not None:
        off = off | ~columns(plan.to(q.device), keys)
    if mask is not None:
        mask = mask if mask.dim() == 0 or mask.shape[-1] == 1 else mask[..., keys]
        off = off | (~mask if mask.dtype == torch.bool else mask.isneginf())
        if mask.dtype != torch.bool:
            scores = scores + mask.to(wide)
    return (scores - lse[..., None]).masked_fill(off, float("-inf")).exp()
