"""The tiles that a mask is cut into: every pair once, whatever is merged or shared."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from attend_oracle import blocks_of, case, worst
from attend_oracle import softmax as oracle

from attn_control.kernels import attend, explain
from attn_control.kernels.tiles import softmax
from attn_control.kernels.tiles.schedule import dense, schedule
from attn_control.kernels.tiles.scratch import Scratch
from attn_control.masks import BlockMask

REGIONS = {
    "one": {},
    "text": {"q_regions": (64, 5, 40), "k_regions": (5, 64, 40)},
    "long": {"q_regions": (1500,), "k_regions": (700,), "density": 0.9, "block": (64, 32)},
    "sparse": {"q_regions": (500,), "k_regions": (1500,), "density": 0.2},
    "by batch row": {"batch": 2, "shared": (False, False), "heads": 3},
}


def pairs(tiles, batch, head, in_pieces=False):
    """How often each pair is attended to by the tasks of a batch row and head."""
    found = torch.zeros(tiles.rows, tiles.across, dtype=torch.int32)
    scratch = Scratch()
    for group in tiles.of(batch, head):
        for task in group.parts if in_pieces else group.tasks:
            once = torch.ones(len(task.rows), task.across.total, dtype=torch.int32)
            if task.bias is not None:
                bias = task.bias.tensor(scratch)
                assert bias.shape == once.shape
                assert ((bias == 0) | (bias == float("-inf"))).all()
                once = (bias == 0).int()
            rows = torch.arange(task.rows.start, task.rows.stop)
            found[rows[:, None], task.across.index] += once
    return found


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REGIONS)
def test_every_allowed_pair_is_in_one_task(name, dtype, backward):
    x = case(1, **REGIONS[name])
    tiles = schedule(x.plan, dtype, backward)
    for b, h in torch.cartesian_prod(*map(torch.arange, x.dense.shape[:2])).tolist():
        truth = x.dense[b, h].T if backward else x.dense[b, h]
        assert torch.equal(pairs(tiles, b, h), truth.int())


@pytest.mark.parametrize("name", REGIONS)
def test_groups_hold_every_query_once_so_that_workers_never_meet(name):
    x = case(2, **REGIONS[name])
    tiles = schedule(x.plan, torch.float32)
    for groups in (groups for heads in tiles.lists for groups in heads):
        starts = [group.rows.start for group in groups]
        assert starts == [0, *(group.rows.stop for group in groups)][:-1]
        assert groups[-1].rows.stop == tiles.rows
        for group in groups:
            first, *others = group.tasks
            assert first.rows == group.rows
            spans = [(task.rows.start, task.rows.stop) for task in others]
            assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_what_tokens_take_is_what_they_add_back():
    x = case(3, q_regions=(500,), k_regions=(33, 1500, 70), density=0.3)
    tiles = schedule(x.plan, torch.float32)
    values = torch.randn(1603, 4)
    kinds = set()
    for group in tiles.all:
        for across in (task.across for task in group.tasks):
            kinds.add(tuple(sorted({type(part).__name__ for part in across.parts})))
            taken = across.take(values, Scratch(), "x")
            assert torch.equal(taken, values[across.index])
            into = torch.zeros(1603, 4)
            across.add(into, taken)
            assert torch.equal(into[across.index], taken)
            assert into.count_nonzero() == taken.count_nonzero()
    assert ("Blocks",) in kinds and ("Blocks", "Run") in kinds


def test_idle_tokens_are_those_without_a_pair():
    for name in REGIONS:
        x = case(4, **REGIONS[name])
        x.dense[..., -20:] = False
        plan = blocks_of(
            x.dense, x.plan.q_block, x.plan.k_block, x.plan.q_regions, x.plan.k_regions
        )
        queries, keys = schedule(plan, torch.float32).idle
        assert torch.equal(queries, ~x.dense.any(-1)) and torch.equal(keys, ~x.dense.any(-2))
    every = blocks_of(torch.ones(1, 2, 70, 90, dtype=torch.bool), 32, 32)
    assert schedule(every, torch.float32).idle == (None, None)


def test_rows_that_read_the_same_share_a_tile():
    same = torch.ones(1, 1, 1024, 512, dtype=torch.bool)
    same[..., 128:256] = False
    tiles = schedule(blocks_of(same, 128, 128), torch.float32)
    assert len(tiles.all) == 1 and tiles.computed == 0.75
    apart = torch.zeros(1, 1, 1024, 4096, dtype=torch.bool)
    for row in range(8):
        apart[:, :, row * 128 : (row + 1) * 128, row * 512 : (row + 1) * 512] = True
    assert len(schedule(blocks_of(apart, 128, 128), torch.float32).all) == 8


@pytest.fixture
def small_pieces(monkeypatch):
    for name in ("costs", "schedule"):
        monkeypatch.setattr(f"attn_control.kernels.tiles.{name}.PIECE", 1 << 13)


@pytest.mark.parametrize("backward", [False, True])
def test_large_biases_are_made_piece_by_piece(backward, small_pieces):
    x = case(7, q_regions=(500, 41), k_regions=(700,), density=0.9)
    tiles = schedule(x.plan, torch.float32, backward)
    pieces = [part for group in tiles.all for task in group.tasks for part in task.pieces]
    assert pieces and any(part.across.run is None for part in pieces)
    for h in range(x.dense.shape[1]):
        truth = x.dense[0, h].T if backward else x.dense[0, h]
        assert torch.equal(pairs(tiles, 0, h), truth.int())
        assert torch.equal(pairs(tiles, 0, h, in_pieces=True), truth.int())


@pytest.mark.parametrize("masked", [False, True])
def test_pieces_are_one_softmax(masked, small_pieces):
    x = case(8, q_regions=(500, 41), k_regions=(700,), density=0.9)
    inputs = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    mask = torch.arange(700) % 7 > 0 if masked else None
    allowed = x.dense & mask if masked else x.dense
    out, lse = attend(*inputs, x.plan, mask=mask, impl="torch")
    assert any(task.pieces for group in schedule(x.plan, torch.float32).all for task in group.tasks)
    again = [t.detach().double().requires_grad_() for t in inputs]
    expected, expected_lse = oracle(*again, allowed, 0.25)
    assert worst(out, expected) <= 2e-6 and worst(lse, expected_lse) <= 2e-6
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((out * weights).sum(), inputs)
    right = torch.autograd.grad((expected * weights.double()).sum(), again)
    assert all(worst(a, b) <= 5e-6 for a, b in zip(found, right, strict=True))


def test_shared_biases_are_made_once_and_only_so_many_are_kept(monkeypatch):
    band = (torch.arange(2048)[:, None] - torch.arange(2048)).abs() <= 256
    plan = blocks_of(band[None, None], 128, 128)
    tiles = schedule(plan, torch.float32)
    biases = [t.bias for g in tiles.all for t in g.tasks if t.bias is not None]
    assert len({id(bias) for bias in biases}) < len(biases)
    scratch = Scratch()
    often = next(bias for bias in biases if biases.count(bias) > 1)
    assert often.tensor(scratch) is often.tensor(scratch)
    # That of a single tile is kept as soon as its mask is used again.
    assert biases.count(biases[0]) == 1
    biases[0].tensor(scratch)
    first = biases[0].tensor(scratch)
    assert biases[0].tensor(scratch) is first
    monkeypatch.setattr("attn_control.kernels.tiles.bias.KEPT_BYTES", 0)
    anew = schedule(blocks_of(band[None, None], 128, 128), torch.float32)
    bias = next(t.bias for g in anew.all for t in g.tasks if t.bias is not None)
    assert torch.equal(bias.tensor(scratch), first) and bias.tensor(scratch) is not first


def test_a_schedule_is_kept_as_long_as_its_mask():
    plan = case(0).plan
    tiles = schedule(plan, torch.float32)
    assert schedule(plan, torch.float32) is tiles
    assert schedule(plan, torch.float32, backward=True) is not tiles
    gone = weakref.ref(tiles)
    del plan, tiles
    gc.collect()
    assert gone() is None


def test_explain_tells_what_runs():
    x = case(5, q_regions=(1024,), k_regions=(1024,), block=(128, 128), density=0.3)
    choice = explain(x.q, x.k, x.plan)
    assert choice.impl == "torch" and choice.computed == pytest.approx(choice.visited, abs=0.05)
    assert choice.predicted < 0.6 and "predicted" in choice.reason
    assert explain(x.q, x.k).impl == "dense"
    full = blocks_of(torch.ones(1, 1, 1024, 1024, dtype=torch.bool), 128, 128)
    assert explain(x.q, x.k, full).impl == "dense"
    crumbs = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.9
    crumbs = crumbs.repeat_interleave(16, 2).repeat_interleave(16, 3)
    choice = explain(x.q, x.k, blocks_of(crumbs, 16, 16))  # no kernel gains on such blocks
    assert choice.computed > 0.99 and "costs more than it saves" in choice.reason


def test_explain_says_where_skipping_stops_to_pay():
    q = torch.empty(1, 1, 8192, 64)
    for density, pays in ((0.5, True), (0.98, False)):
        table = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)) < density
        mask = BlockMask.from_table(table | torch.eye(64, dtype=torch.bool), q_len=8192)
        choice = explain(q, q, mask)
        assert (choice.predicted < 1) == pays == ("above break-even" not in choice.reason)


def told(tiles, batch, head):
    """Everything that is done for a head."""
    return [
        [(task.rows, task.across.index.tolist(), task.bias is None) for task in group.tasks]
        for group in tiles.of(batch, head)
    ]


@pytest.mark.parametrize("backward", [False, True])
def test_heads_that_are_cut_together_are_cut_as_each_alone(backward, monkeypatch):
    sizes = {"q_regions": (1100, 41), "k_regions": (4100,), "block": (128, 64), "density": 0.9}
    x = case(6, batch=2, shared=(False, False), heads=3, **sizes)
    tiles = schedule(x.plan, torch.float32, backward)
    assert backward or any(len(group.tasks) > 1 for group in tiles.all)
    grid = x.plan.q_block, x.plan.k_block, x.plan.q_regions, x.plan.k_regions
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        alone = blocks_of(x.dense[b : b + 1, h : h + 1], *grid)
        assert told(schedule(alone, torch.float32, backward), 0, 0) == told(tiles, b, h)
    monkeypatch.setattr("attn_control.kernels.tiles.cut.CELLS", 1)
    again = schedule(blocks_of(x.dense, *grid), torch.float32, backward)
    assert all(told(again, b, h) == told(tiles, b, h) for b in range(2) for h in range(3))


def test_attention_without_a_mask_is_one_schedule_of_everything():
    tiles = dense(1500, 70)
    assert torch.equal(pairs(tiles, 0, 0), torch.ones(1500, 70, dtype=torch.int32))
    assert pairs(dense(3, 0), 0, 0).shape == (3, 0)


@pytest.mark.parametrize("biased", [False, True])
def test_the_softmax_written_out_for_other_devices_is_the_kernels(biased):
    g = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(1, 2, 40, 16, generator=g) for _ in range(2))
    k, v = (torch.randn(1, 2, 70, 16, generator=g) for _ in range(2))
    bias = None
    if biased:
        bias = torch.where(torch.rand(40, 70, generator=g) < 0.5, 0.0, float("-inf"))
        bias[5] = float("-inf")
    out, lse = softmax.forward(q, k, v, bias, 0.3)
    other, other_lse = softmax._forward(q, k, v, bias, 0.3)
    assert worst(out, other) <= 1e-6 and worst(lse, other_lse) <= 1e-6
    assert lse[0, 0, 5].isneginf() == biased
    finite = lse.masked_fill(lse.isneginf(), 0)
    kernels = softmax.backward(grad, q, k, v, out, finite, bias, 0.3)
    written = softmax._backward(grad, q, k, v, out, finite, bias, 0.3)
    assert all(worst(a, b) <= 2e-6 for a, b in zip(kernels, written, strict=True))
