"""Attention by tiles, forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_control.kernels.tiles.given import Given, given
from attn_control.kernels.tiles.gradients import gradients
from attn_control.kernels.tiles.idle import blank
from attn_control.kernels.tiles.schedule import Group, Task, dense, schedule
from attn_control.kernels.tiles.scratch import Scratch
from attn_control.kernels.tiles.softmax import NONE, fold, forward, wide
from attn_control.kernels.tiles.workers import work
from attn_control.masks.block import BlockMask


@torch.compiler.disable
def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockMask | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, queries, head_dim) and lse float32 (batch, heads, queries).

    Arguments as `kernels.attend` has checked them. Differentiable once in q, k and v, through the
    output and the lse. Deterministic, whatever the number of workers.
    """
    return _Attention.apply(q, k, v, plan, mask, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockMask | None,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, plan, mask, scale)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.plan, ctx.scale = plan, scale
        ctx.set_materialize_grads(False)
        return out, lse.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, mask = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 6
        grad = torch.zeros_like(out) if grad is None else grad
        if ctx.plan is None:
            plan = dense(k.shape[2], q.shape[2])
        else:
            plan = schedule(ctx.plan, q.dtype, backward=True)
        masked = given(mask, q, turned=True)
        found = gradients(grad, grad_lse, q, k, v, out, lse, masked, plan, ctx.scale)
        return *found, None, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockMask | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, dim = q.shape
    # Tokens before heads in memory, as torch's own kernel has it: what follows joins heads again.
    out = q.new_empty(batch, queries, heads, dim).transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=wide(q.dtype), device=q.device)
    if plan is None:
        tiles = dense(queries, k.shape[2])
    else:
        tiles = schedule(plan, q.dtype)
    q, k, v = (blank(x, tiles.idle[side]) for x, side in ((q, 0), (k, 1), (v, 1)))
    q = q if q.stride(-1) == 1 else q.contiguous()
    k, v = (x.contiguous() if tiles.gathers or x.stride(-1) != 1 else x for x in (k, v))
    masked = given(mask, q)
    repeats = heads // k.shape[1]

    # Heads that share everything share kernel calls and biases, if there is nothing to balance, or
    # enough units are left for it.
    together = tiles.shared and repeats == 1 and not masked.by_head
    threads = torch.get_num_threads()
    if threads > 1 and len(tiles.of(0, 0)) * batch < 16 * threads:
        together = False
    stride = heads if together else 1
    units = [
        (b, head, group)
        for b in range(batch)
        for head in range(0, heads, stride)
        for group in tiles.of(b, head)
    ]

    def do(unit: tuple[int, int, Group], scratch: Scratch) -> None:
        b, head, group = unit
        heads, kv = (slice(first, first + stride) for first in (head, head // repeats))
        whole = Whole(q[b : b + 1, heads], k[b : b + 1, kv], v[b : b + 1, kv])
        result = out[b : b + 1, heads], lse[b : b + 1, heads]
        _group(group, whole, *result, masked, (b, head), scale, scratch)

    work(units, lambda unit: unit[2].cost, do)
    return out, lse


class Whole(NamedTuple):
    """All tokens of the heads that a group is for: (1, heads, tokens, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor


def _group(
    group: Group,
    x: Whole,
    out: Tensor,
    lse: Tensor,
    masked: Given,
    at: tuple[int, int],
    scale: float,
    scratch: Scratch,
) -> None:
    """The tasks of a group, into its rows of out and lse."""
    rows = slice(group.rows.start, group.rows.stop)
    first, *others = group.tasks
    out[:, :, rows], lse[:, :, rows] = _softmax(first, x, masked, at, scale, scratch)
    if not others:
        return
    if others[0].rows == group.rows:
        found = _softmax(others[0], x, masked, at, scale, scratch)
        fold(out[:, :, rows], lse[:, :, rows], *found)
        return
    # What the others find is folded in at once, for all rows: each of these operations is small.
    kept = (*lse[:, :, rows].shape, x.q.shape[3])
    more = scratch.get("more", kept, out.dtype, out.device)
    more_lse = scratch.get("more lse", kept[:3], lse.dtype, out.device)
    if sum(len(task.rows) for task in others) < len(group.rows):
        more.zero_()
        more_lse.fill_(NONE)
    for task in others:
        here = slice(task.rows.start - rows.start, task.rows.stop - rows.start)
        found = _softmax(task, x, masked, at, scale, scratch)
        more[:, :, here], more_lse[:, :, here] = found
    fold(out[:, :, rows], lse[:, :, rows], more, more_lse)


def _softmax(
    task: Task, x: Whole, masked: Given, at: tuple[int, int], scale: float, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Output and lse of a task alone."""
    if task.pieces:
        whole, *others = (_softmax(part, x, masked, at, scale, scratch) for part in task.pieces)
        for other in others:
            fold(*whole, *other)
        return whole
    queries = x.q[:, :, task.rows.start : task.rows.stop]
    bias = masked.bias(task, *at, scratch)
    run = task.across.run
    if run is not None:
        keys, values = x.k[:, :, run.start : run.stop], x.v[:, :, run.start : run.stop]
        return forward(queries, keys, values, bias, scale)
    # A gather is of one head: its keys then are still in the cache when they are used.
    found = []
    for head in range(queries.shape[1]):
        keys, values = (
            task.across.take(whole[0, head], scratch, name)[None, None]
            for whole, name in ((x.k, "keys"), (x.v, "values"))
        )
        found.append(forward(queries[:, head : head + 1], keys, values, bias, scale))
    if len(found) == 1:
        return found[0]
    outs, masses = zip(*found, strict=True)
    return torch.cat(outs, 1), torch.cat(masses, 1)
