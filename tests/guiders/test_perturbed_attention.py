"""Perturbed attention guidance (B1-B4, B7, B12): where diffusers' guider fails, and ours.

What diffusers gets wrong is marked ``upstream``: those tests say so when it is mended.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers.guiders import PerturbedAttentionGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from tiny_guiders import (
    CFG,
    SCALE,
    costs_a_forward,
    crashing,
    guided_by,
    judge,
    negative,
    pushed_by,
    pushed_by_guider,
    pushed_by_hand,
    run,
    same,
    upstream,
)
from tiny_more import MORE, more_inputs
from tiny_oracle import attention, close, toward_identity
from tiny_pictures import PICTURES
from tiny_pipelines import sd15
from tiny_videos import VIDEOS

from attn_control import AttnControlError, attach
from attn_control.processors import SkipLayers, SoftPAG


def model_of(name):
    if name in tiny.MODELS:
        return tiny.MODELS[name](), tiny.family_inputs(name)
    if name in MORE:
        return MORE[name](), more_inputs(name)
    table = PICTURES if name in PICTURES else VIDEOS
    return table[name].make(), table[name].call()


# Model: stack of blocks, number of the block in it, selector, attention module, heads.
SITES = {
    "flux": ("transformer_blocks", 1, "L1", "transformer_blocks.1.attn"),
    "flux2": ("transformer_blocks", 1, "L1", "transformer_blocks.1.attn"),
    "chroma": ("transformer_blocks", 1, "L1", "transformer_blocks.1.attn"),
    "ltx": ("transformer_blocks", 1, "L1", "transformer_blocks.1.attn1"),
    "sd3": ("transformer_blocks", 1, "L1", "transformer_blocks.1.attn"),
    "wan": ("blocks", 1, "L1", "blocks.1.attn1"),
    "cogvideox": ("transformer_blocks", 1, "L1", "transformer_blocks.1.attn1"),
    "hunyuanvideo": ("transformer_blocks", 1, "L1", "transformer_blocks.1.attn"),
    "auraflow": ("joint_transformer_blocks", 0, "L0", "joint_transformer_blocks.0.attn"),
    "sdxl": (
        "mid_block.attentions.0.transformer_blocks", 0, "L3",
        "mid_block.attentions.0.transformer_blocks.0.attn1",
    ),
    "qwen": ("transformer_blocks", 1, "L1", "transformer_blocks.1.attn"),
    "cogview4": ("transformer_blocks", 1, "L1", "transformer_blocks.1.attn1"),
}  # fmt: skip
NO_ATTRIBUTE = ("flux", "flux2", "chroma", "ltx")
NOT_REGISTERED = ("sd3", "wan", "cogvideox", "hunyuanvideo", "auraflow")
WORKING = ("sdxl", "qwen", "cogview4")


def pag(name, **options):
    stack, number, _, _ = SITES[name]
    config = LayerSkipConfig([number], fqn=stack)
    options = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0} | options
    return PerturbedAttentionGuidance(
        guidance_scale=CFG, perturbed_guidance_scale=SCALE, perturbed_guidance_config=config,
        **options,
    )  # fmt: skip


def by_hand(name, model):
    site = SITES[name][3]
    heads = range(getattr(model.get_submodule(site), "heads", 2))
    return lambda: attention(model, {site: toward_identity(heads, 1.0)})


@pytest.mark.parametrize("name", SITES)
def test_b1_soft_pag_of_all_heads_is_pag_on_every_model(name):
    """B1, B2, B3: on the models on which the guider works, and on those on which it does not."""
    model, call = model_of(name)
    got = pushed_by(SoftPAG(SITES[name][2], u=1.0, scale=SCALE), model, call)
    same(got, model, call, by_hand(name, model))


@pytest.mark.parametrize("name", WORKING)
def test_b3_the_guider_does_it_too_where_it_works(name):
    model, call = model_of(name)
    same(pushed_by_guider(pag(name), model, call), model, call, by_hand(name, model))


@upstream("B1", "the PAG guider reads is_cross_attention off modules without it", AttributeError)
@pytest.mark.parametrize("name", NO_ATTRIBUTE)
def test_b1_the_guider(name):
    model, call = model_of(name)
    got = crashing(lambda: pushed_by_guider(pag(name), model, call), "is_cross_attention")
    same(got, model, call, by_hand(name, model))


@upstream("B2", "the PAG guider asks for a registered processor class", ValueError)
@pytest.mark.parametrize("name", NOT_REGISTERED)
def test_b2_the_guider(name):
    model, call = model_of(name)
    got = crashing(lambda: pushed_by_guider(pag(name), model, call), "not registered")
    same(got, model, call, by_hand(name, model))


def test_b2_sana_has_no_softmax_to_perturb_and_we_say_so():
    model = PICTURES["sana"].make()
    with pytest.raises(AttnControlError, match="no joint or self attention"):
        attach(model, SoftPAG("L1"))


@pytest.fixture
def flex():
    """Qwen-Image on a backend that is not F.scaled_dot_product_attention; undone afterwards."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry._active_backend
    model, call = model_of("qwen")
    by_sdpa = by_hand("qwen", model)
    with_native = SCALE * (run(model, call) - _inside(by_sdpa, model, call))
    model.set_attention_backend("flex")
    yield model, call, with_native
    model.reset_attention_backend()
    registry._active_backend = before


def _inside(perturbing, model, call):
    with perturbing():
        return run(model, call)


def test_b4_any_backend(flex):
    model, call, expected = flex
    close(pushed_by(SoftPAG("L1", u=1.0, scale=SCALE), model, call), expected, 5e-5)


@upstream("B4", "the PAG guider replaces F.scaled_dot_product_attention alone")
def test_b4_the_guider(flex):
    model, call, expected = flex
    guider = pag("qwen")
    got = pushed_by_guider(guider, model, call)
    costs_a_forward(guider)
    judge(got, right=expected, wrong=torch.zeros_like(got), tolerance=5e-5)


def without_cfg(guider):
    """``cond + scale * (cond - perturbed)``: guidance of perturbation alone."""
    guider.guidance_scale, guider.use_original_formulation = 0.0, True
    return guider


@pytest.mark.parametrize("name", ["qwen", "cogview4"])
def test_b7_without_classifier_free_guidance(name):
    model, call = model_of(name)
    with attach(model, SoftPAG(SITES[name][2], u=1.0, scale=SCALE)):
        got = run(model, call)
    same(got - run(model, call), model, call, by_hand(name, model))


@upstream("B7", "without CFG the PAG guider guides by the negative prompt, and perturbs nothing")
@pytest.mark.parametrize("name", ["qwen", "cogview4"])
def test_b7_the_guider(name):
    model, call = model_of(name)
    got = guided_by(without_cfg(pag(name)), model, call)
    judge_alone(got, model, call, by_hand(name, model))


def judge_alone(got, model, call, perturbing):
    """Right: away from the perturbed prediction. Wrong: away from the negative prompt's."""
    plain = run(model, call)
    right = plain + pushed_by_hand(model, call, perturbing())
    judge(got, right, wrong=plain + SCALE * (plain - run(model, negative(call))))


def _skipped(model, number):
    return lambda: _Without(model.transformer_blocks[number])


class _Without:
    """A Qwen-Image block that hands on what it was given."""

    def __init__(self, block):
        self.block = block

    def __enter__(self):
        self.block.forward = lambda hidden_states, encoder_hidden_states, **_: (
            encoder_hidden_states, hidden_states,
        )  # fmt: skip

    def __exit__(self, *error):
        del self.block.forward


def test_b7_skipped_layers_without_classifier_free_guidance():
    model, call = model_of("qwen")
    got = pushed_by(SkipLayers("L1", scale=SCALE), model, call)
    same(got, model, call, _skipped(model, 1))


@upstream("B7", "without CFG the SLG guider guides by the negative prompt, and skips nothing")
def test_b7_the_guider_of_skipped_layers():
    model, call = model_of("qwen")
    guider = SkipLayerGuidance(
        skip_layer_guidance_scale=SCALE, skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0, skip_layer_config=LayerSkipConfig([1]),
    )  # fmt: skip
    judge_alone(guided_by(without_cfg(guider), model, call), model, call, _skipped(model, 1))


def test_b12_a_control_acts_at_every_step_unless_told_otherwise():
    """And a window that holds no step of the run is refused."""
    pipe, call = sd15()
    with attach(pipe, SoftPAG("L2")) as session:
        pipe(**call, output_type="latent")
    assert list(session.report().controls[0].steps.values()) == [[0, 1, 2, 3]]
    with pytest.raises(AttnControlError, match="window '0.01-0.2' holds no step of this run of 4"):
        with attach(pipe, SoftPAG("L2", window="0.01-0.2")):
            pipe(**call, output_type="latent")


@upstream("B12", "by default the PAG guider never acts in a run of 4 steps, and does not say so")
def test_b12_the_guider():
    model, call = model_of("qwen")
    guider = PerturbedAttentionGuidance(
        guidance_scale=CFG, perturbed_guidance_scale=SCALE,
        perturbed_guidance_config=LayerSkipConfig([1], fqn="transformer_blocks"),
    )  # fmt: skip
    pushes = [pushed_by_guider(guider, model, call, step=step, of=4) for step in range(4)]
    right = pushed_by_hand(model, call, by_hand("qwen", model)())
    strongest = max(pushes, key=lambda push: float(push.abs().max()))
    judge(strongest, right, wrong=torch.zeros_like(right))
