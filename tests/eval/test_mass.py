"""Attention mass near its query, against explicit softmax maps and boxes counted out by hand."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import tiny
import tiny_pipelines
import torch
from tiny_oracle import attention, dense

from attn_control import AttnControlError, attach
from attn_control.call import Call, Segment, Site
from attn_control.eval import mass
from attn_control.eval.boxes import boxes_of, windows
from attn_control.eval.mass import AttentionMass, Ledger, Tally, measure_mass

# Sides counted out by hand: at most a quarter of the tokens, the same share of every windowed axis.
BOXES = {
    (9, 16, 16): {"spatial": (9, 8, 8), "temporal": (2, 16, 16), "cube": (5, 10, 10)},
    (8, 6, 6): {"spatial": (8, 3, 3), "temporal": (2, 6, 6), "cube": (5, 3, 3)},
    (5, 4, 3): {"spatial": (5, 2, 1), "temporal": (1, 4, 3), "cube": (3, 2, 1)},
    (3, 2, 2): {"spatial": (3, 1, 1), "cube": (1, 1, 1)},  # one frame of three is a third
    (1, 4, 4): {"spatial": (1, 2, 2)},
    (1, 1, 2): {},
}


def nearest(n, side, i):
    """The keys nearest to i, of two as near the lower: what a window clamped at the border is."""
    return set(sorted(range(n), key=lambda j: (abs(j - i), j))[:side])


def inside(grid, sides):
    """Which keys each query's box holds: bool (queries, keys), pair by pair."""
    places = list(itertools.product(*map(range, grid)))
    near = [[nearest(n, side, i) for i in range(n)] for n, side in zip(grid, sides, strict=True)]
    return torch.tensor(
        [[all(b in near[axis][a] for axis, (a, b) in enumerate(zip(q, k, strict=True)))
          for k in places] for q in places]
    )  # fmt: skip


def by_hand(maps, grid, start=0):
    """From maps (heads, queries, keys) of the grid's queries: shape -> mass of each head."""
    keys = maps[..., start : start + math.prod(grid)]
    return {
        shape: (keys * inside(grid, sides)).sum(-1).mean(-1) for shape, sides in BOXES[grid].items()
    }


def agrees(rows, expected):
    """Rows of one site against shape -> mass of each head."""
    for row in rows:
        assert set(row["mass"]) == set(expected)
        for shape, masses in expected.items():
            assert row["mass"][shape] == pytest.approx(masses[row["head"]].item(), abs=2e-6)


def wan():
    pipe, call = tiny_pipelines.wan(tiny.wan(2))
    return pipe, {**call, "height": 64, "width": 48, "num_frames": 17, "guidance_scale": 3.0}


def words(call, seed=1):
    """The prompt of a pipeline without encoders."""
    g = torch.Generator().manual_seed(seed)
    return {"prompt_embeds": torch.randn(call["prompt_embeds"].shape, generator=g)}


@pytest.mark.parametrize("grid", BOXES)
def test_boxes_take_at_most_a_quarter(grid):
    assert boxes_of(grid) == BOXES[grid]
    assert all(4 * math.prod(sides) <= math.prod(grid) for sides in BOXES[grid].values())


@pytest.mark.parametrize(("n", "side"), [(1, 1), (5, 1), (5, 3), (8, 4), (9, 5), (7, 7)])
def test_a_window_is_moved_inwards_at_the_border(n, side):
    expected = [[j in nearest(n, side, i) for j in range(n)] for i in range(n)]
    assert windows(n, side).tolist() == expected


@pytest.mark.parametrize("at", [None, [2]])
def test_a_video_s_masses_are_those_of_the_explicit_softmax(at):
    pipe, call = wan()
    prompts, seeds, steps = [words(call, 1), words(call, 2)], [3, 4], 3
    found = measure_mass(pipe, prompts, steps=steps, seeds=seeds, at=at, call=call)

    maps = {"blocks.0.attn1": [], "blocks.1.attn1": []}
    for prompt, seed in zip(prompts, seeds, strict=True):
        with attention(pipe.transformer) as seen:
            tiny_pipelines.render(pipe, {**call, **prompt, "num_inference_steps": steps}, seed)
        for name, kept in maps.items():
            assert len(seen[name]) == 2 * steps  # cond, uncond, cond, ...
            kept += [dense(seen[name][2 * n].q, seen[name][2 * n].k)[0] for n in at or range(steps)]
    for layer, kept in enumerate(maps.values()):
        rows = [row for row in found["heads"] if row["site"] == f"L{layer}.self"]
        assert [row["head"] for row in rows] == [0, 1]
        agrees(rows, by_hand(torch.stack(kept).mean(0), (5, 4, 3)))
    assert len(found["heads"]) == 4  # cross-attention has no part in it
    assert found["boxes"] == {"5x4x3": {k: list(v) for k, v in BOXES[5, 4, 3].items()}}
    for row in found["heads"]:
        assert row["uniform"] == {"spatial": 0.166667, "temporal": 0.2, "cube": 0.1}
        assert row["on_grid"] == pytest.approx(1)
        assert row["best"] == max(row["mass"], key=row["mass"].get)


def test_a_picture_s_masses_leave_the_text_outside():
    pipe, call = tiny_pipelines.sd3()
    prompt = words(call)
    found = measure_mass(pipe, [prompt], steps=2, seeds=[0], call=call)
    with attention(pipe.transformer) as seen:
        tiny_pipelines.render(pipe, {**call, **prompt, "num_inference_steps": 2})
    for layer, (_, calls) in enumerate(seen.items()):
        maps = torch.stack([dense(c.q, c.k)[1] for c in calls]).mean(0)[:, :16]  # image, then text
        rows = [row for row in found["heads"] if row["site"] == f"L{layer}.joint"]
        agrees(rows, by_hand(maps, (1, 4, 4)))
        for row in rows:
            whole = maps[row["head"], :, :16].sum(-1).mean().item()
            assert row["on_grid"] == pytest.approx(whole, abs=2e-6) and whole < 0.999
            assert row["uniform"] == {"spatial": round(4 / 21, 6)}


def test_measuring_changes_no_bit():
    pipe, call = wan()
    for output in ("latent", "np"):
        run = {**call, "output_type": output}

        def render(run=run):
            frames = pipe(**run, generator=torch.Generator().manual_seed(0)).frames
            return torch.as_tensor(frames)

        plain = render()
        ledger = Ledger(frozenset(range(4)))
        with attach(pipe, AttentionMass("all", ledger=ledger)):
            measured = render()
        assert all(tally.queries for tally in ledger.tallies.values())
        assert torch.equal(plain, measured) and torch.equal(plain, render())


SITE = Site("blocks.0.attn1", "transformer", 0, "self", 3, 3, 44, None)
GRID = (8, 6, 6)
VIDEO = Segment("video", "video", 0, 288, GRID)


def tallied(q, k, mask=None, segment=VIDEO, heads=(0, 1, 2), rows=slice(None)):
    tally = Tally(segment.grid, heads, k.shape[2])
    tally.add(Call(SITE, "main", q, k, k, mask, None, lambda: q), rows, segment, segment)
    return tally


def test_heads_whose_answer_is_known():
    """One looks at its own frame, one at its own place through time, one at everything alike."""
    places = torch.tensor(list(itertools.product(*map(range, GRID))))
    frame = torch.nn.functional.one_hot(places[:, 0], 8)
    place = torch.nn.functional.one_hot(places[:, 1] * 6 + places[:, 2], 36)
    nothing = torch.zeros_like
    heads = [(frame, nothing(place)), (nothing(frame), place), (nothing(frame), nothing(place))]
    q = torch.stack([torch.cat(pair, 1) for pair in heads])[None].float() * 30
    tally = tallied(q, q)
    spatial, temporal, cube, whole = (tally.sums / tally.queries).T
    assert spatial.tolist() == pytest.approx([0.25, 1, 0.25], abs=1e-5)
    assert temporal.tolist() == pytest.approx([1, 0.25, 0.25], abs=1e-5)
    assert cube.tolist() == pytest.approx([0.25, 0.625, 45 / 288], abs=1e-5)
    assert whole.tolist() == pytest.approx([1, 1, 1], abs=1e-5)

    found = mass._summed_up([{SITE: tally}, {SITE: tally}])
    assert [row["best"] for row in found["heads"][:2]] == ["temporal", "spatial"]
    assert found["near"] == 0.666667 and found["near_by_prompt"] == [0.666667, 0.666667]
    # The second head's cube holds 0.625 of it: near by two shapes, and one head all the same.
    assert found["near_by_shape"] == dict.fromkeys(("spatial", "temporal", "cube"), 0.333333)


@pytest.mark.parametrize("masked", [None, "bool", "additive", "by key"])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_masks_shared_keys_other_tokens_and_chunks(masked, chunk, monkeypatch):
    monkeypatch.setattr(mass, "CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    video = Segment("video", "video", 4, 60, (5, 4, 3))
    q, k = torch.randn(2, 4, 66, 8, generator=g), torch.randn(2, 2, 66, 8, generator=g)
    keep = torch.rand(2, 1, 66, 66, generator=g) < 0.7
    keep[..., 5] = True  # something for every query
    mask = {
        None: None,
        "bool": keep,
        "additive": torch.randn(66, 66, generator=g)[None, None],
        "by key": keep[:, 0, 0].clone(),
    }[masked]
    tally = tallied(q, k, mask, video, heads=(1, 3), rows=slice(1, 2))
    shaped = mask[:, None, None] if masked == "by key" else mask
    maps = dense(q, k.repeat_interleave(2, 1), mask=shaped)[1, [1, 3], 4:64]
    expected = by_hand(maps, (5, 4, 3), start=4)
    means = tally.sums / tally.queries
    for column, shape in enumerate(("spatial", "temporal", "cube")):
        torch.testing.assert_close(means[:, column], expected[shape], atol=1e-6, rtol=0)
    torch.testing.assert_close(means[:, 3], maps[..., 4:64].sum(-1).mean(-1), atol=1e-6, rtol=0)


def test_the_same_seeds_give_the_same_json():
    pipe, call = wan()
    one, two, other = (
        json.dumps(measure_mass(pipe, [words(call)], steps=2, seeds=[seed], call=call))
        for seed in (5, 5, 6)
    )
    assert one == two
    assert json.loads(one)["heads"] != json.loads(other)["heads"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seeds": [1, 2]}, "1 prompts and 2 seeds"),
        ({"prompts": [], "seeds": []}, "0 prompts"),
        ({"at": [2]}, r"at=\[2\] must name steps from 0 to 1"),
        ({"at": []}, "must name steps"),
        ({"heads": "L9"}, "L9"),
        ({"heads": "L0.cross"}, "cross"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, says):
    pipe, call = wan()
    options = {"prompts": [words(call)], "steps": 2, "seeds": [1], "call": call, **options}
    with pytest.raises(AttnControlError, match=says):
        measure_mass(pipe, options.pop("prompts"), **options)


def test_a_grid_without_room_and_attention_that_is_not_finite_are_refused():
    pipe, call = wan()
    call |= {"height": 16, "width": 16, "num_frames": 5}  # 2 x 1 x 1 tokens
    with pytest.raises(AttnControlError, match=r"no box within a quarter of grid \(2, 1, 1\)"):
        measure_mass(pipe, [words(call)], steps=2, seeds=[1], call=call)
    q = torch.full((1, 3, 288, 4), math.inf)
    with pytest.raises(AttnControlError, match="L0.self is not finite"):
        mass._summed_up([{SITE: tallied(q, q)}])


def test_the_command_line_measures_a_built_in_model(tmp_path, capsys):
    file = tmp_path / "mass.json"
    mass.main(["shapes-sd3", "--prompts", "1", "--steps", "2", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["at"] == [0, 1] and found["boxes"] == {"1x16x16": {"spatial": [1, 8, 8]}}
    assert len(found["heads"]) == 24
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 25 and said[0].startswith("L0.jointH0") and "of 24 heads" in said[-1]
    assert mass.thirds(25) == [4, 12, 20]
