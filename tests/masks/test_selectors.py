"""Selectors against the attention that they estimate, computed densely in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks_by_hand import edges

from attn_control import AttnControlError
from attn_control.masks import Grid, sink_mask, text_mask
from attn_control.masks.selectors import (
    Blocks,
    PerHead,
    PerRegion,
    Sampled,
    Threshold,
    TopK,
    TopP,
    cluster_order,
    exact_pooled,
    mean_pooled,
    min_max_bound,
    scores,
    select_blocks,
    select_clusters,
)

Q = Grid((100,), 16, after=7)
K = Grid((75,), 32, before=5)


def tensors(seed=0, batch=2, heads=4, kv_heads=2, q_len=Q.length, k_len=K.length, dim=8):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, q_len, dim, generator=g)
    return q * 2, torch.randn(batch, kv_heads, k_len, dim, generator=g)


def parts(grid):
    bounds = edges(grid.regions, grid.block)
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def pairs(q, k):
    """Of each pair of blocks: (row, column), all scaled scores in float64, both slices."""
    k = torch.stack([k[:, h // (q.shape[1] // k.shape[1])] for h in range(q.shape[1])], 1)
    dots = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) / q.shape[-1] ** 0.5
    for row, i in enumerate(parts(Q)):
        for column, j in enumerate(parts(K)):
            yield (row, column), dots, i, j


@dataclass
class Spy:
    """Keeps the scores that a selector is given."""

    def keep(self, given, k_blocks):
        self.given = given
        return torch.ones_like(given, dtype=torch.bool)


def scored(score, q, k) -> torch.Tensor:
    spy = Spy()
    select_blocks(q, k, spy, score=score, grid=Q, k_grid=K)
    assert spy.given.dtype == torch.float32
    return spy.given.double()


@pytest.fixture(params=[1024, 13])
def rows_at_once(request, monkeypatch):
    """Whether the queries fit into one chunk must make no difference."""
    monkeypatch.setattr(scores, "ROWS", request.param)


def test_mean_pooled_is_the_score_of_means():
    q, k = tensors()
    found = scored(mean_pooled, q, k)
    for (row, column), dots, i, j in pairs(q, k):
        expected = dots[:, :, i, j].mean((2, 3)) + torch.tensor(j.stop - j.start).log()
        torch.testing.assert_close(found[:, :, row, column], expected, atol=1e-5, rtol=0)


def test_min_max_bound_is_one(rows_at_once):
    q, k = tensors()
    found = scored(min_max_bound, q, k)
    keys = k.repeat_interleave(2, 1).double() / q.shape[-1] ** 0.5
    for (row, column), dots, i, j in pairs(q, k):
        bound = found[:, :, row, column] - torch.tensor(j.stop - j.start).log()
        assert (bound >= dots[:, :, i, j].amax((2, 3)) - 1e-5).all()
        extremes = torch.stack([keys[:, :, j].amin(2), keys[:, :, j].amax(2)])[:, :, :, None]
        best = (q[:, :, i].double() * extremes).amax(0).sum(-1).amax(-1)
        torch.testing.assert_close(bound, best, atol=1e-5, rtol=0)


def test_exact_pooled_is_the_attention(rows_at_once):
    q, k = tensors()
    found = scored(exact_pooled, q, k).exp()
    for (row, column), dots, i, j in pairs(q, k):
        mass = dots.softmax(-1)[:, :, i, j].sum(-1).mean(-1)
        torch.testing.assert_close(found[:, :, row, column], mass, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


def test_sampled_is_the_attention_of_some_queries(rows_at_once):
    q, k = tensors()
    assert torch.equal(scored(Sampled(16), q, k), scored(exact_pooled, q, k))
    assert torch.equal(scored(Sampled(999), q, k), scored(exact_pooled, q, k))
    found = scored(Sampled(2), q, k).exp()
    for (row, column), dots, i, j in pairs(q, k):
        count = i.stop - i.start  # a quarter and three quarters into the block
        asked = [i.start + n * count // 4 for n in (1, 3)]
        mass = dots.softmax(-1)[:, :, asked, j].sum(-1).mean(-1)
        torch.testing.assert_close(found[:, :, row, column], mass, atol=1e-6, rtol=0)


def some(seed, heads=3, blocks=9):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, 5, blocks, generator=g) * 3


EVEN = Blocks.of(Grid((9 * 16,), 16), torch.device("cpu"))
budgets = st.one_of(
    st.integers(1, 12).map(TopK),
    st.floats(0.01, 1).map(TopK),
    st.builds(TopP, st.floats(0.01, 1), st.integers(1, 9)),
    st.floats(0.01, 1).map(Threshold),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), budgets)
def test_every_row_keeps_its_best(seed, budget):
    given_ = some(seed)
    kept = budget.keep(given_, EVEN)
    assert kept.shape == given_.shape and kept.any(-1).all()
    worst_kept = given_.masked_fill(~kept, torch.inf).amin(-1)
    best_left = given_.masked_fill(kept, -torch.inf).amax(-1)
    assert (worst_kept >= best_left).all()  # what is kept beats what is not
    shares = given_.double().softmax(-1)
    count, mass = kept.sum(-1), (shares * kept).sum(-1)
    if isinstance(budget, TopK):
        most = budget.k if isinstance(budget.k, int) else -(-round(budget.k * 9, 9) // 1)
        assert (count == min(9, most)).all()
    elif isinstance(budget, Threshold):
        expected = (shares >= budget.share).sum(-1).clamp(min=1)
        assert ((count - expected).abs() <= ((shares - budget.share).abs() < 1e-6).sum(-1)).all()
    else:
        assert (count <= budget.most).all()
        enough = (mass >= budget.p - 1e-6) | (count == budget.most)
        assert enough.all()
        without_worst = mass - (shares.masked_fill(~kept, torch.inf)).amin(-1)
        assert ((without_worst < budget.p + 1e-6) | (count == 1)).all()


def test_shares_of_blocks_are_rounded_up():
    assert TopK(0.1).keep(some(0, blocks=30), EVEN).sum(-1).unique().tolist() == [3]
    assert TopK(0.101).keep(some(0, blocks=30), EVEN).sum(-1).unique().tolist() == [4]


def test_regions_do_not_compete():
    grid = Grid((64,), 16, before=20, after=24)  # 2 + 4 + 2 blocks
    blocks = Blocks.of(grid, torch.device("cpu"))
    given_ = some(1, blocks=8)
    given_[..., :2] += 100  # without isolation text would take all
    kept = PerRegion([(20, TopK(1)), (64, TopK(0.5)), (24, None)]).keep(given_, blocks)
    assert torch.equal(kept[..., :2], TopK(1).keep(given_[..., :2], blocks))
    assert torch.equal(kept[..., 2:6], TopK(2).keep(given_[..., 2:6], blocks))
    assert not kept[..., 6:].any()
    with pytest.raises(AttnControlError, match="keys 0..30 do not end where a block does"):
        PerRegion([(30, TopK(1)), (78, TopK(1))]).keep(given_, blocks)
    with pytest.raises(AttnControlError, match="runs of 84 keys, but there are 108"):
        PerRegion([(20, TopK(1)), (64, TopK(1))]).keep(given_, blocks)


def test_a_budget_for_each_head():
    given_ = some(2)
    kept = PerHead([TopK(1), TopP(0.9), TopK(4)]).keep(given_, EVEN)
    assert torch.equal(kept[:, 0], TopK(1).keep(given_, EVEN)[:, 0])
    assert torch.equal(kept[:, 1], TopP(0.9).keep(given_, EVEN)[:, 1])
    assert torch.equal(kept[:, 2], TopK(4).keep(given_, EVEN)[:, 2])
    with pytest.raises(AttnControlError, match="2 budgets for 3 heads"):
        PerHead([TopK(1), TopK(1)]).keep(given_, EVEN)


def test_what_is_kept_is_a_mask_of_its_grid():
    q, k = tensors(q_len=107, k_len=107, kv_heads=4)
    free = select_blocks(q, k, TopK(1), grid=Q, own=False)
    assert (free.batch, free.heads, free.q_regions) == (2, 4, (100, 7))
    assert (free.count == 1).all() and free.is_fully_block_sparse()
    own = select_blocks(q, k, TopK(1), grid=Q).validate()
    assert torch.equal(own.table, free.table | torch.eye(8, dtype=torch.bool))
    always = text_mask(Q) | sink_mask(Q, 16)
    kept = select_blocks(q, k, TopK(1), grid=Q, always=always)
    assert torch.equal(kept.to_dense(), own.to_dense() | always.to_dense())


def test_better_scores_keep_more_attention():
    """At one budget: the exact score keeps the most, and each beats chance."""
    g = torch.Generator().manual_seed(0)
    place = torch.randn(16, 8, generator=g).repeat_interleave(32, 0) * 1.5
    q, k = (torch.randn(1, 2, 512, 8, generator=g) + place for _ in range(2))
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    grid = Grid((512,), 32)

    def mass(score):
        mask = select_blocks(q, k, TopK(4), score=score, grid=grid, own=False).to_dense()
        return float((weights * mask).sum(-1).mean())

    exact = mass(exact_pooled)
    for score in (mean_pooled, min_max_bound, Sampled(4)):
        assert 0.25 < 0.6 * exact < mass(score) <= exact + 1e-6


def test_defaults_and_scale():
    q, k = tensors(q_len=300, k_len=300)
    mask = select_blocks(q, k, TopK(2))
    assert mask.q_regions == (300,) and mask.q_block == 128
    wide = select_blocks(q, tensors(k_len=200)[1], TopK(1))
    assert (wide.q_len, wide.k_len) == (300, 200)
    spy, other = Spy(), Spy()
    select_blocks(q, k, spy)
    select_blocks(q * 2, k, other, scale=0.5 * 8**-0.5)
    torch.testing.assert_close(spy.given, other.given)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda q, k: select_blocks(q[0], k, TopK(1)), "not (4, 107, 8) and (2, 2, 80, 8)"),
        (lambda q, k: select_blocks(q, k[..., :4], TopK(1)), "of one batch and head_dim"),
        (lambda q, k: select_blocks(q[:, :3], k, TopK(1)), "3 query heads are no multiple of 2"),
        (lambda q, k: select_blocks(q, k, TopK(1), grid=K), "q has 107 tokens, its grid 80"),
        (lambda q, k: select_blocks(q, k.to("meta"), TopK(1)), "q is on cpu, k on meta"),
        (lambda q, k: TopK(0), "TopK: k=0"),
        (lambda q, k: TopK(1.5), "TopK: k=1.5 has to be a share in (0, 1]"),
        (lambda q, k: TopP(0.0), "TopP: p=0.0"),
        (lambda q, k: TopP(0.5, 0), "k=0"),
        (lambda q, k: Threshold(2.0), "Threshold: share=2.0"),
        (lambda q, k: Sampled(0), "Sampled: rows=0"),
        (lambda q, k: cluster_order(q, 108), "108 clusters of 107 tokens"),
        (lambda q, k: cluster_order(q, 3, start=q[:, :, :2]), "start has to be (2, 4, 3, 8)"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(AttnControlError) as error:
        call(*tensors())
    assert said in str(error.value)


def test_clusters_bring_together_what_is_alike():
    """Tokens of four kinds, shuffled: each kind ends up in blocks of its own."""
    g = torch.Generator().manual_seed(1)
    kinds = torch.arange(4).repeat_interleave(32)
    shuffled = torch.stack([kinds[torch.randperm(128, generator=g)] for _ in range(2)])[:, None]
    centres = torch.eye(4).repeat(1, 2) * 10
    x = centres[shuffled] + 0.1 * torch.randn(2, 1, 128, 8, generator=g)
    start = centres.expand(2, 1, 4, 8) + 0.5
    order, means = cluster_order(x, 4, steps=2, start=start)
    assert torch.equal(order.sort(-1).values, torch.arange(128).expand(2, 1, 128))  # all covered
    assert torch.equal(shuffled.gather(2, order), kinds.expand(2, 1, 128))
    torch.testing.assert_close(means, centres.expand(2, 1, 4, 8), atol=0.1, rtol=0)
    found = select_clusters(x, x, TopK(1), clusters=4, block=32, steps=2, start=(start, start))
    diagonal = torch.eye(4, dtype=torch.bool).expand(2, 1, 4, 4)
    assert torch.equal(found.mask.table, diagonal)  # each kind reads its own, and that is all
    weights = (x @ x.mT / 8**0.5).softmax(-1)
    sorted_weights = weights.gather(2, order[..., None].expand_as(weights))
    sorted_weights = sorted_weights.gather(3, order[:, :, None].expand_as(weights))
    assert (sorted_weights * found.mask.to_dense()).sum(-1).min() > 0.999


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(0, 3))
def test_every_query_is_covered(seed, clusters, steps):
    q, k = tensors(seed, q_len=70, k_len=45)
    q[:, :, 10:60] = q[:, :, :1]  # so that clusters run empty
    found = select_clusters(q, k, TopK(0.2), clusters=(clusters, 5), block=16, steps=steps)
    found.mask.validate()
    for order, x in ((found.q_order, q), (found.k_order, k)):
        assert order.shape == x.shape[:3]
        assert torch.equal(order.sort(-1).values, torch.arange(x.shape[2]).expand_as(order))
    assert found.q_means.isfinite().all()
    again = select_clusters(
        q,
        k,
        TopK(0.2),
        clusters=(clusters, 5),
        block=16,
        steps=0,
        start=(found.q_means, found.k_means),
    )
    assert torch.equal(again.q_order, found.q_order)  # a warm start takes up where it was left
    assert torch.equal(again.mask.table, found.mask.table)
