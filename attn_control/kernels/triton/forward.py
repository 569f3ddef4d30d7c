"""The forward kernel: one program a block of queries, or a piece of one."""

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
    whose,
    words,
)

LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
"""The maximum of a row that has met no key yet: it is finite, for -inf less -inf is nan."""


@triton.jit
def forward(
    Q, K, V, Out, Lse,
    Order, Bounds, WholeAt, Whole, CutAt, Cut, Pool,
    QOrder, KOrder, Bias, Words, QAtom, KAtom,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row,
    q_order_batch, q_order_head, k_order_batch, k_order_head,
    bias_batch, bias_head, bias_row, bias_column, q_atom_batch, k_atom_batch,
    length, blocks, list_heads, spread, list_batch_stride, list_head_stride,
    heads, group, queries, scale,
    Onto, OntoLse, U, onto_batch, onto_head, onto_row, u_batch, u_head, u_row,
    FLIP: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, WORDS: tl.constexpr, PIECES: tl.constexpr, CUTS: tl.constexpr,
    CUT_STAGES: tl.constexpr, ALIKE: tl.constexpr, TURNED: tl.constexpr,
    FAR: tl.constexpr, M: tl.constexpr, N: tl.constexpr, Q_ORDERED: tl.constexpr,
    K_ORDERED: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    ONTO: tl.constexpr, SOFTEN: tl.constexpr,
):  # fmt: skip
    """Out and Lse (float32, contiguous) of a block's queries, by online softmax in powers of two.

    scale: of the scores, times log2(e), not negative; FLIP: it was, and q is negated instead.
    ONTO: the softmax goes on from an output and its lse (contiguous), as over one set of keys.
    SOFTEN: at last the output goes the way ``u`` to the value of the query's own token.
    """
    batch, head, mine, piece, first, count = whose(
        Order, Bounds, length, blocks, list_heads, spread, list_batch_stride, list_head_stride,
        PIECES, M,
    )  # fmt: skip
    if count <= 0:
        return
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head // group * k_head
    V += batch * v_batch + head // group * v_head
    QOrder += batch * q_order_batch + head * q_order_head
    KOrder += batch * k_order_batch + head // group * k_order_head
    Bias += batch * bias_batch + head * bias_head
    if ALIKE:
        v_row = k_row
    row, column = tl.arange(0, M), tl.arange(0, N)
    inside = row < count
    q = tile(
        rows(Q, QOrder, first, row, inside, q_row, WIDE, Q_ORDERED, FAR), inside, DIM, WIDE, True
    )
    if FLIP:
        q = -q
    queried = token(QOrder, first, row, inside, Q_ORDERED)
    if GROUPS != 0:
        KAtom += batch * k_atom_batch
        atoms = tl.load(QAtom + batch * q_atom_batch + queried, mask=inside, other=0)
        low, high = words(Words, atoms, GROUPS)
    else:
        low, high = queried, queried
    if ONTO:
        OntoLse += (batch * heads + head) * queries
        top = tl.load(OntoLse + queried, mask=inside, other=float("-inf")) * 1.4426950408889634
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        top = tl.maximum(top, LOWEST)
        Onto += batch * onto_batch + head * onto_head
        onto = rows(Onto, QOrder, first, row, inside, onto_row, WIDE, Q_ORDERED, FAR)
        sums = tile(onto, inside, DIM, WIDE, True).to(tl.float32)
        sums = tl.where((total > 0)[:, None], sums, 0.0)
    else:
        top = tl.full([M], LOWEST, tl.float32)
        total = tl.zeros([M], tl.float32)
        sums = tl.zeros([M, WIDE], tl.float32)

    for CUT in tl.static_range(1 + CUTS):  # whole tiles, then cut ones
        begin, end = span(WholeAt, CutAt, mine, CUT)
        for at in tl.range(begin, end, num_stages=CUT_STAGES if CUT else None):
            key, keys, number, bit = entry(Whole, Cut, at, N, CUT)
            there = column < keys
            k = rows(K, KOrder, key, column, there, k_row, WIDE, K_ORDERED, FAR, TURNED)
            _, k_turned = both(tile(k, there, DIM, WIDE, CUT, TURNED), TURNED)
            scores = tl.dot(q, k_turned, input_precision=PRECISION)
            factor = scale
            if BIAS != 0:
                scores *= scale
                factor = 1.0
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
            # One multiply-add an element: the maximum is scaled after it is found.
            above = tl.maximum(top, tl.max(scores, 1) * factor)
            weights = tl.exp2(scores * factor - above[:, None])
            fade = tl.exp2(top - above)
            total = total * fade + tl.sum(weights, 1)
            sums = sums * fade[:, None]
            v = rows(V, KOrder, key, column, there, v_row, WIDE, K_ORDERED, FAR)
            v = tile(v, there, DIM, WIDE, CUT)
            sums = tl.dot(weights.to(v.dtype), v, sums, input_precision=PRECISION)
            top = above

    batch, head, _, _, first, count = whose(
        Order, Bounds, length, blocks, list_heads, spread, list_batch_stride, list_head_stride,
        PIECES, M, True,
    )  # fmt: skip
    inside = row < count
    queried = token(QOrder, first, row, inside, Q_ORDERED)
    some = total > 0
    out = sums / tl.where(some, total, 1.0)[:, None]
    lse = (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453
    lse = tl.where(some, lse, float("-inf"))
    if SOFTEN:
        u = tl.load(U + batch * u_batch + head * u_head + queried * u_row, mask=inside, other=0.0)
        own = rows(V, QOrder, first, row, inside, v_row, WIDE, Q_ORDERED, FAR)
        own = tile(own, inside, DIM, WIDE, True).to(tl.float32)
        # As torch.lerp: exactly the output at 0, and exactly the value at 1.
        u = u[:, None]
        out = tl.where(u < 0.5, out + u * (own - out), own - (own - out) * (1 - u))
    Out += batch * out_batch + head * out_head
    into = rows(Out, QOrder, first, row, inside, out_row, WIDE, Q_ORDERED, FAR)
    put(into, out.to(Out.dtype.element_ty), inside, DIM, WIDE)
    Lse += (batch * heads + head) * queries
    tl.store(Lse + queried, lse, mask=inside)
