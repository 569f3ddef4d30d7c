"""Modular pipelines, whose guiders call the denoiser branch by branch."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tiny_loops import AtTheScheduler
from tiny_modular import MODULAR
from tiny_oracle import attention, close, toward_identity
from tiny_pictures import PICTURES

from attn_control import AttnControlError, attach
from attn_control.processors import SEG, HeadGate, SoftPAG

SITES = {
    "sd3": "transformer_blocks.1.attn",
    "ltx": "transformer_blocks.1.attn1",
    "wan": "blocks.1.attn1",
    "wan_two": "blocks.1.attn1",
    "flux": "transformer_blocks.1.attn",
}
CONTROL = SoftPAG("L1H1", u=0.6, scale=2.0)


def denoisers(pipe):
    return [getattr(pipe, n) for n in ("transformer", "transformer_2") if hasattr(pipe, n)]


def changes(name):
    return {SITES[name]: toward_identity((1,), 0.6)}


def render(pipe, call, *args, **options):
    with AtTheScheduler(pipe, *args, **options) as seen:
        return pipe(**call, output="latents"), seen.predictions


@pytest.mark.parametrize("name", MODULAR)
@pytest.mark.parametrize("guided", [True, False])
def test_every_prediction_is_guided_as_by_hand(name, guided):
    pipe, call = MODULAR[name]()
    if not guided:
        for place in ("guider", "guider_2"):
            if hasattr(pipe, place):
                pipe.update_components(**{place: diffusers.ClassifierFreeGuidance(enabled=False)})
    plain, _ = render(pipe, call, [])
    with attach(pipe, CONTROL) as session:
        got, predictions = render(pipe, call, [])
    layout = "split" if guided and hasattr(pipe, "guider") else "one"
    expected, wanted = render(
        pipe, call, denoisers(pipe), lambda m: attention(m, changes(name)), 2.0, layout
    )
    assert len(predictions) == len(wanted) >= 3
    for ours, theirs in zip(predictions, wanted, strict=True):
        close(ours, theirs)
    close(got, expected)
    assert (got - plain).abs().max() > 1e-3
    assert session.report().guided["calls"] == len(wanted)
    assert not session.report().notes
    assert torch.equal(render(pipe, call, [])[0], plain)


def test_each_branch_is_named_as_the_guider_names_it():
    pipe, call = MODULAR["wan_two"]()
    seen = []
    with attach(pipe, SoftPAG("L1H1", window="0-0.5")) as session:
        for model in denoisers(pipe):
            model.register_forward_pre_hook(lambda *_: seen.append(session.step.branch[0]))
        render(pipe, call, [])
    assert seen == ["cond", "cond", "uncond"] * 2 + ["cond", "uncond"] * 2


def test_nothing_asked_for_changes_nothing():
    pipe, call = MODULAR["sd3"]()
    plain, _ = render(pipe, call, [])
    for control in (SoftPAG("L1H1", u=0.0), SoftPAG("L1H1", scale=0.0)):
        with attach(pipe, control):
            assert torch.equal(render(pipe, call, [])[0], plain)


CONFLICTS = {
    "PerturbedAttentionGuidance": {"perturbed_guidance_layers": [1]},
    "SkipLayerGuidance": {
        "skip_layer_config": diffusers.hooks.LayerSkipConfig([1], fqn="transformer_blocks")
    },
    "SmoothedEnergyGuidance": {
        "seg_guidance_config": diffusers.hooks.SmoothedEnergyGuidanceConfig(
            [1], fqn="transformer_blocks"
        )
    },
    "AutoGuidance": {
        "auto_guidance_config": diffusers.hooks.LayerSkipConfig(
            [1], fqn="transformer_blocks", dropout=0.5
        )
    },
}


def conflicting(name):
    return getattr(diffusers.guiders, name)(**CONFLICTS[name])


@pytest.mark.parametrize("name", CONFLICTS)
def test_a_guider_that_perturbs_the_model_itself_is_refused_at_attach(name):
    pipe, _ = MODULAR["sd3"]()
    plain = type(pipe.transformer)
    pipe.update_components(guider=conflicting(name))
    with pytest.raises(AttnControlError, match=f"is guided by {name}, which hooks") as error:
        attach(pipe, CONTROL)
    assert "\n" not in str(error.value) and "ClassifierFreeGuidance" in str(error.value)
    assert type(pipe.transformer) is plain
    attach(pipe).close()  # without controls there is nothing to conflict with
    pipe.guider.disable()
    attach(pipe, CONTROL).close()  # nor with a guider that is switched off


def test_a_guider_that_comes_after_attach_is_refused_at_the_next_call():
    pipe, call = MODULAR["sd3"]()
    with attach(pipe, HeadGate("L1H1", gain=0.5)):
        render(pipe, call, [])
        pipe.update_components(guider=conflicting("PerturbedAttentionGuidance"))
        with pytest.raises(AttnControlError, match="guided by PerturbedAttentionGuidance"):
            render(pipe, call, [])


def test_an_ordinary_pipeline_with_such_a_guider_is_refused():
    pipe = diffusers.HunyuanImagePipeline(
        transformer=PICTURES["hunyuanimage"].make(), vae=None, text_encoder=None, tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder_2=None,
        tokenizer_2=None, guider=conflicting("SkipLayerGuidance"),
    )  # fmt: skip
    with pytest.raises(AttnControlError, match="HunyuanImagePipeline is guided by SkipLayer"):
        attach(pipe, SEG("L1"))


def test_ltx_2s_guider_is_refused_where_it_perturbs():
    pipe, _ = MODULAR["ltx"]()
    pipe.update_components(guider=diffusers.guiders.LTX2Guidance(guidance_scale=3.0))
    attach(pipe, CONTROL).close()
    pipe.update_components(guider=diffusers.guiders.LTX2Guidance(stg_scale=1.0))
    with pytest.raises(AttnControlError, match="stg_scale"):
        attach(pipe, CONTROL)


def test_guiders_that_are_not_affine_get_the_difference_before_they_combine():
    """And the report says so."""
    pipe, call = MODULAR["sd3"]()
    pipe.update_components(
        guider=diffusers.guiders.ClassifierFreeZeroStarGuidance(zero_init_steps=0)
    )
    with attach(pipe, CONTROL) as session:
        got, _ = render(pipe, call, [])
    assert "ClassifierFreeZeroStarGuidance combines" in session.report().notes[0]
    kept, busy = [], []

    def add(model, args, kwargs, output):
        if busy:
            return None
        if len(kept) % 2 == 0:
            busy.append(True)
            with attention(model, changes("sd3")):
                kept.append(2.0 * (output[0] - model(*args, **kwargs)[0]))
            busy.clear()
        else:
            kept.append(kept[-1])
        return (output[0] + kept[-1],)

    hook = pipe.transformer.register_forward_hook(add, with_kwargs=True)
    close(got, render(pipe, call, [])[0])
    hook.remove()
