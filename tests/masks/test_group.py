"""GroupMask against its rules, pair by pair."""

from __future__ import annotations

import pytest
import torch

from attn_control.errors import AttnControlError
from attn_control.masks import BlockMask, GroupMask
from attn_control.masks.columns import columns

READS = [[True, False, True], [False, False, False], [False, True, True], [True, True, True]]


def drawn(seed, queries, keys, batch=(1, 1), run=1):
    """A mask in runs of ``run`` tokens of one atom, and bool (batch, 1, queries, keys)."""
    g = torch.Generator().manual_seed(seed)
    sides = []
    for rows, tokens, atoms in zip(batch, (queries, keys), (4, 3), strict=True):
        runs = torch.randint(atoms, (rows, -(-tokens // run)), generator=g)
        sides.append(runs.repeat_interleave(run, dim=1)[:, :tokens])
    rows = max(batch)
    truth = torch.zeros(rows, 1, queries, keys, dtype=torch.bool)
    for b in range(rows):
        a, c = (side[b % len(side)].tolist() for side in sides)
        truth[b, 0] = torch.tensor([[READS[i][j] for j in c] for i in a])
    mask = GroupMask.from_table(torch.tensor(READS), *(side.to(torch.int8) for side in sides))
    return mask, truth


def blocks(seed, queries, keys, size):
    g = torch.Generator().manual_seed(seed)
    table = torch.rand(2, -(-queries // size), -(-keys // size), generator=g) < 0.7
    return BlockMask.from_table(table, block_size=size, q_len=queries, k_len=keys)


@pytest.mark.parametrize("run", [1, 50])
@pytest.mark.parametrize("batch", [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_the_same_pairs_in_every_form(batch, run):
    mask, truth = drawn(1, 300, 170, batch, run)
    assert torch.equal(mask.to_dense(), truth)
    mask.lowered.validate(rows=False, own=False)
    assert torch.equal(mask.lowered.to_dense(), truth)
    assert mask.density() == pytest.approx(truth.double().mean().item(), abs=1e-12)
    keys = torch.tensor([169, 0, 33, 0])
    assert torch.equal(columns(mask, keys), truth[..., keys])
    assert torch.equal(columns(mask.lowered, keys), truth[..., keys])


@pytest.mark.parametrize("size", [32, 24])
def test_within_blocks(size):
    mask, truth = drawn(2, 130, 100, (2, 1))
    for both in (mask & blocks(3, 130, 100, size), blocks(3, 130, 100, size) & mask):
        assert isinstance(both, GroupMask) and (both.batch, both.heads) == (2, 2)
        dense = truth & both.blocks.to_dense()
        assert torch.equal(both.to_dense(), dense) and torch.equal(both.lowered.to_dense(), dense)
        assert both.density() == pytest.approx(dense.double().mean().item(), abs=1e-12)
        keys = torch.tensor([99, 1])
        assert torch.equal(columns(both, keys), dense[..., keys])
    again = both & blocks(4, 130, 100, size)
    assert torch.equal(again.to_dense(), dense & blocks(4, 130, 100, size).to_dense())


@pytest.mark.parametrize("batch", [(1, 1), (2, 1), (1, 3)])
def test_sorted_by_atom(batch):
    mask, truth = drawn(5, 300, 270, batch)
    found, q_order, k_order = mask.sorted
    dense = found.to_dense().expand(len(truth), 1, 300, 270)
    for b in range(len(truth)):
        rows, columns = (order[b % len(order)] for order in (q_order, k_order))
        assert torch.equal(dense[b, 0], truth[b, 0][rows][:, columns])
    again = drawn(5, 30, 27)[0]
    still = GroupMask(*(x.sort(-1)[0] for x in (again.q_atom, again.k_atom)), again.allow)
    assert still.sorted.q_order is None and still.sorted.k_order is None


def test_sorted_tokens_leave_blocks_out():
    """One in eight pairs is on."""
    atoms = torch.arange(2048, dtype=torch.int16) % 8
    mask = GroupMask(atoms, atoms, 1 << torch.arange(8))
    assert mask.lowered.visited_density() == 1.0
    assert mask.sorted.mask.visited_density() == 1 / 8 == mask.density()
    assert mask.sorted.mask.is_fully_block_sparse()


def test_all_64_bits():
    atoms = torch.arange(64, dtype=torch.int16)
    words = torch.tensor([1 << 63, 1, (1 << 64) - 1], dtype=torch.uint64)
    mask = GroupMask(torch.tensor([0, 1, 2], dtype=torch.int8), atoms, words)
    on = mask.to_dense()[0, 0]
    assert on[0].nonzero().flatten().tolist() == [63] and on[1].nonzero().tolist() == [[0]]
    assert on[2].all() and torch.equal(mask.lowered.to_dense()[0, 0], on)


def test_equal_blocks_share_their_tiles():
    """Four frames with one subject in each: tiles of one frame and its rest, however many."""
    frame = torch.tensor([0] * 128 + [1] * 64 + [0] * 64, dtype=torch.int16)
    mask = GroupMask(frame.repeat(4), frame.repeat(4), torch.tensor([1, 2]))
    assert len(mask.lowered.pool) == 3  # rest by subject's block, its transpose, and both


short = torch.int16
WRONG = {
    "k_atom of token 2 is 64, not in 0..63": dict(k_atom=torch.tensor([0, 1, 64], dtype=short)),
    "q_atom of token 0 is 2, not in 0..1: allow has 2": dict(q_atom=torch.tensor([2], dtype=short)),
    "q_atom of token 1 is -1": dict(q_atom=torch.tensor([0, -1], dtype=short)),
    "expected q_atom as int8 or int16": dict(q_atom=torch.tensor([0])),
    "expected allow as int64 or uint64": dict(allow=torch.tensor([1], dtype=torch.int32)),
    "batches do not combine": dict(
        q_atom=torch.zeros(2, 3, dtype=short), k_atom=torch.zeros(3, 3, dtype=short)
    ),
    "blocks are for 100 queries and 3 keys": dict(blocks=blocks(0, 100, 3, 32)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_refused(message):
    zeros = torch.zeros(3, dtype=torch.int16)
    given = dict(q_atom=zeros, k_atom=zeros, allow=torch.tensor([1, 1]))
    with pytest.raises(AttnControlError, match=message):
        GroupMask(**{**given, **WRONG[message]})


def test_a_table_of_too_many_atoms_is_refused():
    zeros = torch.zeros(3, dtype=torch.int16)
    with pytest.raises(AttnControlError, match="at most 64 atoms of keys"):
        GroupMask.from_table(torch.ones(1, 65, dtype=torch.bool), zeros, zeros)


def test_a_dense_mask_that_is_too_large_is_refused():
    mask, _ = drawn(1, 300, 170)
    with pytest.raises(AttnControlError, match="more than limit=1000"):
        mask.to_dense(limit=1000)
