"""Pipelines that do something else with their rows: refused, or guided where it is right."""

from __future__ import annotations

import diffusers
import pytest
import tiny
import tiny_pipelines
import torch
from tiny_by_hand import explicit, recorded
from tiny_editing import _again, _other
from tiny_oracle import close, toward_identity
from tiny_pipelines import _quiet, render

from attn_control import AttnControlError, attach
from attn_control.processors import NAG, HeadGate, SkipLayers, SoftPAG

MID = "mid_block.attentions.0.transformer_blocks.0.attn1"
REFUSED = {
    "StableDiffusionPanoramaPipeline": ("DDIMScheduler", "denoises many views in one step"),
    "LEditsPPPipelineStableDiffusion": ("DPMSolverMultistepScheduler", "combines .* by masks"),
    "StableDiffusionSAGPipeline": ("DDIMScheduler", "runs perturbed predictions of its own"),
    "SemanticStableDiffusionPipeline": ("DDIMScheduler", "combines .* by masks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pipelines_whose_rows_cannot_be_told_refuse_guidance(name):
    scheduler, words = REFUSED[name]
    pipe, _ = _again(name, tiny_pipelines.sd15, scheduler=getattr(diffusers, scheduler)())
    for control in (SoftPAG("L2"), SkipLayers("L2"), NAG()):
        with pytest.raises(AttnControlError, match=f"{name} {words}.*HeadGate"):
            attach(pipe, control)
    attach(pipe, HeadGate("L2", gain=0.5), SoftPAG("L2", u=-0.5)).close()


def test_such_a_pipeline_that_shares_an_attached_model_is_refused_when_it_calls():
    pipe, call = tiny_pipelines.sd15()
    other, _ = _again("StableDiffusionPanoramaPipeline", lambda: (pipe, call))
    with attach(pipe, SoftPAG("L2")):
        render(pipe, call)
        with pytest.raises(AttnControlError, match="Panorama.*many views"):
            render(_quiet(other), call)


def test_a_learned_variance_is_not_guided():
    """Twice the channels; the scheduler reads the second half as a variance."""
    model = _other(tiny.unet(), out_channels=8)
    pipe, call = tiny_pipelines.sd15()
    pipe.unet = model
    pipe.scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    plain, unguided = recorded(pipe, call | {"num_inference_steps": 2})
    for options in ({}, {"limit": 0.05}):
        with attach(pipe, SoftPAG("L2H1", u=0.6, scale=2.0, **options)):
            got, predictions = recorded(pipe, call | {"num_inference_steps": 2})
        assert torch.equal(predictions[0][:, 4:], unguided[0][:, 4:])
        assert not torch.equal(predictions[0][:, :4], unguided[0][:, :4])
        if not options:
            changes = {MID: toward_identity((1,), 0.6)}
            _, wanted = explicit(pipe, call | {"num_inference_steps": 2}, "neg pos", changes, 2.0)
            close(predictions[0][:, :4], wanted[0][:, :4])
        else:
            # The norm is of the prediction's own channels.
            size = (predictions[0] - unguided[0]).norm() / cond(pipe, call).norm()
            assert abs(float(size) - 0.05) < 1e-4


def cond(pipe, call):
    """The conditional prediction of the first step, without its variance."""
    seen = []
    hook = pipe.unet.register_forward_hook(lambda m, a, o: seen.append(o[0]))
    render(pipe, call | {"num_inference_steps": 2})
    hook.remove()
    return seen[0][1:, :4]


def test_a_unet_that_is_built_otherwise_is_refused_and_says_where_its_attention_is():
    """As DeepFloyd IF and Kandinsky 2 have it: attention without transformer blocks."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=6, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(16,), cross_attention_dim=8, attention_head_dim=8,
        down_block_types=("SimpleCrossAttnDownBlock2D",),
        up_block_types=("SimpleCrossAttnUpBlock2D",),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    words = "no attention with a processor where SD 1.5, SDXL has it .*it is at down_blocks.0.att"
    with pytest.raises(AttnControlError, match=words):
        attach(model, HeadGate("L0", gain=0.5))
