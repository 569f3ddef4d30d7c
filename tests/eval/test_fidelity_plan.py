"""Suites of sparse attention before they run: mistakes, foretold densities and times, the clock."""

from __future__ import annotations

import math

import pytest
import torch

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.eval import attention_clock, fidelity
from attn_control.eval.command import estimates
from attn_control.eval.run import plan_of, prepare_suite, run_suite
from attn_control.eval.suite import load_suite
from attn_control.policy import StepPolicy
from attn_control.processors import (
    NeighborhoodAttention,
    SelectedAttention,
    SpatialTemporalAttention,
    TileAttention,
)
from attn_control.processors.registry import SPARSE

NARROW = NeighborhoodAttention, SpatialTemporalAttention

# ---- by construction


@pytest.mark.parametrize("control", SPARSE, ids=lambda each: each.__name__)
def test_output_share_is_the_same_under_every_mask(control, wan_toy, monkeypatch):
    """So that the suites have one row of it."""
    from attn_control import attach

    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(wan_toy))
    pipe = zoo.load("shapes-wan")
    call = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4}

    def render(*controls):
        g = torch.Generator().manual_seed(0)
        with attach(pipe, *controls) as session:
            made = pipe("a red circle moves up", generator=g, output_type="latent", **call).frames
        return made, session.report().controls

    policy = StepPolicy(first=1, refresh=2)
    dense, _ = render()
    expected, _ = render(TileAttention(correction="share", policy=policy))
    room = {"target_density": 0.7} if control in NARROW else {}  # few tokens: no sparser masks
    latents, (record,) = render(control(correction="share", policy=policy, block=32, **room))
    assert torch.equal(latents, expected) and not torch.equal(latents, dense)
    assert record.density == 3 / 4


def test_the_clock_of_attention_changes_no_bit_and_counts_only_self_attention(wan_toy, monkeypatch):
    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(wan_toy))
    pipe = zoo.load("shapes-wan")
    now, stock = [0.0], torch.nn.functional.scaled_dot_product_attention

    def slow(query, key, value, **options):
        now[0] += 2 if query.shape == key.shape else 5
        return stock(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", slow)
    for block in pipe.transformer.blocks:
        block.ffn.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 3))
    monkeypatch.setattr(attention_clock, "clock_of", lambda _: ("fake", lambda: now[0]))
    made = []

    def render():
        g = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2}
        made.append(pipe("a red circle moves up", generator=g, output_type="latent", **size).frames)

    monkeypatch.setattr(pipe, "encode_prompt", keep(pipe.encode_prompt))
    render()
    render()  # from here on the text is known, and takes no time
    assert attention_clock.attention_share(pipe, render, "cpu") == pytest.approx(2 / 10)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def keep(function):
    """Answers the second call as the first."""
    found = []

    def once(*args, **kwargs):
        found.extend([] if found else [function(*args, **kwargs)])
        return found[0]

    return once


def test_one_thread_is_timed_by_the_processor(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert attention_clock.clock_of("cpu")[0] == "processor"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert attention_clock.clock_of("cpu")[0] == "wall"


def test_the_plan_foretells_densities_and_time(sparse_suite, tmp_path, monkeypatch):
    """Time on a clock by which a forward takes 8 and decoding 20, a quarter of it attention's."""
    loaded = sparse_suite()
    prepared = prepare_suite(loaded, tmp_path / "out", None)
    few = plan_of(loaded, prepared)["measurements"]["few"]
    assert few["tokens"] == 256 and "groups" not in few
    densities = {"dense": 1.0, "share": 0.5, "tile": 0.625, "tile + lse": 0.625, "chosen": 0.75}
    assert few["densities"] == densities
    now, pipe = [0.0], prepared["few"].pipe
    from attn_control.eval import foretold

    monkeypatch.setattr(foretold, "clock_of", lambda _: ("fake", lambda: now[0]))
    monkeypatch.setattr(foretold, "attention_share", lambda *_: 0.25)
    pipe.transformer.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 8))
    decode = pipe.vae.decode
    monkeypatch.setattr(
        pipe.vae, "decode", lambda *a, **k: (now.__setitem__(0, now[0] + 20), decode(*a, **k))[1]
    )
    # Computed: lse runs its mask and half a dense attention at the refresh too.
    computed = {**densities, "tile + lse": 0.625 + 0.75 / 4}
    denoising = sum(4 * 8 * (1 - 0.25 * (1 - each)) for each in computed.values())
    whole = 6 * (denoising + 5 * 20)
    times = denoising + 2 * 4 * 8
    assert foretold.estimate(prepared["few"], 1) == pytest.approx(whole + times)
    assert foretold.estimate(prepared["few"], 1, 30) == pytest.approx(times)
    (line,) = estimates(loaded, prepared, tmp_path / "out")
    assert line.startswith(f"few: about {(whole + times) / 60:.0f} minutes on")
    assert line.endswith("with 0 of 30 videos there already")


WRONG = [
    ("tokens: 256", "tokens: 257", ["few", "videos of 256 tokens, expected at least 257"]),
    ("baseline: dense", "baseline: tile", ["'dense' has the controls []", "one that is sparse"]),
    ("dense: {}", "dense: {controls: [{SEG: {heads: L0}}]}", ["baseline is dense: none"]),
    ("tile: [4, 4, 4], correction: lse", "tile: [4, 4, 2], correction: lse", ["no variant has"]),
    ("share:\n", "share:\n          sampler: {guidance_scale: 2.0}\n", ["sampler of its own"]),
    ("variant: tile,", "variant: tiles,", ["few.sparse.closer.variant", "'tiles'"]),
    ("rounds: 1", "against: [share]", ["'against' has no meaning beside 'sparse'"]),
]  # fmt: skip


@pytest.mark.parametrize("old, new, words", WRONG, ids=[new for _, new, _ in WRONG])
def test_a_mistake_is_told_before_anything_runs(sparse_suite, tmp_path, old, new, words):
    with pytest.raises(AttnControlError) as caught:
        prepare_suite(sparse_suite((old, new)), tmp_path / "out", None)
    assert all(word in str(caught.value) for word in ["sparse.yaml", *words]), str(caught.value)


# ---- the suite that ships


@pytest.mark.parametrize("part", ["short", "guided", "long"])
def test_the_shipped_suite_asks_what_it_should(part, wan_toy, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(wan_toy))
    suite = load_suite(f"video/{part}")
    ((name, prepared),) = prepare_suite(suite, tmp_path / "out", None).items()
    assert name in load_suite("video").suite.measurements
    assert len(prepared.prompts) >= 4 and all(len(each) >= 6 for each in prepared.seeds.values())
    tokens = math.prod(fidelity.shape(prepared))
    assert tokens >= (8192 if part == "long" else 2048)
    controls = [plan.controls[0] for plan in prepared.variants if plan.controls]
    bare = {type(each) for each in controls if each.correction == "none"}
    assert bare == set(SPARSE) and any(each.correction == "share" for each in controls)
    assert all(each.policy.min_tokens == 0 for each in controls)
    pairs = fidelity.own_masks(prepared.variants)
    assert {each for each in controls if each.correction not in ("none", "share")} == {
        plan.controls[0] for plan in prepared.variants if plan.name in pairs
    }
    sparsest = plan_of(suite, {name: prepared})["measurements"][name]["densities"]
    assert any(sparsest[each] <= 0.35 for each in pairs)
    swept = {
        kind: {each.correction for each in controls if isinstance(each, kind)} for kind in SPARSE
    }
    whole = [kind for kind in SPARSE if swept[kind] >= {"none", "residual", "rho", "lse"}]
    assert part != "short" or len(whole) >= 2
    assert SelectedAttention in (whole if part == "short" else bare)


def test_the_short_form_of_the_shipped_suite_runs(sparse_suite, tmp_path):
    """Every control and correction of it, on a toy: four steps of 576 tokens."""
    from attn_control.eval.suite import FOLDER

    loaded = sparse_suite(
        ("num_inference_steps: 16", "num_inference_steps: 4"), ("first: 2", "first: 1"),
        ("height: 128, width: 128", "height: 64, width: 64"), ("rounds: 3", "rounds: 1"),
        ("spread: 4", "spread: 1"), ("seeds: 0-5", "seeds: 0"), ("tokens: 2048", "tokens: 576"),
        ("target_density: 0.12, sink", "target_density: 0.4, sink"),
        text=(FOLDER / "video" / "short.yaml").read_text(),
    )  # fmt: skip
    outcome = run_suite(loaded, tmp_path / "out")
    result = outcome.result["measurements"]["tokens-2304"]
    assert result["pictures"] == 23 and not outcome.result["notes"]
    assert result["closer"]["passed"]  # the scorer's control wants five videos
    for name, each in result["variants"].items():
        assert name == "dense" or 0.2 < each["density"] < 1, name
        assert name == "dense" or each["likeness"]["psnr"]["mean"] < 100, name
        assert (each["gain"] is not None) == ("+" in name)
