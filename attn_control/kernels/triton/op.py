"""The kernels as two operators that torch knows: one node of a compiled graph each, differentiable.

Lists of a mask are arguments like any others, so that one graph serves every mask of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attn_control.kernels.triton.launch import (
    Extras,
    Walk,
    dense_rows,
    empty_out,
    run_backward,
    run_forward,
)
from attn_control.kernels.triton.lists import Lists
from attn_control.kernels.triton.tune import Tile

PARTS = len(Lists._fields)


def flatten(walks: Sequence[Walk]) -> tuple[list[Tensor], list[int]]:
    """Tensors and numbers, as an operator's schema takes them."""
    tensors = [tensor for walk in walks for tensor in walk.lists]
    return tensors, [n for walk in walks for n in (walk.batch, walk.heads, *walk.tile)]


def walks(tensors: Sequence[Tensor], numbers: Sequence[int]) -> list[Walk]:
    """The inverse of `flatten`."""
    found = []
    for n in range(len(tensors) // PARTS):
        batch, heads, *tile = numbers[n * 6 : n * 6 + 6]
        lists = Lists(*tensors[n * PARTS : (n + 1) * PARTS])
        found.append(Walk(lists, batch, heads, Tile(*tile)))
    return found


@torch.library.custom_op("attn_control::block_sparse", mutates_args=())
def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sequence[Tensor],
    numbers: Sequence[int],
    scale: float,
    q_order: Tensor | None,
    k_order: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and lse. ``lists``: of forward alone, or of all three kernels, where there will be a
    backward.
    """
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    walk = walks(lists, numbers)[0]
    return run_forward(q, k, v, walk, Extras(q_order, k_order, bias), scale)


@block_sparse.register_fake
def _(q, k, v, lists, numbers, scale, q_order, k_order, bias):  # type: ignore[no-untyped-def]
    return empty_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("attn_control::block_sparse_backward", mutates_args=())
def block_sparse_backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Sequence[Tensor],
    numbers: Sequence[int],
    scale: float,
    q_order: Tensor | None,
    k_order: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; ``lists`` of the two backward kernels."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    rows, columns = walks(lists, numbers)
    extras = Extras(q_order, k_order, bias)
    return run_backward(grad, grad_lse, q, k, v, out, lse, (rows, columns), extras, scale)


@block_sparse_backward.register_fake
def _(grad, grad_lse, q, k, v, out, lse, lists, numbers, scale, q_order, k_order, bias):  # type: ignore[no-untyped-def]
    return empty_out(q), empty_out(k), empty_out(k)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lists, numbers, scale, *extras = inputs
    out, lse = output
    ctx.given = [x is not None for x in extras]
    ctx.save_for_backward(q, k, v, out, lse, *lists[PARTS:], *(x for x in extras if x is not None))
    ctx.numbers, ctx.scale = list(numbers[6:]), scale
    ctx.lists = len(lists)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, *rest = ctx.saved_tensors
    lists, kept = rest[: 2 * PARTS], iter(rest[2 * PARTS :])
    extras = [next(kept) if there else None for there in ctx.given]
    dq, dk, dv = torch.ops.attn_control.block_sparse_backward(
        grad, grad_lse, q, k, v, out, lse, lists, ctx.numbers, ctx.scale, *extras
    )
    return dq, dk, dv, [None] * ctx.lists, None, None, None, None, None


block_sparse.register_autograd(_backward, setup_context=_keep)
