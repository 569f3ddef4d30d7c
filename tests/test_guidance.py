"""A guided pipeline draws what an explicit loop draws, in every layout of classifier-free
guidance."""

from __future__ import annotations

import copy

import pytest
import tiny
import tiny_loops
import tiny_pipelines
import torch
from tiny_oracle import attention, close, forwards, gated, toward_identity

from attn_control import attach
from attn_control.processors import HeadGate, SoftPAG

MID = "mid_block.attentions.0.transformer_blocks.0.attn1"
# name: (pipeline, loop, selector, explicit changes)
CASES = {
    "sd15": (
        tiny_pipelines.sd15,
        tiny_loops.batched,
        "L2H1-2",
        {MID: toward_identity((1, 2), 0.6)},
    ),
    "sdxl": (
        tiny_pipelines.sdxl,
        tiny_loops.batched,
        "L3H1-2",
        {MID: toward_identity((1, 2), 0.6)},
    ),
    "sd3": (
        tiny_pipelines.sd3,
        tiny_loops.batched,
        "L0H1, L2H0-1",
        {
            "transformer_blocks.0.attn": toward_identity((1,), 0.6),
            "transformer_blocks.2.attn": toward_identity((0, 1), 0.6),
        },
    ),
    "sd35": (
        lambda: tiny_pipelines.sd3(tiny.sd3(dual=(0, 1))),
        tiny_loops.batched,
        "L1.self2H3, L1.jointH0",
        {
            "transformer_blocks.1.attn2": toward_identity((3,), 0.6),
            "transformer_blocks.1.attn": toward_identity((0,), 0.6),
        },
    ),
    "flux": (
        tiny_pipelines.flux,
        tiny_loops.flux,
        "L0H0, L3",
        {
            "transformer_blocks.0.attn": toward_identity((0,), 0.6),
            "single_transformer_blocks.1.attn": toward_identity((0, 1), 0.6),
        },
    ),
    "flux_true_cfg": (
        lambda: tiny_pipelines.flux(true_cfg=True),
        tiny_loops.flux,
        "L2H1",
        {"single_transformer_blocks.0.attn": toward_identity((1,), 0.6)},
    ),
    "wan": (
        tiny_pipelines.wan,
        tiny_loops.wan,
        "L0H1",
        {"blocks.0.attn1": toward_identity((1,), 0.6)},
    ),
}


def _model(pipe):
    return getattr(pipe, "transformer", None) or pipe.unet


def _start(name: str) -> torch.Tensor:
    return tiny_loops.start(name.removesuffix("_true_cfg").replace("sd35", "sd3"))


def _both(name, control, *, due=tiny_loops.always, scale=2.5, **changed):
    """Final latents of the attached pipeline, of the explicit loop, and of the plain pipeline."""
    make, loop, _, changes = CASES[name]
    pipe, call = make()
    call |= changed
    latents, scheduler = _start(name), copy.deepcopy(pipe.scheduler)
    plain = tiny_pipelines.render(pipe, {**call, "latents": latents})
    with attach(pipe, control) as session:
        got = tiny_pipelines.render(pipe, {**call, "latents": latents})
    expected = loop(_model(pipe), scheduler, call, latents, changes, scale, due)
    return got, expected, plain, session


@pytest.mark.parametrize("name", CASES)
def test_guided_run_equals_the_explicit_loop(name):
    got, expected, plain, _ = _both(name, SoftPAG(CASES[name][2], u=0.6, scale=2.5))
    close(got, expected)
    assert (got - plain).abs().max() > 1e-3  # or the comparison would prove nothing


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_without_cfg_every_row_is_its_own_cond(name):
    control = SoftPAG(CASES[name][2], u=0.6, scale=2.5)
    got, expected, _, _ = _both(name, control, guidance_scale=1.0)
    close(got, expected)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_true_cfg", "wan"])
def test_windowed_guidance_equals_the_loop_that_guides_those_steps_only(name):
    control = SoftPAG(CASES[name][2], u=0.6, scale=2.5, window="0.25-0.75")
    got, expected, _, session = _both(name, control, due=lambda i, n: i in (1, 2))
    close(got, expected)
    assert list(session.report().controls[0].steps.values()) == [[1, 2]]


@pytest.mark.parametrize("scale", [-1.0, 0.5, 7.0])
def test_scale_is_the_factor_of_the_difference(scale):
    control = SoftPAG(CASES["sd3"][2], u=0.6, scale=scale)
    got, expected, _, _ = _both("sd3", control, scale=scale)
    close(got, expected)


def test_wan_with_two_transformers_is_guided_on_both():
    high, low = tiny.wan(), tiny.wan()
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.mul_(0.9)
    pipe, call = tiny_pipelines.wan(high, low)
    call |= {"latents": _start("wan")}
    with attach(pipe, SoftPAG("L0H1", u=0.6, scale=2.5)) as session:
        got = tiny_pipelines.render(pipe, call)
    changes = {"blocks.0.attn1": toward_identity((1,), 0.6)}
    scheduler = copy.deepcopy(pipe.scheduler)
    close(got, tiny_loops.wan(high, scheduler, call, call["latents"], changes, 2.5, low=low))
    sites = session.report().to_dict()["controls"][0]["sites"]
    assert {name: site["calls"] for name, site in sites.items()} == {
        "transformer.blocks.0.attn1": 2,  # timesteps 1000, 667 | 334, 1
        "transformer_2.blocks.0.attn1": 2,
    }


@pytest.mark.parametrize("family", tiny.MODELS)
def test_bare_model_guides_each_row_by_its_own_difference(family):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family, batch=3)
    name = next(n for n, m in model.named_modules() if hasattr(m, "processor"))
    with torch.no_grad():
        plain = model(**call)[0]
        with attention(model, {name: toward_identity((0,), 0.7)}):
            perturbed = model(**call)[0]
        with attach(model, SoftPAG("L0H0" if family != "sd35" else "L0.jointH0", u=0.7, scale=2.0)):
            guided = model(**call)[0]
    close(guided, plain + 2.0 * (plain - perturbed))
    assert (guided - plain).abs().max() > 1e-4


def test_two_guidances_add_their_differences():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    first = {"transformer_blocks.0.attn": toward_identity((1,), 1.0)}
    second = {"transformer_blocks.1.attn": toward_identity((0, 1), 0.5)}
    with torch.no_grad():
        plain = model(**call)[0]
        with attention(model, first):
            one = model(**call)[0]
        with attention(model, second):
            two = model(**call)[0]
        controls = SoftPAG("L0H1", scale=2.0), SoftPAG("L1H0-1", u=0.5, scale=3.0)
        with attach(model, *controls), forwards(model) as ran:
            guided = model(**call)[0]
    close(guided, plain + 2.0 * (plain - one) + 3.0 * (plain - two))
    assert len(ran) == 3


def test_in_place_controls_act_in_the_perturbed_forward_too():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    gate = {"transformer_blocks.0.attn": gated((2,), 0.0)}
    both = {**gate, "transformer_blocks.1.attn": toward_identity((1,), 1.0)}
    with torch.no_grad():
        with attention(model, gate):
            base = model(**call)[0]
        with attention(model, both):
            perturbed = model(**call)[0]
        with attach(model, HeadGate("L0H2"), SoftPAG("L1H1", scale=2.0)):
            guided = model(**call)[0]
    close(guided, base + 2.0 * (base - perturbed))


def test_only_cond_rows_run_again_in_batched_guidance():
    pipe, call = tiny_pipelines.sd3()
    with attach(pipe, SoftPAG("L0H1")), forwards(pipe.transformer) as ran:
        tiny_pipelines.render(pipe, call)
    assert ran == [2, 1] * 4


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_container_of_the_prediction_is_kept(return_dict):
    model, call = tiny.sd3(), tiny.inputs("sd3")
    with torch.no_grad():
        plain = model(**call, return_dict=return_dict)
        with attach(model, SoftPAG("L0H1")):
            guided = model(**call, return_dict=return_dict)
    assert type(guided) is type(plain)
    assert not torch.equal(guided[0], plain[0])
    if return_dict:
        assert guided.sample is guided[0] is guided["sample"]


def test_arguments_may_be_given_by_position():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    order = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    with torch.no_grad(), attach(model, SoftPAG("L0H1")):
        assert torch.equal(model(*(call[n] for n in order))[0], model(**call)[0])
