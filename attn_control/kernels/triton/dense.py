"""Plain dense fused attention, forward and backward: what `kernels.aot` measures ours against.

FlashAttention-2 (arXiv 2307.08691) as it is usually written: pointers that advance, whole tiles, no
lists, no masks. Nothing calls it to attend: a block-sparse kernel at the same tile may have little
in its loop that this one has not, and its programs must not be fewer on a multiprocessor.

Tokens have to be multiples of the tile's sides, which nothing checks: only `kernels.aot` and tests
know these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def features(pointers, DIM: tl.constexpr, WIDE: tl.constexpr):
    """(rows, WIDE), 0 past DIM."""
    if DIM == WIDE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(tl.arange(0, WIDE) < DIM)[None, :], other=0.0)


@triton.jit
def dense_forward(
    Q,
    K,
    V,
    Out,
    Lse,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    heads,
    queries,
    keys,
    scale,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Out and Lse (float32, contiguous); scale: of the scores, times log2(e), not negative.

    Grid: blocks of M queries, batch times heads.
    """
    lane = tl.program_id(1)
    batch, head = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    first = tl.program_id(0) * M
    row, column, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, WIDE)
    Q += batch * q_batch + head * q_head + first.to(tl.int64) * q_row
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    q = features(Q + row[:, None] * q_row + d[None, :], DIM, WIDE)
    k_at = K + column[:, None] * k_row + d[None, :]
    v_at = V + column[:, None] * v_row + d[None, :]
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, WIDE], tl.float32)
    for _ in range(0, keys, N):
        scores = tl.dot(q, tl.trans(features(k_at, DIM, WIDE)), input_precision=PRECISION)
        above = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - above[:, None])
        fade = tl.exp2(top - above)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None]
        v = features(v_at, DIM, WIDE)
        sums = tl.dot(weights.to(v.dtype), v, sums, input_precision=PRECISION)
        top = above
        k_at += N * k_row
        v_at += N * v_row
    out = sums / total[:, None]
    Out += batch * out_batch + head * out_head + first.to(tl.int64) * out_row
    at = Out + row[:, None] * out_row + d[None, :]
    tl.store(at, out.to(Out.dtype.element_ty), mask=(d < DIM)[None, :])
    lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(Lse + lane.to(tl.int64) * queries + first + row, lse)


@triton.jit
def dense_of_queries(
    Q,
    K,
    V,
    Grad,
    Delta,
    Mass,
    GradQ,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_batch,
    grad_head,
    grad_row,
    into_batch,
    into_head,
    into_row,
    heads,
    queries,
    keys,
    scale,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """GradQ, of M queries; Delta and Mass as `backward.row_sums` makes them."""
    lane = tl.program_id(1)
    batch, head = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    first = tl.program_id(0) * M
    row, column, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, WIDE)
    Q += batch * q_batch + head * q_head + first.to(tl.int64) * q_row
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    Grad += batch * grad_batch + head * grad_head + first.to(tl.int64) * grad_row
    GradQ += batch * into_batch + head * into_head + first.to(tl.int64) * into_row
    q = features(Q + row[:, None] * q_row + d[None, :], DIM, WIDE)
    grad = features(Grad + row[:, None] * grad_row + d[None, :], DIM, WIDE)
    at = lane.to(tl.int64) * queries + first + row
    delta, mass = tl.load(Delta + at), tl.load(Mass + at)
    k_at = K + column[:, None] * k_row + d[None, :]
    v_at = V + column[:, None] * v_row + d[None, :]
    sums = tl.zeros([M, WIDE], tl.float32)
    for _ in range(0, keys, N):
        k, v = features(k_at, DIM, WIDE), features(v_at, DIM, WIDE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        weights = tl.exp2(scores - mass[:, None])
        slopes = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        slopes = weights * (slopes - delta[:, None])
        sums = tl.dot(slopes.to(k.dtype), k, sums, input_precision=PRECISION)
        k_at += N * k_row
        v_at += N * v_row
    sums *= scale * 0.6931471805599453
    at = GradQ + row[:, None] * into_row + d[None, :]
    tl.store(at, sums.to(GradQ.dtype.element_ty), mask=(d < DIM)[None, :])


@triton.jit
def dense_of_keys(
    Q,
    K,
    V,
    Grad,
    Delta,
    Mass,
    GradK,
    GradV,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_batch,
    grad_head,
    grad_row,
    into_batch,
    into_head,
    into_row,
    heads,
    queries,
    keys,
    scale,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """GradK and GradV (of one layout), of M keys; tiles are keys by queries."""
    lane = tl.program_id(1)
    batch, head = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    first = tl.program_id(0) * M
    row, column, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, WIDE)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head * k_head + first.to(tl.int64) * k_row
    V += batch * v_batch + head * v_head + first.to(tl.int64) * v_row
    Grad += batch * grad_batch + head * grad_head
    GradK += batch * into_batch + head * into_head + first.to(tl.int64) * into_row
    GradV += batch * into_batch + head * into_head + first.to(tl.int64) * into_row
    k = features(K + row[:, None] * k_row + d[None, :], DIM, WIDE)
    v = features(V + row[:, None] * v_row + d[None, :], DIM, WIDE)
    q_at = Q + column[:, None] * q_row + d[None, :]
    grad_at = Grad + column[:, None] * grad_row + d[None, :]
    delta_at = Delta + lane.to(tl.int64) * queries + column
    mass_at = Mass + lane.to(tl.int64) * queries + column
    key_sums = tl.zeros([M, WIDE], tl.float32)
    value_sums = tl.zeros([M, WIDE], tl.float32)
    for _ in range(0, queries, N):
        q = features(q_at, DIM, WIDE)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        weights = tl.exp2(scores - tl.load(mass_at)[None, :])
        grad = features(grad_at, DIM, WIDE)
        value_sums = tl.dot(weights.to(grad.dtype), grad, value_sums, input_precision=PRECISION)
        slopes = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        slopes = weights * (slopes - tl.load(delta_at)[None, :])
        key_sums = tl.dot(slopes.to(q.dtype), q, key_sums, input_precision=PRECISION)
        q_at += N * q_row
        grad_at += N * grad_row
        delta_at += N
        mass_at += N
    key_sums *= scale * 0.6931471805599453
    inside = (d < DIM)[None, :]
    at = row[:, None] * into_row + d[None, :]
    tl.store(GradK + at, key_sums.to(GradK.dtype.element_ty), mask=inside)
    tl.store(GradV + at, value_sums.to(GradV.dtype.element_ty), mask=inside)
