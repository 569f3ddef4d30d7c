"""BlockMask: what it derives from its lists, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from masks_by_hand import edges, listed, random_dense

from attn_control import AttnControlError
from attn_control.masks import BlockMask, bits

GRIDS = [
    dict(q_block=16, k_block=32, q_regions=(40, 7), k_regions=(70, 33)),
    dict(q_block=32, k_block=64, q_regions=(100,), k_regions=(64, 5, 64)),
    dict(q_block=24, k_block=32, q_regions=(24,), k_regions=(31,)),
]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_everything_derived_agrees_with_the_tokens(grid, batch):
    dense = random_dense(batch, **grid, batch=batch)
    mask = listed(dense, **grid).validate(rows=False, own=False)
    assert torch.equal(mask.to_dense(), dense)
    assert mask.q_bounds.tolist() == edges(grid["q_regions"], grid["q_block"])
    assert mask.k_bounds.tolist() == edges(grid["k_regions"], grid["k_block"])
    assert (mask.q_len, mask.k_len) == dense.shape[2:]
    assert (mask.batch, mask.heads) == dense.shape[:2]
    assert torch.equal(mask.elements(), dense.sum((-1, -2)))
    assert mask.density() == pytest.approx(float(dense.double().mean()), rel=1e-12)
    visits = torch.zeros_like(dense)
    table = torch.zeros(batch, 2, mask.q_blocks, mask.k_blocks, dtype=torch.bool)
    fully = True
    q, k = mask.q_bounds.tolist(), mask.k_bounds.tolist()
    for row in range(mask.q_blocks):
        for column in range(mask.k_blocks):
            part = dense[:, :, q[row] : q[row + 1], k[column] : k[column + 1]].flatten(2)
            table[:, :, row, column] = part.any(-1)
            fully &= bool((part.all(-1) | ~part.any(-1)).all())
            visits[:, :, q[row] : q[row + 1], k[column] : k[column + 1]] = part.any(-1)[
                ..., None, None
            ]
    assert torch.equal(mask.table, table[0] if batch == 1 else table)
    assert torch.equal(mask.visited(), visits.sum((-1, -2)))
    assert mask.visited_density() == pytest.approx(float(visits.double().mean()), rel=1e-12)
    assert mask.waste() == pytest.approx(float(visits.sum() / dense.sum()), rel=1e-6, nan_ok=True)
    assert mask.is_fully_block_sparse() == fully
    again = BlockMask.from_cells(mask.cells(), mask.pool, **grid)
    assert torch.equal(again.to_dense(), dense) and again.nbytes == mask.nbytes


@pytest.mark.parametrize("shape", [(1, 3, 3), (4, 3, 3), (2, 4, 3, 3)])
def test_from_table_keeps_the_table(shape):
    table = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = BlockMask.from_table(table, block_size=32, q_len=70)
    assert torch.equal(mask.table, table)
    full = table.repeat_interleave(32, -1).repeat_interleave(32, -2)[..., :70, :70]
    assert torch.equal(mask.to_dense(), full if len(shape) == 4 else full[None])
    assert mask.is_fully_block_sparse()
    assert mask.density() == mask.visited_density()


def test_from_table_of_regions_and_rectangles():
    table = torch.tensor([[[True, False, True], [False, True, True]]])
    mask = BlockMask.from_table(table, block_size=(8, 4), q_len=9, k_regions=(5, 2))
    assert mask.k_bounds.tolist() == [0, 4, 5, 7]
    rows = [[1, 1, 1, 1, 0, 1, 1]] * 8 + [[0, 0, 0, 0, 1, 1, 1]]
    assert mask.to_dense()[0, 0].int().tolist() == rows


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(table=torch.ones(3, 3, dtype=torch.bool)), "not bool (3, 3)"),
        (dict(table=torch.ones(1, 3, 3)), "not float32 (1, 3, 3)"),
        (dict(table="all"), "not 'all'"),
        (
            dict(q_len=97),
            "(3, 3) blocks, but regions (97,) x (97,) in blocks of 32 x 32 have (4, 4)",
        ),
        (dict(q_regions=(70,)), "give one of q_len and q_regions"),
        (dict(q_len=None), "give one of q_len and q_regions"),
        (dict(q_len=None, q_regions=(70, 0)), "q_regions=(70, 0)"),
        (dict(block_size=0), "q_block=0 has to be a positive int"),
    ],
)
def test_from_table_refuses(change, said):
    given = dict(table=torch.ones(1, 3, 3, dtype=torch.bool), block_size=32, q_len=70)
    with pytest.raises(AttnControlError) as error:
        BlockMask.from_table(**{**given, **change})
    assert said in str(error.value)


def damaged(**changes) -> BlockMask:
    """A sound mask of 2 x 2 blocks of 32, 20 and 32 keys short, and one thing changed in it."""
    dense = torch.zeros(1, 1, 52, 52, dtype=torch.bool)
    dense[..., :32, :32] = True
    dense[..., 32:, 32:] = torch.eye(20, dtype=torch.bool)
    dense[..., 32:, 5] = True
    mask = listed(dense, 32, 32, (52,), (52,)).validate()
    fields = {name: getattr(mask, name).clone() for name in ("count", "index", "tile", "pool")}
    for name, edit in changes.items():
        fields[name] = edit(fields[name])
    return replace(mask, **fields)


def put(value, *place):
    def edit(tensor):
        tensor[place] = value
        return tensor

    return edit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(count=put(3, 0, 0, 0)), "count of query block 0 is not in 0..2"),
        (dict(count=put(-1, 0, 0, 1)), "count of query block 1"),
        (dict(index=put(2, 0, 0, 1, 1)), "entry 1 of query block 1 is no key block in 0..1"),
        (dict(index=put(-1, 0, 0, 0, 0)), "entry 0 of query block 0 is no key block"),
        (dict(index=lambda t: t.flip(-1)), "query block 1 are not strictly ascending"),
        (dict(index=put(0, 0, 0, 1, 1)), "not strictly ascending after entry 0"),
        (dict(tile=put(2, 0, 0, 1, 1)), "neither -1 nor in a pool of 2"),
        (dict(tile=put(-2, 0, 0, 0, 0)), "neither -1 nor in a pool of 2"),
        (dict(pool=put(0, 0)), "has a tile of zeros"),
        (dict(pool=lambda t: t[[0, 0]]), "holds a tile twice"),
        (dict(pool=put(1, 1, 31, 0)), "past the end of its short block"),
        (dict(pool=put(-1, 1, 3, 0)), "past the end of its short block"),
        (dict(pool=put((1 << 20) - 1, 1, slice(20), 0)), "all on, which has to be listed as -1"),
        (dict(count=put(0, 0, 0, 0)), "query block 0 reads no key block"),
        (dict(count=put(1, 0, 0, 1), pool=put(0, 0, 7)), "query token 39 reads no key"),
        (dict(index=put(1, 0, 0, 0, 0)), "query block 0 does not visit its own key block"),
    ],
)
def test_validate_finds_each_kind_of_damage(changes, said):
    mask = damaged(**changes)
    with pytest.raises(AttnControlError) as error:
        mask.validate()
    assert said in str(error.value), error.value


def test_validate_may_allow_empty_rows_and_no_own_block():
    empty = damaged(count=put(0, 0, 0, 0))
    empty.validate(rows=False, own=False)
    with pytest.raises(AttnControlError, match="own key block"):
        empty.validate(rows=False)
    elsewhere = BlockMask.from_table(~torch.eye(3, dtype=torch.bool)[None], block_size=4, q_len=12)
    elsewhere.validate(own=False)
    # Where queries and keys are not the same tokens, there is no own block.
    BlockMask.from_table(
        ~torch.eye(3, dtype=torch.bool)[None], block_size=(4, 2), q_len=12, k_len=6
    ).validate()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(count=lambda t: t.long()), "count has to be int32 (1, 1, 2), not int64 (1, 1, 2)"),
        (dict(count=lambda t: t[..., :1]), "count has to be int32 (1, 1, 2)"),
        (dict(tile=lambda t: t[..., :1]), "tile has to be int32 (1, 1, 2, 2)"),
        (dict(pool=lambda t: t[:, :16]), "pool has to be int32 (2, 32, 1)"),
        (dict(index=lambda t: t.to("meta")), "index is on meta, count on cpu"),
    ],
)
def test_what_does_not_fit_together_is_refused_at_once(changes, said):
    with pytest.raises(AttnControlError) as error:
        damaged(**changes)
    assert said in str(error.value)


def test_tiles_need_whole_words():
    with pytest.raises(AttnControlError, match="k_block=20 has to be a multiple of 32"):
        listed(torch.eye(40, dtype=torch.bool)[None, None], 20, 20, (40,), (40,))
    listed(torch.ones(1, 1, 40, 40, dtype=torch.bool), 20, 20, (40,), (40,)).validate()


def test_to_dense_refuses_large_masks():
    mask = BlockMask.from_table(torch.ones(1, 300, 300, dtype=torch.bool), q_len=300 * 128)
    with pytest.raises(AttnControlError, match="1 x 1 x 38400 x 38400 = 1474560000 elements"):
        mask.to_dense()
    assert damaged().to_dense(limit=52 * 52).any()
    with pytest.raises(AttnControlError, match="limit=2703"):
        damaged().to_dense(limit=52 * 52 - 1)


def test_shown_in_a_line():
    shown = "BlockMask(1 x 1 lists of 52 x 52 tokens, 2 x 2 blocks of 32 x 32, 2 tiles, cpu)"
    assert repr(damaged()) == shown


def test_to_another_device_and_back():
    mask = damaged()
    assert mask.to("cpu") is mask
    assert mask.to("meta").device.type == "meta"


@pytest.mark.parametrize("keys", [1, 31, 32, 33, 64, 100])
def test_bits_come_back(keys):
    pairs = torch.rand(5, 7, keys, generator=torch.Generator().manual_seed(keys)) < 0.5
    packed = bits.pack(pairs)
    assert packed.dtype == torch.int32 and packed.shape == (5, 7, bits.words(keys))
    assert torch.equal(bits.unpack(packed, keys), pairs)
    assert torch.equal(bits.popcount(packed), pairs.sum((1, 2)))
    for j in range(keys):
        assert torch.equal((packed[..., j // 32] >> (j % 32)) & 1 == 1, pairs[..., j])
