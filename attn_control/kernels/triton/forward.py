"""The forward kernel: one program a block of queries, or a piece of one."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_control.kernels.triton.parts import (
    allowed,
    biased,
    entry,
    put,
    rows,
    softened,
    tile,
    token,
    whose,
)


@triton.jit
def forward(
    Q,
    K,
    V,
    Out,
    Lse,
    Order,
    Bounds,
    WholeAt,
    Whole,
    CutAt,
    Cut,
    Pool,
    QOrder,
    KOrder,
    Bias,
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
    q_order_batch,
    q_order_head,
    k_order_batch,
    k_order_head,
    bias_batch,
    bias_head,
    bias_row,
    bias_column,
    length,
    blocks,
    list_heads,
    spread,
    list_batch_stride,
    list_head_stride,
    heads,
    group,
    queries,
    scale,
    FLIP: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    PIECES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    Q_ORDERED: tl.constexpr,
    K_ORDERED: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Out and Lse (float32, contiguous) of a block's queries, by online softmax in powers of two.

    scale: of the scores, times log2(e), not negative; FLIP: it was, and q is negated instead.
    """
    batch, head, block, piece = whose(Order, blocks, list_heads, spread, PIECES, length)
    first = tl.load(Bounds + block) + piece * M
    count = tl.load(Bounds + block + 1) - first
    if count <= 0:
        return
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head // group * k_head
    V += batch * v_batch + head // group * v_head
    QOrder += batch * q_order_batch + head * q_order_head
    KOrder += batch * k_order_batch + head // group * k_order_head
    Bias += batch * bias_batch + head * bias_head
    row, column = tl.arange(0, M), tl.arange(0, N)
    inside, every = row < count, column < N
    q = tile(rows(Q, QOrder, first, row, inside, q_row, Q_ORDERED), inside, DIM, WIDE, True)
    if FLIP:
        q = -q
    queried = token(QOrder, first, row, inside, Q_ORDERED)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, WIDE], tl.float32)
    mine = batch * list_batch_stride + head * list_head_stride + block

    for at in range(tl.load(WholeAt + mine), tl.load(WholeAt + mine + 1)):
        key = tl.load(Whole + at)
        k = tile(rows(K, KOrder, key, column, every, k_row, K_ORDERED), every, DIM, WIDE, False)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if BIAS == 0:
            # One multiply-add an element: the maximum is scaled after it is found.
            above = tl.maximum(top, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - above[:, None])
            fade = tl.exp2(top - above)
        else:
            keyed = token(KOrder, key, column, every, K_ORDERED)
            ok = inside[:, None] & every[None, :]
            scores = biased(scores * scale, ok, Bias, queried, keyed, bias_row, bias_column, BIAS)
            above, weights, fade = softened(scores, top)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None]
        v = tile(rows(V, KOrder, key, column, every, v_row, K_ORDERED), every, DIM, WIDE, False)
        sums = tl.dot(weights.to(v.dtype), v, sums, input_precision=PRECISION)
        top = above

    for at in range(tl.load(CutAt + mine), tl.load(CutAt + mine + 1)):
        key, keys, number, bit = entry(Cut, at)
        there = column < keys
        k = tile(rows(K, KOrder, key, column, there, k_row, K_ORDERED), there, DIM, WIDE, True)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        ok = allowed(Pool, number, bit, keys, piece * M + row, column, BLOCK, WORDS, N)
        if BIAS != 0:
            keyed = token(KOrder, key, column, there, K_ORDERED)
            ok = ok & inside[:, None]
            scores = biased(scores, ok, Bias, queried, keyed, bias_row, bias_column, BIAS)
        scores = tl.where(ok, scores, float("-inf"))
        above, weights, fade = softened(scores, top)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None]
        v = tile(rows(V, KOrder, key, column, there, v_row, K_ORDERED), there, DIM, WIDE, True)
        sums = tl.dot(weights.to(v.dtype), v, sums, input_precision=PRECISION)
        top = above

    some = total > 0
    out = sums / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, top)
    Out += batch * out_batch + head * out_head
    put(
        rows(Out, QOrder, first, row, inside, out_row, Q_ORDERED),
        out.to(Out.dtype.element_ty),
        inside,
        DIM,
        WIDE,
    )
    Lse += (batch * heads + head) * queries
    tl.store(Lse + queried, lse, mask=inside)
