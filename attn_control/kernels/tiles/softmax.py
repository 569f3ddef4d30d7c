"""One tile's softmax and its gradients: by torch's CPU flash kernel, elsewhere written out.

Tensors are (1, heads, rows, head_dim) and (1, heads, keys, head_dim). lse is float32, or float64
for float64 inputs; a row without any key has 0 as its output, -inf as its lse, and no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE = float("-inf")
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is summed in: float32, or float64 where that is given."""
    return torch.promote_types(dtype, torch.float32)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and lse. bias: additive, broadcastable to (rows, keys)."""
    if not k.shape[2]:
        return torch.zeros_like(q), q.new_full(q.shape[:3], NONE, dtype=wide(q.dtype))
    if q.device.type != "cpu":
        return _forward(q, k, v, bias, scale)
    if bias is None:
        return _flash(q, k, v, scale=scale)
    out, lse = _flash(q, k, v, attn_mask=_four(bias, q, k), scale=scale)
    # The kernel gives 0 as the lse of a row without keys, which other rows may have too: only where
    # it is seen is the bias looked at.
    if not lse.all():
        empty = (bias.amax(-1) == NONE).expand_as(lse)
        lse = lse.masked_fill(empty, NONE)
        out = out.masked_fill(empty[..., None], 0)
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What this tile adds to the gradients of q, k and v.

    out and lse are those of the whole softmax, whose part the tile is; lse is finite: 0 for a row
    without keys.
    """
    if q.device.type != "cpu":
        return _backward(grad, q, k, v, out, lse, bias, scale)
    four = _four(bias, q, k)
    return _flash_backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=four, scale=scale)


def fold(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Make (out, lse) those of the softmax over both sets of keys, in place."""
    both = torch.logaddexp(lse, more_lse)
    share = (more_lse - both.clamp(min=torch.finfo(both.dtype).min)).exp_()  # 0 without any key
    if out.dtype == lse.dtype:
        out.lerp_(more, share[..., None])
    else:
        out.copy_(torch.lerp(out.to(lse.dtype), more.to(lse.dtype), share[..., None]))
    lse.copy_(both)


def _four(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if bias is None:
        return None
    # float32 for all but float64, whose kernel would read it as float64 without a word.
    return bias.to(wide(q.dtype)).expand(1, 1, q.shape[2], k.shape[2])


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.mT).to(wide(q.dtype)) * scale
    return scores if bias is None else scores + bias


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, bias, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == NONE, 0)[..., None]).exp()
    return (weights.to(v.dtype) @ v), lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (_scores(q, k, bias, scale) - lse[..., None]).exp()
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
    scores = weights * ((grad @ v.mT).to(lse.dtype) - delta) * scale
    scores = scores.to(q.dtype)
    return scores @ k, scores.mT @ q, weights.to(grad.dtype).mT @ grad
