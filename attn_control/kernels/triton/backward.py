"""The backward kernels: row sums first, then gradients of queries, and of keys with values.

Weights are made anew from the lse, as in FlashAttention-2 (arXiv 2307.08691). Each gradient is
summed by one program alone: no atomics, so the same bits each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_control.kernels.triton.parts import (
    both,
    entry,
    masked,
    put,
    rows,
    span,
    tile,
    token,
    vector,
    whose,
    words,
)


@triton.jit
def row_sums(
    Out, Grad, GradLse, Lse, Delta, Mass,
    out_batch, out_head, out_row, grad_batch, grad_head, grad_row, heads, queries,
    THROUGH_LSE: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Delta: sum of out times its gradient, less the gradient of the lse, of each query; Mass: the
    lse in powers of two, inf for a query without keys, whose weights are 0 by that.
    """
    lane = tl.program_id(0)
    batch, head = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    first = tl.program_id(1) * M
    row = tl.arange(0, M)
    inside = first + row < queries
    Out += batch * out_batch + head * out_head
    Grad += batch * grad_batch + head * grad_head
    out = tile(
        rows(Out, Out, first, row, inside, out_row, WIDE, False, True), inside, DIM, WIDE, True
    )
    grad = tile(
        rows(Grad, Grad, first, row, inside, grad_row, WIDE, False, True), inside, DIM, WIDE, True
    )
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    at = (batch * heads + head) * queries + first + row
    if THROUGH_LSE:
        delta -= tl.load(GradLse + at, mask=inside, other=0.0)
    lse = tl.load(Lse + at, mask=inside, other=0.0)
    tl.store(Delta + at, delta, mask=inside)
    mass = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(Mass + at, mass, mask=inside)


@triton.jit
def of_queries(
    Q, K, V, Grad, Delta, Mass, GradQ,
    Order, Bounds, WholeAt, Whole, CutAt, Cut, Pool,
    QOrder, KOrder, Bias, Words, QAtom, KAtom,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    grad_batch, grad_head, grad_row, into_batch, into_head, into_row,
    q_order_batch, q_order_head, k_order_batch, k_order_head,
    bias_batch, bias_head, bias_row, bias_column, q_atom_batch, k_atom_batch,
    length, blocks, list_heads, spread, list_batch_stride, list_head_stride,
    heads, group, queries, scale,
    FLIP: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, WORDS: tl.constexpr, PIECES: tl.constexpr, CUTS: tl.constexpr,
    CUT_STAGES: tl.constexpr, ALIKE: tl.constexpr, TURNED: tl.constexpr,
    FAR: tl.constexpr, M: tl.constexpr, N: tl.constexpr, Q_ORDERED: tl.constexpr,
    K_ORDERED: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GradQ, of one block of queries: over the same tiles as forward."""
    batch, head, mine, piece, first, count = whose(
        Order, Bounds, length, blocks, list_heads, spread, list_batch_stride, list_head_stride,
        PIECES, M,
    )  # fmt: skip
    if count <= 0:
        return
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head // group * k_head
    V += batch * v_batch + head // group * v_head
    Grad += batch * grad_batch + head * grad_head
    QOrder += batch * q_order_batch + head * q_order_head
    KOrder += batch * k_order_batch + head // group * k_order_head
    Bias += batch * bias_batch + head * bias_head
    if ALIKE:
        v_row = k_row
    row, column = tl.arange(0, M), tl.arange(0, N)
    inside = row < count
    queried = token(QOrder, first, row, inside, Q_ORDERED)
    q = tile(
        rows(Q, QOrder, first, row, inside, q_row, WIDE, Q_ORDERED, FAR), inside, DIM, WIDE, True
    )
    if FLIP:
        q = -q
    grad = rows(Grad, QOrder, first, row, inside, grad_row, WIDE, Q_ORDERED, FAR)
    grad = tile(grad, inside, DIM, WIDE, True)
    of_query = (batch * heads + head) * queries + queried
    delta = tl.load(Delta + of_query, mask=inside, other=0.0)
    mass = tl.load(Mass + of_query, mask=inside, other=float("inf"))
    if GROUPS != 0:
        KAtom += batch * k_atom_batch
        atoms = tl.load(QAtom + batch * q_atom_batch + queried, mask=inside, other=0)
        low, high = words(Words, atoms, GROUPS)
    else:
        low, high = queried, queried
    sums = tl.zeros([M, WIDE], tl.float32)

    for CUT in tl.static_range(1 + CUTS):  # whole tiles, then cut ones
        begin, end = span(WholeAt, CutAt, mine, CUT)
        for at in tl.range(begin, end, num_stages=CUT_STAGES if CUT else None):
            key, keys, number, bit = entry(Whole, Cut, at, N, CUT)
            there = column < keys
            k = rows(K, KOrder, key, column, there, k_row, WIDE, K_ORDERED, FAR, TURNED)
            k, k_turned = both(tile(k, there, DIM, WIDE, CUT, TURNED), TURNED)
            v_at = rows(V, KOrder, key, column, there, v_row, WIDE, K_ORDERED, FAR, TURNED)
            if not CUT:  # else after the mask, whose registers it would take
                _, v_turned = both(tile(v_at, there, DIM, WIDE, CUT, TURNED), TURNED)
            scores = tl.dot(q, k_turned, input_precision=PRECISION) * scale
            if CUT or BIAS != 0:
                keyed = token(KOrder, key, column, there, K_ORDERED)
                atom = keyed
                if CUT and GROUPS != 0:
                    atom = tl.load(KAtom + keyed, mask=there, other=0)
                scores = masked(
                    scores, Pool, number, bit, keys, piece + row, column,
                    low[:, None], high[:, None], atom[None, :], inside,
                    Bias, queried, keyed, bias_row, bias_column,
                    BLOCK, WORDS, N, CUT, GROUPS, BIAS,
                )  # fmt: skip
            weights = tl.exp2(scores - mass[:, None])
            if CUT:
                _, v_turned = both(tile(v_at, there, DIM, WIDE, CUT, TURNED), TURNED)
            slopes = tl.dot(grad, v_turned, input_precision=PRECISION)
            slopes = weights * (slopes - delta[:, None])
            sums = tl.dot(slopes.to(k.dtype), k, sums, input_precision=PRECISION)

    sums *= scale * 0.6931471805599453
    if FLIP:
        sums = -sums
    GradQ += batch * into_batch + head * into_head
    into = rows(GradQ, QOrder, first, row, inside, into_row, WIDE, Q_ORDERED, FAR)
    put(into, sums.to(GradQ.dtype.element_ty), inside, DIM, WIDE)


@triton.jit
def of_keys(
    Q, K, V, Grad, Delta, Mass, GradK, GradV,
    Order, Bounds, WholeAt, Whole, CutAt, Cut, Pool,
    QOrder, KOrder, Bias, Words, QAtom, KAtom,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    grad_batch, grad_head, grad_row, into_batch, into_head, into_row,
    q_order_batch, q_order_head, k_order_batch, k_order_head,
    bias_batch, bias_head, bias_row, bias_column, q_atom_batch, k_atom_batch,
    length, blocks, list_heads, spread, list_batch_stride, list_head_stride,
    heads, group, queries, scale,
    FLIP: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, WORDS: tl.constexpr, PIECES: tl.constexpr, CUTS: tl.constexpr,
    CUT_STAGES: tl.constexpr, ALIKE: tl.constexpr, TURNED: tl.constexpr,
    FAR: tl.constexpr, M: tl.constexpr, N: tl.constexpr, Q_ORDERED: tl.constexpr,
    K_ORDERED: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GradK and GradV (of one layout), of one block of keys: over the lists of the transposed mask,
    of every query head that reads these keys in turn. Tiles are keys by queries.
    """
    batch, kv_head, block, piece, first, count = whose(
        Order, Bounds, length, blocks, list_heads, spread, 0, 0, PIECES, M
    )
    if count <= 0:
        return
    K += batch * k_batch + kv_head * k_head
    V += batch * v_batch + kv_head * v_head
    KOrder += batch * k_order_batch + kv_head * k_order_head
    if ALIKE:
        grad_row = q_row
    row, column = tl.arange(0, M), tl.arange(0, N)
    inside = row < count
    keyed = token(KOrder, first, row, inside, K_ORDERED)
    k = tile(
        rows(K, KOrder, first, row, inside, k_row, WIDE, K_ORDERED, FAR), inside, DIM, WIDE, True
    )
    v = tile(
        rows(V, KOrder, first, row, inside, v_row, WIDE, K_ORDERED, FAR), inside, DIM, WIDE, True
    )
    if FLIP:
        k = -k
    if GROUPS != 0:
        QAtom += batch * q_atom_batch
        atom = tl.load(KAtom + batch * k_atom_batch + keyed, mask=inside, other=0)
    else:
        atom = keyed
    key_sums = tl.zeros([M, WIDE], tl.float32)
    value_sums = tl.zeros([M, WIDE], tl.float32)

    for member in range(0, group):
        head = kv_head * group + member
        q_of = Q + batch * q_batch + head * q_head
        grad_of = Grad + batch * grad_batch + head * grad_head
        deltas = Delta + (batch * heads + head) * queries
        masses = Mass + (batch * heads + head) * queries
        order = QOrder + batch * q_order_batch + head * q_order_head
        bias = Bias + batch * bias_batch + head * bias_head
        mine = batch * list_batch_stride + head * list_head_stride + block

        for CUT in tl.static_range(1 + CUTS):  # whole tiles, then cut ones
            begin, end = span(WholeAt, CutAt, mine, CUT)
            for at in tl.range(begin, end, num_stages=CUT_STAGES if CUT else None):
                query, some, number, bit = entry(Whole, Cut, at, N, CUT)
                there = column < some
                q = rows(q_of, order, query, column, there, q_row, WIDE, Q_ORDERED, FAR, TURNED)
                q, q_turned = both(tile(q, there, DIM, WIDE, CUT, TURNED), TURNED)
                scores = tl.dot(k, q_turned, input_precision=PRECISION) * scale
                if CUT or BIAS != 0:
                    queried = token(order, query, column, there, Q_ORDERED)
                    low, high = queried, queried
                    if CUT and GROUPS != 0:
                        atoms = tl.load(QAtom + queried, mask=there, other=0)
                        low, high = words(Words, atoms, GROUPS)
                    scores = masked(
                        scores, Pool, number, bit, some, piece + row, column,
                        low[None, :], high[None, :], atom[:, None], inside,
                        bias, keyed, queried, bias_column, bias_row,
                        BLOCK, WORDS, N, CUT, GROUPS, BIAS,
                    )  # fmt: skip
                mass = vector(masses, order, query, column, there, float("inf"), Q_ORDERED, CUT)
                weights = tl.exp2(scores - mass[None, :])
                grad = rows(grad_of, order, query, column, there, grad_row, WIDE, Q_ORDERED, FAR)
                grad = tile(grad, there, DIM, WIDE, CUT)
                given = weights.to(grad.dtype)
                value_sums = tl.dot(given, grad, value_sums, input_precision=PRECISION)
                slopes = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                delta = vector(deltas, order, query, column, there, 0.0, Q_ORDERED, CUT)
                slopes = weights * (slopes - delta[None, :])
                key_sums = tl.dot(slopes.to(q.dtype), q, key_sums, input_precision=PRECISION)

    key_sums *= scale * 0.6931471805599453
    if FLIP:
        key_sums = -key_sums
    GradK += batch * into_batch + kv_head * into_head
    GradV += batch * into_batch + kv_head * into_head
    into = rows(GradK, KOrder, first, row, inside, into_row, WIDE, K_ORDERED, FAR)
    put(into, key_sums.to(GradK.dtype.element_ty), inside, DIM, WIDE)
    into = rows(GradV, KOrder, first, row, inside, into_row, WIDE, K_ORDERED, FAR)
    put(into, value_sums.to(GradV.dtype.element_ty), inside, DIM, WIDE)
