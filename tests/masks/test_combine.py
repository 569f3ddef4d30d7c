"""Masks from masks, on random grids and random pairs, against the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks_by_hand import edges, listed, random_dense

from attn_control import AttnControlError
from attn_control.masks import BlockMask, per_head

regions = st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple)
grids = st.fixed_dictionaries(
    dict(
        q_block=st.sampled_from([16, 32, 48]),
        k_block=st.sampled_from([32, 64]),
        q_regions=regions,
        k_regions=regions,
    )
)
seeds = st.integers(0, 1 << 30)
sizes = st.sampled_from([1, 2])
quick = settings(max_examples=15, deadline=None)


@quick
@given(grids, seeds, sizes, sizes, sizes, sizes)
def test_union_and_intersection_are_exact(grid, seed, batch, heads, other_batch, other_heads):
    x = random_dense(seed, **grid, batch=batch, heads=heads)
    y = random_dense(seed + 1, **grid, batch=other_batch, heads=other_heads)
    a, b = listed(x, **grid), listed(y, **grid)
    for made, dense in ((a | b, x | y), (a & b, x & y)):
        made.validate(rows=False, own=False)
        assert torch.equal(made.to_dense(), dense)
    assert torch.equal((a | a).to_dense(), x) and torch.equal((a & a).to_dense(), x)


@quick
@given(grids, seeds, seeds)
def test_a_union_never_loses_mass(grid, seed, other):
    dense = random_dense(seed, **grid)
    a, b = listed(dense, **grid), listed(random_dense(other, **grid), **grid)
    scores = torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed % 1000))
    weights = scores.softmax(-1)
    kept = [(weights * mask.to_dense()).sum(-1) for mask in (a, b, a | b)]
    assert (kept[2] >= kept[0]).all() and (kept[2] >= kept[1]).all()
    assert ((a | b).elements() >= torch.maximum(a.elements(), b.elements())).all()


@quick
@given(grids, seeds)
def test_transposed_twice_is_the_same(grid, seed):
    grid = {**grid, "q_block": 32}  # tiles of the transposed mask need whole words
    dense = random_dense(seed, **grid)
    mask = listed(dense, **grid)
    turned = mask.transpose().validate(rows=False, own=False)
    assert torch.equal(turned.to_dense(), dense.mT)
    back = turned.transpose()
    assert back.grid == mask.grid
    for name in ("count", "index", "tile", "pool"):
        assert torch.equal(getattr(back, name), getattr(mask, name))


@quick
@given(grids, seeds, st.integers(1, 3), st.integers(1, 3))
def test_coarser_blocks_are_an_or(grid, seed, q, k):
    dense = random_dense(seed, **grid)
    mask = listed(dense, **grid)
    coarse = mask.coarsen(q, k).validate(rows=False, own=False)
    assert coarse.is_fully_block_sparse()
    rows = edges(grid["q_regions"], grid["q_block"] * q)
    columns = edges(grid["k_regions"], grid["k_block"] * k)
    for i, (top, bottom) in enumerate(zip(rows, rows[1:], strict=False)):
        for j, (left, right) in enumerate(zip(columns, columns[1:], strict=False)):
            visited = dense[:, :, top:bottom, left:right].flatten(2).any(-1)[0]
            assert torch.equal(coarse.table[:, i, j], visited)


@quick
@given(grids, grids, seeds)
def test_another_grid_has_the_same_pairs(grid, other, seed):
    dense = random_dense(seed, **grid, batch=2)
    mask = listed(dense, **grid)

    def refit(runs, length):  # the other grid's regions, cut or filled to this length
        kept, left = [], length
        for run in runs:
            kept.append(min(run, left))
            left -= kept[-1]
        return tuple(n for n in (*kept, left) if n)

    made = mask.regrid(
        q_block=other["q_block"],
        k_block=other["k_block"],
        q_regions=refit(other["q_regions"], mask.q_len),
        k_regions=refit(other["k_regions"], mask.k_len),
    ).validate(rows=False, own=False)
    assert torch.equal(made.to_dense(), dense)
    assert torch.equal(mask.regrid().to_dense(), dense)


GRID = dict(q_block=32, k_block=32, q_regions=(50,), k_regions=(50,))


def test_halves_make_wholes_and_nothings():
    """Tiles that become all on, as far as their block goes, are listed as whole; of zeros, not."""
    half = torch.rand(1, 1, 50, 50, generator=torch.Generator().manual_seed(3)) < 0.5
    a, b = listed(half, **GRID), listed(~half, **GRID)
    union, both = (a | b).validate(), a & b
    assert union.is_fully_block_sparse() and union.density() == 1 and not len(union.pool)
    assert not both.count.any() and not len(both.pool)
    # One tile on two blocks: it fills the short one, and the other in part.
    strip = torch.zeros(1, 1, 32, 50, dtype=torch.bool)
    strip[..., :18] = strip[..., 32:] = True
    grid = {**GRID, "q_regions": (32,)}
    odd = torch.arange(50) % 2 == 0
    union = listed(strip & odd, **grid) | listed(strip & ~odd, **grid)
    assert union.tile[0, 0, 0].tolist() == [0, -1]
    assert torch.equal(union.validate(own=False).to_dense(), strip)


def test_a_mask_for_each_head():
    denses = [random_dense(seed, **GRID, heads=seed) for seed in (1, 2, 1)]
    made = per_head([listed(dense, **GRID) for dense in denses])
    assert torch.equal(made.to_dense(), torch.cat(denses, 1))
    made.validate(rows=False, own=False)  # the first and the last are one mask: tiles once
    batched = random_dense(9, **GRID, batch=3, heads=1)
    made = per_head([listed(denses[0], **GRID), listed(batched, **GRID)])
    assert torch.equal(made.to_dense(), torch.cat([denses[0].expand(3, -1, -1, -1), batched], 1))
    with pytest.raises(AttnControlError, match=r"batches \[2, 3\] do not combine"):
        two = listed(random_dense(9, **GRID, batch=2), **GRID)
        per_head([listed(batched, **GRID), two])
    with pytest.raises(AttnControlError, match="at least one mask"):
        per_head([])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(q_regions=(40, 10)), "q regions (50) of 50 tokens in blocks of 32 and (40, 10)"),
        (dict(k_regions=(49,)), "k regions (50) of 50 tokens in blocks of 32 and (49)"),
        (dict(k_block=64), "in blocks of 64"),
    ],
)
def test_masks_of_two_grids_do_not_combine(change, said):
    a = listed(random_dense(1, **GRID), **GRID)
    grid = {**GRID, **change}
    b = listed(random_dense(1, **grid), **grid)
    for combine in (a.__or__, a.__and__, lambda b: per_head([a, b])):
        with pytest.raises(AttnControlError) as error:
            combine(b)
        assert said in str(error.value)


def test_regions_may_be_named_otherwise_if_the_blocks_are_the_same():
    table = torch.eye(4, dtype=torch.bool)[None]
    a = BlockMask.from_table(table, block_size=8, q_len=30)
    b = BlockMask.from_table(~table, block_size=8, q_regions=(16, 14))
    assert (a | b).density() == 1 and (a & b).density() == 0


def test_heads_that_do_not_broadcast_are_refused():
    a, b = (listed(random_dense(1, **GRID, heads=heads), **GRID) for heads in (2, 3))
    with pytest.raises(AttnControlError, match="heads 2 and 3 do not combine"):
        a | b


def test_regrid_and_coarsen_refuse():
    mask = listed(random_dense(1, **GRID), **GRID)
    with pytest.raises(AttnControlError, match="are 49 tokens, the mask has 50"):
        mask.regrid(q_regions=(40, 9))
    for factor in (0, True, 1.5):
        with pytest.raises(AttnControlError, match="has to be a positive int"):
            mask.coarsen(factor)
    with pytest.raises(TypeError):
        mask | 3
