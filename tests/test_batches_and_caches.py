"""Guidance of several prompts at once, with arguments whose rows are unknown, beside diffusers'
step caches, and at sites that run several softmaxes."""

from __future__ import annotations

import diffusers
import pytest
import tiny
import tiny_pipelines
import torch
from tiny_oracle import attention, close, expose_heads, forwards, outputs

from attn_control import attach
from attn_control.processors import HeadGate, SoftPAG

GUIDE = SoftPAG("L1H1", u=0.6, scale=2.0)


def _pair(call: dict) -> tuple[dict, list[dict]]:
    """A call of two prompts, and the two calls of one prompt each."""
    g = torch.Generator().manual_seed(11)
    names = [name for name in call if name.endswith("prompt_embeds")]
    both = {n: torch.cat([call[n], torch.randn(call[n].shape, generator=g)]) for n in names}
    latents = torch.randn(2, 4, 8, 8, generator=g)
    singles = [
        {**call, **{n: both[n][i : i + 1] for n in names}, "latents": latents[i : i + 1]}
        for i in range(2)
    ]
    return {**call, **both, "latents": latents}, singles


def test_two_prompts_are_each_guided_by_their_own_difference():
    pipe, call = tiny_pipelines.sd3()
    together, alone = _pair(call)
    with attach(pipe, GUIDE), forwards(pipe.transformer) as sizes:
        got = tiny_pipelines.render(pipe, together)
    assert sizes == [4, 2] * 4
    with attach(pipe, GUIDE):
        for i in range(2):
            close(got[i : i + 1], tiny_pipelines.render(pipe, alone[i]))


def test_an_argument_with_unknown_rows_makes_the_extra_forward_a_full_one():
    pipe, call = tiny_pipelines.sd3()
    with attach(pipe, GUIDE):
        expected = tiny_pipelines.render(pipe, call)
        call["joint_attention_kwargs"] = {"unheard_of": torch.zeros(1)}
        with forwards(pipe.transformer) as sizes:
            close(tiny_pipelines.render(pipe, call), expected)
    assert sizes == [2, 2] * 4


@pytest.mark.parametrize("family", ["flux_true_cfg", "wan"])
def test_a_step_caches_branches_are_not_mixed_with_ours(family):
    pipe, call = tiny_pipelines.PIPELINES[family]()
    call["num_inference_steps"] = 6
    plain = tiny_pipelines.render(pipe, call)
    # So high a threshold reuses every residual of the first step.
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    cached = tiny_pipelines.render(pipe, call)
    assert (cached - plain).abs().max() > 1e-2
    with attach(pipe, SoftPAG("L0", scale=1e-12)) as session:
        close(tiny_pipelines.render(pipe, call), cached)
    assert session.report().guided["calls"] == 6
    pipe.transformer.disable_cache()
    assert torch.equal(tiny_pipelines.render(pipe, call), plain)


@pytest.mark.parametrize("family", ["flux_true_cfg", "wan"])
def test_beside_a_step_cache_the_perturbed_forward_has_a_cache_of_its_own(family):
    pipe, call = tiny_pipelines.PIPELINES[family]()
    call["num_inference_steps"] = 1  # in the cond branch's cache it would find cond's residuals
    with attach(pipe, SoftPAG("L1", scale=2.0)):
        expected = tiny_pipelines.render(pipe, call)
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
        close(tiny_pipelines.render(pipe, call), expected)


@torch.no_grad()
def test_the_callers_cache_context_is_in_force_again_after_an_extra_forward():
    model, call = tiny.flux(), tiny.inputs("flux")
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    with attach(model, SoftPAG("L1", scale=2.0)), model.cache_context("cond"):
        first = model(**call)[0]
        close(model(**call)[0], first)  # without a context the cache raises


@torch.no_grad()
def test_wan_image_to_video_controls_the_text_softmax_not_the_image_one():
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, image_dim=8,
        added_kv_proj_dim=24, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    model = expose_heads(tiny._spread(model))
    g = torch.Generator().manual_seed(1)
    call = tiny.inputs("wan")
    call["encoder_hidden_states"] = torch.randn(2, 512, 16, generator=g)  # the model counts on it
    call["encoder_hidden_states_image"] = torch.randn(2, 3, 8, generator=g)
    module = model.blocks[0].attn2
    with attention(model) as seen, outputs(module, 2) as outs:
        model(**call)
        image, text = seen["blocks.0.attn2"]
        assert (image.k.shape[2], text.k.shape[2]) == (3, 512)
    with outputs(module, 2) as gated, attach(model, HeadGate("L0.crossH1")) as session:
        model(**call)
    assert torch.equal(gated[0][:, 0], outs[0][:, 0])
    close(gated[0][:, 1], image.out[:, 1])
    assert session.report().controls[0].calls == 1
