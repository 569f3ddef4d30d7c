"""Attention by tiles, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_control.kernels.tiles.given import Given, given
from attn_control.kernels.tiles.gradients import gradients
from attn_control.kernels.tiles.schedule import Group, dense, schedule
from attn_control.kernels.tiles.scratch import Scratch
from attn_control.kernels.tiles.softmax import fold, forward, wide
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
        masked = given(mask, q.dtype, turned=True)
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
    q = q if q.stride(-1) == 1 else q.contiguous()
    k, v = (x.contiguous() if tiles.gathers or x.stride(-1) != 1 else x for x in (k, v))
    masked = given(mask, q.dtype)
    repeats = heads // k.shape[1]

    # Heads that share everything share kernel calls, if enough units are left to balance.
    together = tiles.shared and repeats == 1 and not masked.by_head
    if together and len(tiles.of(0, 0)) * batch < 16 * torch.get_num_threads():
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
        whose = slice(head, head + stride)
        kv = slice(head // repeats, head // repeats + stride)
        attended = (q[b, whose], k[b, kv], v[b, kv])
        _group(group, *attended, out[b, whose], lse[b, whose], masked, (b, head), scale, scratch)

    work(units, lambda unit: unit[2].cost, do)
    return out, lse


def _group(
    group: Group,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    masked: Given,
    at: tuple[int, int],
    scale: float,
    scratch: Scratch,
) -> None:
    """The tasks of a group, for heads that share it: tensors are (heads, tokens, head_dim)."""
    begin = group.rows.start
    if group.folded:
        rows = slice(begin, group.rows.stop)
        kept = q[:, rows].shape[:2]
        total, mass = q.new_empty(q[:, rows].shape, dtype=lse.dtype), lse.new_empty(kept)
    for number, task in enumerate(group.tasks):
        rows = slice(task.rows.start, task.rows.stop)
        bias = masked.bias(task, *at)
        # A gather is of one head: its keys then are still in the cache when they are used.
        run = task.across.run
        step = len(q) if run is not None else 1
        for head in range(0, len(q), step):
            some = slice(head, head + step)
            if run is not None:
                keys, values = (x[some, run.start : run.stop] for x in (k, v))
            else:
                keys, values = (
                    task.across.take(x[head], scratch, name)[None]
                    for x, name in ((k, "keys"), (v, "values"))
                )
            found, its = forward(q[some, rows], keys, values, bias, scale)
            if not group.folded:
                out[some, rows], lse[some, rows] = found, its
            elif number == 0:
                total[some], mass[some] = found, its
            else:
                here = slice(rows.start - begin, rows.stop - begin)
                fold(total[some, here], mass[some, here], found, its)
    if group.folded:
        rows = slice(begin, group.rows.stop)
        out[:, rows], lse[:, rows] = total, mass
