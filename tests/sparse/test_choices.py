"""Masks that are chosen while they run: by explicit maps, head by head."""

from __future__ import annotations

import itertools

import pytest
import tiny_pipelines
import torch
from sparse_shared import SITE, at, softmax_by_hand, tensors, video

from attn_control import attach
from attn_control.kernels.auto import allocate
from attn_control.kernels.by_head import Best
from attn_control.kernels.pieces import Piece, View, execute
from attn_control.kernels.sampled import errors, evenly
from attn_control.kernels.sparse import Where
from attn_control.masks import BlockMask
from attn_control.masks.place import Place
from attn_control.policy import DENSE, REFRESH, SPARSE, StepPolicy
from attn_control.processors import AutoSparse, SelectedAttention, SpatialTemporalAttention

WHERE = Where(SITE, at(3), "cond")


def block_mask(seed: int) -> BlockMask:
    """Three of six blocks a row, so that no mask is better for being denser."""
    g = torch.Generator().manual_seed(seed)
    best = torch.rand(1, 6, 6, generator=g).topk(3).indices
    table = torch.zeros(1, 6, 6, dtype=torch.bool).scatter_(-1, best, True)
    return BlockMask.from_table(table, block_size=16, q_len=96)


def view(rows: int = 2, heads: int = 3, keys: torch.Tensor | None = None) -> View:
    return View(*tensors(rows=rows, heads=heads), keys, 8**-0.5)


def candidates() -> tuple[Piece, ...]:
    order = torch.randperm(96, generator=torch.Generator().manual_seed(5))
    return Piece(block_mask(0)), Piece(block_mask(1), order), Piece(block_mask(2))


def dense_of(piece: Piece) -> torch.Tensor:
    """bool (tokens, tokens) in raster order."""
    on = piece.mask.to_dense()[0, 0]
    if piece.order is None:
        return on
    raster = torch.zeros_like(on)
    raster[piece.order[:, None], piece.order] = on
    return raster


def test_errors_are_those_of_the_masked_rows():
    seen, queries = view(), evenly(0, 96, 10, torch.device("cpu"))
    found = errors(seen, queries, candidates())
    plain, _ = softmax_by_hand(seen.q, seen.k, seen.v, torch.ones(96, 96))
    for number, piece in enumerate(candidates()):
        out, _ = softmax_by_hand(seen.q, seen.k, seen.v, dense_of(piece))
        gap = (out - plain)[:, :, queries].square().sum((-1, -2))
        expected = gap / plain[:, :, queries].square().sum((-1, -2))
        torch.testing.assert_close(found[..., number].double(), expected, rtol=1e-4, atol=1e-6)


def test_padding_counts_for_nothing():
    keys = torch.ones(2, 1, 1, 96, dtype=torch.bool)
    keys[1, ..., 80:] = False
    seen, queries = view(keys=keys), evenly(0, 96, 10, torch.device("cpu"))
    bool_errors = errors(seen, queries, candidates())
    changed = seen.v.clone()
    changed[1, :, 80:] = 1e6
    assert torch.equal(errors(View(seen.q, seen.k, changed, keys, 8**-0.5), queries, candidates()),
                       bool_errors)  # fmt: skip
    added = torch.zeros(keys.shape).masked_fill(~keys, -1e9)
    added_errors = errors(View(seen.q, seen.k, seen.v, added, 8**-0.5), queries, candidates())
    torch.testing.assert_close(added_errors, bool_errors)


def test_each_head_of_each_row_runs_under_its_best_mask():
    seen, made = view(), candidates()
    queries = torch.arange(96)
    pieces = Best(made, queries, keeps=True).pieces(seen, WHERE)
    plain, _ = softmax_by_hand(seen.q, seen.k, seen.v, torch.ones(96, 96))
    outs = torch.stack(
        [softmax_by_hand(seen.q, seen.k, seen.v, dense_of(piece))[0] for piece in made]
    )
    best = (outs - plain).square().sum((-1, -2)).argmin(0)
    expected = outs.gather(0, best[None, ..., None, None].expand_as(outs[:1]))[0]
    assert len(set(best.flatten().tolist())) > 1, "the case has to have a choice"
    out, lse = execute(pieces, seen, need_lse=True)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert lse is not None and bool(lse.isfinite().all())


def test_sparse_videogens_masks():
    """Bands of one density: in raster order, with the first frame, and along time first."""
    place = Place((8, 8, 8), before=2, after=3)
    near, along = SpatialTemporalAttention(target_density=0.6).pattern(place, "cpu").candidates
    bare = SpatialTemporalAttention(target_density=0.6, sink=False).pattern(place, "cpu")
    first = slice(2, 2 + 64)
    assert bool(dense_of(near)[:, first].all())
    assert not bool(dense_of(bare.candidates[0])[:, first].all())
    on, middle = dense_of(along), 2 + 3 * 64 + 3 * 8 + 3
    frames = on[middle, 2:-3].view(8, 64)
    assert bool(frames[:, 27].all()), "its own place is read in every frame"
    assert not bool(frames.all()) and bool(on[0].all()) and bool(on[:, -1].all())
    assert bool(dense_of(near)[middle, middle - 9 : middle + 10].all())
    for piece in (near, along):
        assert 0.4 < piece.computed <= 0.6


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.35, 0.6, 1.0])
def test_one_price_is_as_good_as_trying_everything(budget):
    """Along the lower hull of each head the optimum of a price is the optimum of its own cost."""
    g = torch.Generator().manual_seed(1)
    costs = torch.tensor([0.1, 0.2, 0.4, 1.0], dtype=torch.float64).repeat(5, 1)
    lost = torch.rand(5, 4, generator=g, dtype=torch.float64) * torch.tensor([1.0, 0.5, 0.25, 0.0])
    chosen = allocate(lost, costs, budget)
    spent = float(costs.gather(-1, chosen[:, None]).mean())
    assert spent <= max(budget, 0.1) + 1e-12
    error = float(lost.gather(-1, chosen[:, None]).sum())
    for other in itertools.product(range(4), repeat=5):
        index = torch.tensor(other)[:, None]
        if float(costs.gather(-1, index).mean()) <= spent + 1e-12:
            assert error <= float(lost.gather(-1, index).sum()) + 1e-9


def test_blocks_are_those_with_most_attention():
    """With all queries asked, a head's kept blocks are the top ones of the dense map."""
    pipe, call = video(steps=4, size=128)
    call |= {"num_frames": 17}
    policy = StepPolicy(first=1, refresh=None)
    control = SelectedAttention("L0", keep=0.3, score="exact", order="raster", policy=policy)
    with attach(pipe, control) as session:
        tiny_pipelines.render(pipe, call)
        memory = session._denoisers[0].phases.records.memory
        masks = {key[1][-1]: kept.extra[0].mask for key, kept in memory._kept.items()}
    assert masks.keys() == {"cond", "uncond"}
    for mask in masks.values():
        kept = mask.table.sum(-1)
        # 5 frames of 64 tokens are 10 blocks of 32: three, and the query's own.
        assert mask.table.shape == (2, 10, 10) and int(kept.min()) >= 3 and int(kept.max()) <= 4
        assert bool(mask.table.diagonal(dim1=-2, dim2=-1).all())


def test_auto_measures_in_the_last_dense_step_and_keeps_to_the_budget():
    pipe, call = video(steps=8, size=128)
    call |= {"num_frames": 17}
    control = AutoSparse(target_density=0.4, policy=StepPolicy(first=3, refresh=4))
    with attach(pipe, control, strict=True) as session:
        tiny_pipelines.render(pipe, call)
    rows = session._entries[0][0].ledger.rows
    by_step = {index: [row for row in rows if row.index == index] for index in range(8)}
    assert [by_step[n][0].outcome for n in range(8)] == [
        *[DENSE] * 3, REFRESH, *[SPARSE] * 3, REFRESH,
    ]  # fmt: skip
    assert all(row.computed == 1 for row in by_step[1])
    assert all(row.computed > 1 for row in by_step[2]), "measuring is work, and is booked"
    for branch in ("cond", "uncond"):
        spent = [row.computed for row in by_step[4] if row.branch == branch]
        # A query's own block may come on top of what was measured at another step.
        assert len(spent) == 2 and 0.2 < sum(spent) / 2 <= 0.4 + 0.06


def test_auto_without_a_dense_step_still_acts():
    pipe, call = video(steps=4, size=128)
    control = AutoSparse(target_density=0.5, policy=StepPolicy(first=0, refresh=2))
    with attach(pipe, control, strict=True) as session:
        first, second = (tiny_pipelines.render(pipe, call) for _ in range(2))
    assert torch.equal(first, second)
    outcomes = session.report().controls[0].outcomes
    assert outcomes == {"refresh": 16, "sparse": 16}
