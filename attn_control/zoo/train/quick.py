"""Faster steps on one CPU core, for trainings only: attention written out, and memory kept.

Under bfloat16 the CPU's fused attention is bound by its exponentials, far from the speed of its
matrix products. Written out and compiled, 536 tokens take under a third of its time, there and back
(`python benchmarks/train_attention.py`); much of the rest went into giving memory back and taking
it again, as glibc does with every block above 32 MB.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, LARGEST = -3, -1, 2**31 - 1


def keep_memory() -> bool:
    """Tell glibc to keep freed memory for the next step; False where there is no glibc to tell."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, LARGEST))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, for queries and keys that were normalised.

    q (..., q_len, d), k and v (..., k_len, d), output like q. There is no maximum subtracted: with
    norms on both sides a score is at most sqrt(d) times their learnt scales, far from overflow.
    """
    weights = torch.exp((q * q.shape[-1] ** -0.5) @ k.mT)
    total = weights.sum(-1, keepdim=True, dtype=torch.float32)
    return ((weights @ v) / total).to(q.dtype)


@contextmanager
def written_out() -> Iterator[None]:
    """`F.scaled_dot_product_attention` is `attention` inside, where it is given three tensors."""
    fused = F.scaled_dot_product_attention

    def either(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **rest: Any,
    ) -> torch.Tensor:
        if attn_mask is not None or dropout_p or is_causal or any(rest.values()):
            return fused(query, key, value, attn_mask, dropout_p, is_causal, **rest)
        return attention(query, key, value)

    F.scaled_dot_product_attention = either  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def compiled(losses: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`losses` compiled, with its attention written out: queries and keys must be normalised."""
    graph = torch.compile(losses, dynamic=False)

    def run(*args: Any) -> torch.Tensor:
        with written_out():
            return graph(*args)

    return run
