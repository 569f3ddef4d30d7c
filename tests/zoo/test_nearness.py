"""What heads are asked to look at nearby, against the stock block's own queries and keys."""

import dataclasses

import pytest
import torch
from diffusers.models.transformers import transformer_wan
from tiny_lessons import TINY, examples

from attn_control.eval.boxes import boxes_of, windows
from attn_control.zoo.train import nearness, wan, wan_model

GRID = (5, 8, 8)
TOKENS = 5 * 8 * 8


def test_boxes_are_those_that_the_evaluation_measures_by():
    found = nearness.boxes(GRID)
    assert (
        found.shape[1] == 3 and nearness.boxes((3, 8, 8)).shape[1] == len(boxes_of((3, 8, 8))) == 2
    )
    for number, sides in enumerate(boxes_of(GRID).values()):
        f, r, c = (windows(n, side) for n, side in zip(GRID, sides, strict=True))
        want = torch.einsum("ai,bj,ck->abcijk", f, r, c).reshape(TOKENS, TOKENS)
        assert torch.equal(found[:, number].float(), want)
    assert (found.sum(-1) <= TOKENS / 4).all() and found.sum(-1).unique(dim=0).shape[0] == 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = wan_model.build(64, 3)
    for p in made.parameters():  # no gate at zero, nothing uniform
        p.data.add_(0.3 * torch.randn_like(p))
    return made


def test_masses_are_those_of_the_stock_attention(model, monkeypatch):
    calls, stock = [], transformer_wan.dispatch_attention_fn

    def seen(q, k, v, **kw):
        calls.append((q, k))
        return stock(q, k, v, **kw)

    x, states, t = torch.randn(2, 4, 5, 16, 16), torch.randn(2, 7, 64), torch.tensor([300.0, 800.0])
    queries = torch.tensor([0, 17, 100, 239])
    looks = wan_model.Looks(queries, nearness.boxes(GRID)[queries])
    with torch.no_grad():
        monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", seen)
        stock_out = model(x, t, states, return_dict=False)[0]
        monkeypatch.undo()
        out = wan_model.velocity(model, x, t, states, looks=looks)
    assert out.shape == x.shape and len(looks.masses) == 3
    torch.testing.assert_close(out, stock_out)
    for (q, k), got in zip(calls[::2], looks.masses, strict=True):  # every other one reads text
        scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 32**0.5
        weights = scores.softmax(-1)[:, :, queries]
        want = torch.stack(
            [(weights * looks.inside[:, n]).sum(-1).mean((0, 2)) for n in range(3)], -1
        )
        torch.testing.assert_close(got, want.float(), atol=1e-5, rtol=1e-4)


def test_the_nearer_half_is_asked_for_what_it_lacks():
    one = torch.tensor([[0.1, 0.65, 0.2], [0.9, 0.2, 0.2], [0.1, 0.1, 0.3], [0.0, 0.0, 0.0]])
    two = torch.full((4, 3), 0.4)
    enough = nearness.ENOUGH
    want = ((enough - 0.65) + 0 + 2 * (enough - 0.4)) / 4
    assert nearness.shortfall([one, two]).item() == pytest.approx(want, abs=1e-6)


def test_its_weight_and_queries_do_what_they_say():
    data = examples("shapes-wan")

    def lesson(**changes):
        s = dataclasses.replace(
            TINY["shapes-wan"], drop=0.0, fine_from=0.0, fine_few=0.0, **changes
        )
        return wan.Lesson(s, data)

    plain, _ = lesson().loss(0)
    assert "far" not in plain and "queries" not in lesson().batch(0)
    figures, total = lesson(near=0.5, near_queries=5).loss(0)
    assert len(lesson(near=0.5, near_queries=5).batch(0)["queries"]) == 5
    (kind,) = figures.keys() - {"read", "see", "far"}
    want = figures[kind] + TINY["shapes-wan"].read * figures["read"] + 0.5 * figures["far"]
    torch.testing.assert_close(total, want)
    assert figures["far"] > 0
    assert figures[kind] == plain[kind]  # looking changes nothing of what is computed
    other, _ = lesson(near=0.5, near_queries=50).loss(0)
    assert other["far"] != figures["far"]


@pytest.mark.slow
def test_heads_learn_to_look_nearby():
    data = examples("shapes-wan")
    s = dataclasses.replace(
        TINY["shapes-wan"], width=64, fine_from=0.0, fine_few=0.0, near=3.0, near_queries=40
    )
    lesson = wan.Lesson(s, data)
    opt = torch.optim.Adam(lesson.trainee.parameters(), 3e-3)
    found = []
    for step in range(60):
        figures, total = lesson.loss(step)
        opt.zero_grad()
        total.backward()
        opt.step()
        found.append(figures["far"].item())
    assert sum(found[-5:]) < 0.6 * sum(found[:5])
