"""The lists that the kernels walk, put together again pair by pair. Plain torch: no triton."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attend_oracle import blocks_of, case

from attn_control.kernels.triton.lists import STEPS, lower, turned
from attn_control.kernels.triton.tune import side, tiles, wide

SHAPES = {
    "ragged": {},
    "two masks a row": {"batch": 2, "shared": (False, False)},
    "text regions": {"q_regions": (96, 7, 96), "k_regions": (13, 150, 33)},
    "wide blocks": {"block": (64, 128), "k_regions": (300, 77)},
    "few keys": {"k_regions": (5,)},
    "sizes that are no power of two": {"block": (24, 96), "density": 0.7},
}


def pairs(lists, width, batch, heads, shape):
    """int (batch, heads, *shape): how often each pair is listed."""
    seen = np.zeros((batch * heads, *shape), np.int32)
    bits = np.unpackbits(lists.pool.numpy().view(np.uint8), axis=-1, bitorder="little")
    bounds, whole, cut = lists.bounds.tolist(), lists.whole.tolist(), lists.cut.tolist()
    blocks = len(bounds) - 1
    for row in range(batch * heads * blocks):
        owner, block = divmod(row, blocks)
        rows = slice(bounds[block], bounds[block + 1])
        for start in whole[lists.whole_at[row] : lists.whole_at[row + 1]]:
            seen[owner, rows, start : start + width] += 1
        for start, columns, number, bit in cut[lists.cut_at[row] : lists.cut_at[row + 1]]:
            assert 0 < columns <= width
            piece = seen[owner, rows, start : start + columns]
            piece += bits[number, : len(piece), bit : bit + columns] if number >= 0 else 1
    return torch.from_numpy(seen).view(batch, heads, *shape)


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_pair_that_is_on_is_listed_once(shape, width):
    x = case(1, **{"q_regions": (70,), "k_regions": (100,), **SHAPES[shape]})
    seen = pairs(lower(x.plan, width), width, *x.dense.shape[:2], x.dense.shape[2:])
    assert torch.equal(seen, x.dense.int())


@pytest.mark.parametrize("block", [(32, 32), (16, 64), (64, 32)])
def test_turned_lists_hold_the_same_pairs(block):
    x = case(2, q_regions=(40, 50), k_regions=(100,), block=block)
    mask = turned(x.plan)
    seen = pairs(lower(mask, 32), 32, *x.dense.shape[:2], x.dense.mT.shape[2:])
    assert torch.equal(seen, x.dense.mT.int())


def test_bits_are_looked_at_again_at_the_kernels_width():
    dense = torch.zeros(1, 1, 64, 128, dtype=torch.bool)
    dense[..., :64], dense[..., 5, 100] = True, True
    lists = lower(blocks_of(dense, 64, 128), 32)
    assert lists.whole.tolist() == [0, 32]  # a half of the only block, all on
    assert lists.cut.tolist() == [[96, 32, 0, 96]]  # and of the other half what has a pair


def test_the_longest_come_first_and_equals_keep_their_places():
    x = case(3, q_regions=(700,), k_regions=(800,), block=(32, 32), density=0.5)
    lists = lower(x.plan, 32)
    length = lists.whole_at.diff() + lists.cut_at.diff()
    assert sorted(lists.order.tolist()) == list(range(len(length)))
    step = length[lists.order.long()] * STEPS // int(length.max())
    assert (step.diff() <= 0).all() and len(step.unique()) > 2
    for level in step.unique():
        assert (lists.order[step == level].diff() > 0).all()


def test_heads_that_share_keys_are_ordered_by_their_sum():
    dense = torch.zeros(1, 4, 64, 96, dtype=torch.bool)
    dense[0, 0, :32], dense[0, 1, 32:], dense[0, 2], dense[0, 3, :, :32] = True, True, True, True
    lists = lower(blocks_of(dense, 32, 32), 32, group=2)
    # Pairs of heads: rows of 3 and 3 tiles, then of 3 + 1 and 3 + 1.
    assert lists.order.tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize("dim", [8, 24, 40, 64, 72, 128, 160, 256])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("biased", [False, True])
def test_tile_sizes_are_what_tl_dot_takes(dim, half, target, biased):
    assert wide(dim) >= dim and wide(dim) & (wide(dim) - 1) == 0
    for tile, bare in zip(tiles(dim, half, target, biased), tiles(dim, half, target), strict=True):
        assert (tile.m, tile.n) == (bare.m, bare.n) or biased
        assert tile.m <= bare.m and tile.n <= (32 if biased and half else bare.n)
        assert all(n >= 16 and n & (n - 1) == 0 for n in (tile.m, tile.n))
        assert tile.warps in (4, 8, 16) and tile.stages >= 1
        assert target != "gfx942" or tile.stages == 1


@pytest.mark.parametrize(
    ("block", "most", "expected"),
    [(128, 64, 64), (64, 128, 64), (96, 64, 32), (16, 64, 16), (24, 64, 32), (5, 64, 16)],
)
def test_tiles_fit_blocks(block, most, expected):
    assert side(block, most) == expected
