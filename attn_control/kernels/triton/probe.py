"""The probe: probabilities of chosen keys, from the lse that forward left."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_control.kernels.triton.launch import broadcast, dense_rows, on, precision
from attn_control.kernels.triton.op import Given
from attn_control.kernels.triton.parts import biased, grouped, rows, tile, words
from attn_control.kernels.triton.prepare import BLOCK
from attn_control.kernels.triton.tune import SMALLEST, wide


@triton.jit
def probe(
    Q, K, Lse, Out, Keys, Bounds, Entry, Place, Pool, Bias, Words, QAtom, KAtom,
    q_batch, q_head, q_row, k_batch, k_head, k_row, entry_batch, entry_head,
    bias_batch, bias_head, bias_row, bias_column, q_atom_batch, k_atom_batch,
    blocks, heads, group, queries, chosen, scale,
    DIM: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
    PIECES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr,
    BIAS: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out (float32, contiguous): of a block of queries and ``N`` of the chosen keys.

    Entry: what the mask says of the keys' blocks, contiguous but for the heads and rows that share
    it; Place: the keys' places in them. scale: of the scores, times log2(e).
    """
    program = tl.program_id(0)
    piece = program % PIECES * M
    block = program // PIECES % blocks
    batch = (program // PIECES // blocks // heads).to(tl.int64)
    head = (program // PIECES // blocks % heads).to(tl.int64)
    first = tl.load(Bounds + block) + piece
    count = tl.load(Bounds + block + 1) - first
    if count <= 0:
        return
    row, column = tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    inside, there = row < count, column < chosen
    ok = inside[:, None] & there[None, :]
    key = tl.load(Keys + column, mask=there, other=0)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head // group * k_head
    q = tile(rows(Q, Q, first, row, inside, q_row, WIDE, False, True), inside, DIM, WIDE, True)
    k = tile(rows(K, Keys, 0, column, there, k_row, WIDE, True, True), there, DIM, WIDE, True)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if BLOCKS:
        Entry += batch * entry_batch + head * entry_head + block * chosen
        entry = tl.load(Entry + column, mask=there, other=0)
        place = tl.load(Place + column, mask=there, other=0)
        number = tl.where(entry > 1, entry - 2, 0).to(tl.int64)
        at = Pool + (number * (BLOCK * WORDS) + place // 32)[None, :]
        word = tl.load(at + (piece + row)[:, None] * WORDS, mask=ok & (entry > 1)[None, :], other=0)
        bit = (word >> (place % 32)[None, :]) & 1
        ok = ok & ((entry == 1)[None, :] | (bit != 0))
    if GROUPS != 0:
        atoms = tl.load(QAtom + batch * q_atom_batch + first + row, mask=inside, other=0)
        atom = tl.load(KAtom + batch * k_atom_batch + key, mask=there, other=0)
        low, high = words(Words, atoms, GROUPS)
        ok = ok & grouped(low[:, None], high[:, None], atom[None, :], GROUPS)
    if BIAS != 0:
        Bias += batch * bias_batch + head * bias_head
        scores = biased(scores, ok, Bias, first + row, key, bias_row, bias_column, BIAS)
    of_query = (batch * heads + head) * queries + first + row
    lse = tl.load(Lse + of_query, mask=inside, other=0.0)
    mass = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    weights = tl.where(ok, tl.exp2(scores - mass[:, None]), 0.0)
    into = Out + of_query[:, None] * chosen + column[None, :]
    tl.store(into, weights, mask=inside[:, None] & there[None, :])


@torch.library.custom_op("attn_control::key_columns", mutates_args=())
def key_columns(
    q: Tensor, k: Tensor, lse: Tensor, keys: Tensor, scale: float, bounds: Tensor, given: Given
) -> Tensor:
    """Probabilities (batch, heads, queries, chosen). keys: int32; bounds: of blocks of queries;
    given: entries, places and pool of a mask, the model's mask, words and atoms, each or None.
    """
    q, k, lse = dense_rows(q), dense_rows(k), lse.contiguous()
    batch, heads, queries, dim = q.shape
    out = torch.empty(*q.shape[:3], len(keys), dtype=torch.float32, device=q.device)
    grid, args, constants = arguments(q, k, lse, keys, scale, bounds, given, out)
    if out.numel():
        with on(q):
            probe[grid](*args, **constants)
    return out


def arguments(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    keys: Tensor,
    scale: float,
    bounds: Tensor,
    given: Given,
    out: Tensor,
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and constants of `probe`."""
    entry, _, pool, bias, kept, q_atom, k_atom = given
    batch, heads, queries, dim = q.shape
    kind = 0 if bias is None else 2 if bias.dtype == torch.bool else 1
    pointers = [x.view(torch.uint8) if x is bias and kind == 2 else x for x in given]
    block = BLOCK if pool is None else pool.shape[1]
    m, n = min(64, wide(block)), min(64, max(SMALLEST, wide(len(keys))))
    args = (
        *(q, k, lse, out, keys, bounds),
        *(keys if x is None else x for x in pointers),
        *q.stride()[:3],
        *k.stride()[:3],
        *broadcast(entry, 2),
        *broadcast(bias, 4),
        *broadcast(q_atom, 1),
        *broadcast(k_atom, 1),
        *(len(bounds) - 1, heads, heads // k.shape[1], queries, len(keys)),
        scale * math.log2(math.e),
    )
    pieces = -(-block // m)
    constants = {
        "DIM": dim,
        "WIDE": wide(dim),
        "BLOCK": block,
        "WORDS": 1 if pool is None else pool.shape[2],
        "PIECES": pieces,
        "M": m,
        "N": n,
        "BLOCKS": entry is not None,
        "BIAS": kind,
        "GROUPS": 0 if kept is None else kept.shape[1],
        "PRECISION": precision(q.dtype),
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    return (batch * heads * (len(bounds) - 1) * pieces, -(-len(keys) // n)), args, constants


@key_columns.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, keys: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], keys.shape[0], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, _, keys, ctx.scale, _, given = inputs
    ctx.save_for_backward(q, k, keys, output)
    ctx.given = [x is not None for x in given]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Plain products: as small as the output."""
    q, k, keys, weights = ctx.saved_tensors
    group = q.shape[1] // k.shape[1]
    slopes = weights * grad
    picked = k[:, :, keys].float().repeat_interleave(group, dim=1)
    dq = slopes @ picked * ctx.scale
    of_picked = (slopes.mT @ q.float()).unflatten(1, (-1, group)).sum(2) * ctx.scale
    dk = torch.zeros(k.shape, device=k.device).index_add(2, keys, of_picked)
    nothing = [None] * len(ctx.given) if all(ctx.given) else None
    return dq.to(q.dtype), dk.to(k.dtype), -slopes.sum(-1), None, None, None, nothing


key_columns.register_autograd(_backward, setup_context=_keep)
