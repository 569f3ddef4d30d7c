"""What the kernels have in common: where rows lie, tiles of them, bits, the model's own mask."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def whose(
    Order, Bounds, length, blocks, list_heads, spread, batch_stride, head_stride,
    PIECES: tl.constexpr, M: tl.constexpr, AGAIN: tl.constexpr = False,
):  # fmt: skip
    """Of a program: batch row, head, its row of the lists, its first row within the block, its
    first token, and how many there are from there, none or less if the block is short.

    The order goes over the mask's lists; where a mask is shared, it is gone through once for each
    that shares it: ``spread`` heads, and then the batch rows.

    AGAIN: read anew, after a loop that would have to hold it in registers otherwise.
    """
    program = tl.program_id(0)
    piece = program % PIECES * M
    turn = program // PIECES // length
    row = tl.load(Order + program // PIECES % length, volatile=AGAIN)
    owner, block = row // blocks, row % blocks
    batch = (owner // list_heads + turn // spread).to(tl.int64)
    head = (owner % list_heads + turn % spread).to(tl.int64)
    first = tl.load(Bounds + block, volatile=AGAIN) + piece
    count = tl.load(Bounds + block + 1, volatile=AGAIN) - first
    return batch, head, batch * batch_stride + head * head_stride + block, piece, first, count


@triton.jit
def token(Order, first, offsets, inside, ORDERED: tl.constexpr):
    """Tokens at the mask's places ``first + offsets``."""
    if ORDERED:
        return tl.load(Order + first + offsets, mask=inside, other=0)
    else:
        return first + offsets


@triton.jit
def down(x, TURNED: tl.constexpr):
    """A number of each row as a column of the tile or, TURNED, as a row."""
    return x[None, :] if TURNED else x[:, None]


@triton.jit
def across(x, TURNED: tl.constexpr):
    """A number of each feature, the other way."""
    return x[:, None] if TURNED else x[None, :]


@triton.jit
def rows(
    Base, Order, first, offsets, inside, stride, WIDE: tl.constexpr, ORDERED: tl.constexpr,
    FAR: tl.constexpr, TURNED: tl.constexpr = False,
):  # fmt: skip
    """Pointers (rows, WIDE) to the features of the tokens at ``first + offsets``. Unless FAR they
    are 32 bits from Base: addresses then take a third of the instructions in a loop. TURNED: (WIDE,
    rows).
    """
    d = across(tl.arange(0, WIDE), TURNED)
    if ORDERED:
        at = token(Order, first, offsets, inside, ORDERED)
        if FAR:
            at = at.to(tl.int64)
        return Base + (down(at * stride, TURNED) + d)
    else:
        # What no loop changes in brackets of its own.
        if FAR:
            first = first.to(tl.int64)
        return Base + (first * stride + (down(offsets * stride, TURNED) + d))


@triton.jit
def tile(
    pointers, inside, DIM: tl.constexpr, WIDE: tl.constexpr, CUT: tl.constexpr,
    TURNED: tl.constexpr = False,
):  # fmt: skip
    """The rows' features as `rows` points at them, 0 past DIM and, if CUT, where not inside."""
    known = across(tl.arange(0, WIDE) < DIM, TURNED)
    if CUT:
        if DIM == WIDE:
            return tl.load(pointers, mask=down(inside, TURNED), other=0.0)
        else:
            return tl.load(pointers, mask=down(inside, TURNED) & known, other=0.0)
    else:
        if DIM == WIDE:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=known, other=0.0)


@triton.jit
def both(x, TURNED: tl.constexpr):
    """(rows, WIDE) and (WIDE, rows) of a tile that was loaded as one of them."""
    if TURNED:
        return tl.trans(x), x
    else:
        return x, tl.trans(x)


@triton.jit
def put(pointers, values, inside, DIM: tl.constexpr, WIDE: tl.constexpr):
    d = tl.arange(0, WIDE)
    tl.store(pointers, values, mask=inside[:, None] & (d < DIM)[None, :])


@triton.jit
def span(WholeAt, CutAt, mine, CUT: tl.constexpr):
    """Where the whole tiles of a row of the lists begin and end, or its cut ones."""
    At = CutAt if CUT else WholeAt
    return tl.load(At + mine), tl.load(At + mine + 1)


@triton.jit
def entry(Whole, Cut, at, N: tl.constexpr, CUT: tl.constexpr):
    """Of a tile: its first token, how many there are, its number in the pool, its first bit."""
    if CUT:
        Cut += 4 * at
        return tl.load(Cut), tl.load(Cut + 1), tl.load(Cut + 2), tl.load(Cut + 3)
    else:
        return tl.load(Whole + at), N, -1, 0


@triton.jit
def vector(
    Base, Order, first, offsets, inside, other: tl.constexpr, ORDERED: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """A number of each of the tokens at ``first + offsets``; ``other`` where not inside, if CUT."""
    if ORDERED:
        at = Base + token(Order, first, offsets, inside, ORDERED)
    else:
        at = Base + first + offsets
    if CUT:
        return tl.load(at, mask=inside, other=other)
    else:
        return tl.load(at)


@triton.jit
def allowed(
    Pool,
    number,
    bit,
    count,
    row,
    column,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """bool (rows, columns) of a cut tile: columns short of ``count``, and its bits if it has any.

    Words of wider tiles are read by halves: loads of 32 bits would be taken into the pipeline of
    keys and values, whose buffers and addresses cost a program registers. A tile begins at a
    multiple of its width, so that the compiler knows which word a column has.
    """
    # Not two comparisons and an &: the interpreter makes 32-bit integers of a scalar's.
    rows = tl.where(number >= 0, ROWS, 0)
    at = (number.to(tl.int64) * ROWS + row) * WORDS + bit // 32
    if COLUMNS <= 32:
        word = tl.load(Pool + at, mask=row < rows, other=-1)
        return ((word[:, None] >> (bit % 32 + column)[None, :]) & (column < count)[None, :]) != 0
    else:  # left out for narrow tiles: a compiler goes past a return
        halves = Pool.to(tl.pointer_type(tl.int16)) + 2 * at
        for n in tl.static_range(COLUMNS // 32):
            ok = row < tl.where(bit // 32 + n < WORDS, rows, 0)
            word = tl.load(halves + 2 * n, mask=ok, other=-1).to(tl.int32) & 65535
            word = word | (tl.load(halves + 2 * n + 1, mask=ok, other=-1).to(tl.int32) << 16)
            left = count - 32 * n
            word = word & tl.where(left >= 32, -1, (1 << tl.maximum(left, 0)) - 1)
            shifted = word[:, None] >> (column % 32)[None, :]
            if n == 0:
                found = shifted
            else:
                found = tl.where((column // 32 == n)[None, :], shifted, found)
        return (found & 1) != 0


@triton.jit
def words(Words, atoms, KIND: tl.constexpr):
    """Of query atoms: the low and the high half of what they may read; the low one twice, if the
    words have 32 bits (KIND 1).
    """
    return tl.load(Words + KIND * atoms), tl.load(Words + KIND * atoms + KIND - 1)


@triton.jit
def grouped(low, high, atom, KIND: tl.constexpr):
    """bool: bit ``atom`` of each word; ``high`` is for atoms from 32 on, which KIND 1 has not."""
    found = low >> (atom & 31)
    if KIND == 2:
        found = tl.where(atom < 32, found, high >> (atom & 31))
    return (found & 1) != 0


@triton.jit
def biased(scores, ok, Bias, row, column, row_stride, column_stride, KIND: tl.constexpr):
    """Scores, in powers of two, under the model's own mask: 1 is added to them, 2 tells which."""
    at = (
        Bias + row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    )
    if KIND == 1:
        scores += tl.load(at, mask=ok, other=0.0).to(tl.float32) * 1.4426950408889634
    else:
        scores = tl.where(tl.load(at, mask=ok, other=0) != 0, scores, float("-inf"))
    return scores


@triton.jit
def masked(
    scores, Pool, number, bit, count, row, column, low, high, atom, inside,
    Bias, row_token, column_token, row_stride, column_stride,
    BLOCK: tl.constexpr, WORDS: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr,
    GROUPS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Scores, in powers of two, of the pairs that are on, and -inf of the others: of a cut tile by
    its bits and by groups, of any by the model's own mask.

    row, column: places in the block and in the tile; low, high, atom: two-dimensional, as `grouped`
    takes them; inside: of the rows, where there is a token.
    """
    ok = (column < count)[None, :]
    if CUT:
        ok = allowed(Pool, number, bit, count, row, column, BLOCK, WORDS, N)
        if GROUPS != 0:
            ok = ok & grouped(low, high, atom, GROUPS)
    if BIAS != 0:
        ok = ok & inside[:, None]
        scores = biased(scores, ok, Bias, row_token, column_token, row_stride, column_stride, BIAS)
    if CUT:
        scores = tl.where(ok, scores, float("-inf"))
    return scores
