"""The kernels as operators that torch knows: one node of a compiled graph each.

Lists of a mask are arguments like any others, so that one graph serves every mask of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from attn_control.kernels.triton.launch import (
    Epilogue,
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
NUMBERS = 2 + len(Tile._fields)
"""Of a walk: batch, heads and its tile."""
# As torch's schemas know it: Tensor?[]. What infers them does not read "Tensor | None".
Given = Sequence[Optional[Tensor]]  # noqa: UP045


def flatten(walks: Sequence[Walk]) -> tuple[list[Tensor], list[int]]:
    """Tensors and numbers, as an operator's schema takes them."""
    tensors = [tensor for walk in walks for tensor in walk.lists]
    return tensors, [n for walk in walks for n in (walk.batch, walk.heads, *walk.tile)]


def walks(tensors: Sequence[Tensor], numbers: Sequence[int]) -> list[Walk]:
    """The inverse of `flatten`."""
    found = []
    for n in range(len(tensors) // PARTS):
        batch, heads, *tile = numbers[n * NUMBERS : (n + 1) * NUMBERS]
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
    extras: Given,
) -> tuple[Tensor, Tensor]:
    """Output and lse. ``lists``: of forward alone, or of all three kernels, where there will be a
    backward; ``extras``: the fields of `launch.Extras`.
    """
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    return run_forward(q, k, v, walks(lists, numbers)[0], Extras(*extras), scale)


@torch.library.custom_op("attn_control::block_sparse_then", mutates_args=())
def block_sparse_then(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sequence[Tensor],
    numbers: Sequence[int],
    scale: float,
    extras: Given,
    epilogue: Given,
) -> tuple[Tensor, Tensor]:
    """The same with what `launch.Epilogue` says, in the same kernel; without gradients."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    then = Epilogue(*epilogue)
    return run_forward(q, k, v, walks(lists, numbers)[0], Extras(*extras), scale, then)


@block_sparse.register_fake
@block_sparse_then.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
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
    extras: Given,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; ``lists`` of the two backward kernels."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    rows, columns = walks(lists, numbers)
    given = Extras(*extras)
    return run_backward(grad, grad_lse, q, k, v, out, lse, (rows, columns), given, scale)


@block_sparse_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_out(q), empty_out(k), empty_out(k)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lists, numbers, scale, extras = inputs
    out, lse = output
    ctx.given = [x is not None for x in extras]
    ctx.save_for_backward(q, k, v, out, lse, *lists[PARTS:], *(x for x in extras if x is not None))
    ctx.numbers, ctx.scale = list(numbers[NUMBERS:]), scale
    ctx.lists = len(lists)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, *rest = ctx.saved_tensors
    lists, kept = rest[: 2 * PARTS], iter(rest[2 * PARTS :])
    extras = [next(kept) if there else None for there in ctx.given]
    dq, dk, dv = torch.ops.attn_control.block_sparse_backward(
        grad, grad_lse, q, k, v, out, lse, lists, ctx.numbers, ctx.scale, extras
    )
    # To torch a list with a None in it is one argument, not a list of them.
    nothing = [None] * len(extras) if all(ctx.given) else None
    return dq, dk, dv, [None] * ctx.lists, None, None, nothing


block_sparse.register_autograd(_backward, setup_context=_keep)
