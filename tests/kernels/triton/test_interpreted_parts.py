"""Parts of the kernels that a mask has to be made for to be seen at all."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from attend_oracle import softmax, worst

from attn_control.kernels.triton.parts import allowed
from attn_control.kernels.triton.run import attend_triton
from attn_control.masks import bits


@triton.jit
def shown(Pool, Out, number, bit, count, ROWS: tl.constexpr, WORDS: tl.constexpr, N: tl.constexpr):
    """Out: bool (ROWS, N), what `allowed` says of a cut tile."""
    row, column = tl.arange(0, ROWS), tl.arange(0, N)
    ok = allowed(Pool, number, bit, count, row, column, ROWS, WORDS, N)
    tl.store(Out + row[:, None] * N + column[None, :], ok.to(tl.int8))


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_bits_of_every_tile_of_a_block(width):
    """Blocks of 112 columns: whole tiles, a short last one, one that begins within a word."""
    on = torch.rand(3, 32, 112, generator=torch.Generator().manual_seed(1)) < 0.5
    pool = bits.pack(on)
    for number, begin in [(0, 0), (2, 0), *((1, n) for n in range(0, 112, width))]:
        for count in {min(width, 112 - begin), 5}:
            out = torch.zeros(32, width, dtype=torch.int8)
            shown[(1,)](pool, out, number, begin, count, 32, pool.shape[2], width)
            expected = torch.zeros(32, width, dtype=torch.bool)
            expected[:, :count] = on[number, :, begin : begin + count]
            assert torch.equal(out.bool(), expected), (number, begin, count)


def test_a_tile_without_bits_is_cut_by_its_columns_alone():
    out = torch.zeros(16, 32, dtype=torch.int8)
    shown[(1,)](torch.zeros(1, 16, 1, dtype=torch.int32), out, -1, 0, 19, 16, 1, 32)
    assert bool(out[:, :19].all()) and not bool(out[:, 19:].any())


def test_scores_as_low_as_float32_goes():
    """A mask of the model's that adds nearly the lowest number there is, to all of a row: its
    weights are equal, as they are in a dense softmax. -inf to all of a row: nothing is read.
    """
    q, k, v = torch.randn(3, 1, 1, 64, 16, generator=torch.Generator().manual_seed(2))
    added = torch.zeros(1, 1, 64, 64)
    added[..., 3, :], added[..., 5, :] = -2.3e38, float("-inf")
    out, lse = attend_triton(q, k, v, None, added, 0.25)
    assert worst(out[:, :, 3], v.mean(2)) <= 1e-6
    assert not bool(out[:, :, 5].any()) and bool((lse[:, :, 5] == float("-inf")).all())
    others = [n for n in range(64) if n not in (3, 5)]
    expected, mass = softmax(q, k, v, torch.ones(1, 1, 64, 64, dtype=torch.bool), 0.25)
    assert worst(out[:, :, others], expected[:, :, others]) <= 2e-6
    assert worst(lse[:, :, others], mass[:, :, others]) <= 2e-6
