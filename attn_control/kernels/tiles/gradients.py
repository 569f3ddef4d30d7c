"""Gradients by tiles of keys over the queries that read them.

A tile of few rows is slow, half precision above all, while a tile of few keys is not: so backward
takes the mask by its columns. The gradients of a tile's keys and values are then complete but for
grouped heads, and those of its queries are added up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_control.kernels.tiles.given import Given
from attn_control.kernels.tiles.idle import blank
from attn_control.kernels.tiles.schedule import Group, Schedule
from attn_control.kernels.tiles.scratch import Scratch
from attn_control.kernels.tiles.softmax import NONE, backward, wide
from attn_control.kernels.tiles.workers import work

UNITS = 8
"""Units that the work is cut into at least; not by the number of workers, on which no bit of the
result may depend.
"""
Unit = tuple[int, int, int, list[tuple[int, Group]], float]
"""Batch row, key head, part, (head, group) in it, cost."""


def gradients(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    masked: Given,
    tiles: Schedule,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v, in their dtype.

    grad: of the output; grad_lse: float32 (batch, heads, queries), of the lse, or None; lse: in the
    type that forward sums in; tiles: of keys over queries.
    """
    queries, keys = tiles.idle
    q, grad, k, v = blank(q, queries), blank(grad, queries), blank(k, keys), blank(v, keys)
    lse = lse.masked_fill(lse == NONE, 0)[..., None]
    dims = q.shape[-1]
    if grad_lse is not None:
        # d lse / d score is the softmax's weight. As if there were one more dimension, in which all
        # values are 1, but whose share of the output is left out: the kernel then adds grad_lse to
        # what it multiplies the weights by.
        q, k, out = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k, out))
        v = torch.nn.functional.pad(v, (0, 1), value=1.0)
        grad = torch.cat([grad, grad_lse[..., None].to(grad.dtype)], -1)
    q, k, v, out, grad = (x.contiguous() for x in (q, k, v, out, grad))
    batch, kv_heads = k.shape[:2]
    repeats = q.shape[1] // kv_heads
    parts = -(-UNITS // (batch * kv_heads))
    dq, dk, dv = (x.new_zeros(parts, *x.shape, dtype=wide(x.dtype)) for x in (q, k, v))

    def do(unit: Unit, scratch: Scratch) -> None:
        b, kv, part, groups, _ = unit
        for head, group in groups:
            whole = [(str(number), x[b, head]) for number, x in enumerate((grad, q, out, lse))]
            for task in group.parts:
                rows, across = slice(task.rows.start, task.rows.stop), task.across
                if not across.total:
                    continue
                g, some, o, mass = (across.take(x, scratch, name)[None, None] for name, x in whole)
                bias = masked.bias(task, b, head, scratch)
                keys, values = (x[b : b + 1, kv : kv + 1, rows] for x in (k, v))
                found = backward(g, some, keys, values, o, mass[..., 0], bias, scale)
                across.add(dq[part, b, head], found[0][0, 0])
                dk[part, b, kv, rows] += found[1][0, 0]
                dv[part, b, kv, rows] += found[2][0, 0]

    work(_units(tiles, batch, kv_heads, repeats, parts), lambda unit: unit[-1], do)
    sums = (x[0] if parts == 1 else x.sum(0) for x in (dq, dk, dv))
    dq, dk, dv = (x[..., :dims].to(q.dtype) for x in sums)
    return dq, dk, dv


def _units(tiles: Schedule, batch: int, kv_heads: int, repeats: int, parts: int) -> list[Unit]:
    """A key head's tiles, dealt out to ``parts``, each of which adds up gradients of its own."""
    units = []
    for b in range(batch):
        for kv in range(kv_heads):
            whose = range(kv * repeats, (kv + 1) * repeats)
            groups = [(head, group) for head in whose for group in tiles.of(b, head)]
            dealt: list[list[tuple[int, Group]]] = [[] for _ in range(parts)]
            load = [0.0] * parts
            for item in sorted(groups, key=lambda item: item[1].cost, reverse=True):
                lightest = load.index(min(load))
                dealt[lightest].append(item)
                load[lightest] += item[1].cost
            units += [(b, kv, part, dealt[part], load[part]) for part in range(parts)]
    return units
