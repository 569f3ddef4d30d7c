"""Which rows are conditional, on tiny real pipelines that keep the flag in a local variable."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tiny_pictures import PICTURES
from tiny_pipelines import _quiet, _vae
from tiny_videos import VIDEOS
from tiny_wide import rand

from attn_control import attach
from attn_control.branches import guides_itself
from attn_control.processors import SoftPAG


def _auraflow():
    pipe = diffusers.AuraFlowPipeline(
        transformer=PICTURES["auraflow"].make(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
    )
    return pipe, {"height": 16, "width": 16}, 32


def _pixart():
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=PICTURES["pixart"].make(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
    )
    return pipe, {"height": 16, "width": 16, "use_resolution_binning": False}, 32


def _cogvideox():
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        temporal_compression_ratio=4,
    )  # fmt: skip
    pipe = diffusers.CogVideoXPipeline(
        transformer=VIDEOS["cogvideox"].make(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )
    return pipe, {"height": 32, "width": 32, "num_frames": 9}, 32


@pytest.mark.parametrize("make", [_auraflow, _pixart, _cogvideox])
@pytest.mark.parametrize("guided", [True, False])
def test_a_local_flag_tells_the_rows(make, guided):
    pipe, call, width = make()
    _quiet(pipe)
    masks = {}
    if make is not _cogvideox:
        mask = torch.ones(1, 5)
        masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    call |= masks | {
        "prompt_embeds": rand(1, 5, width, seed=1),
        "negative_prompt_embeds": rand(1, 5, width, seed=2),
        "guidance_scale": 4.0 if guided else 1.0,
        "num_inference_steps": 3,
        "output_type": "latent",
        "negative_prompt": None,
    }

    def run():
        return pipe(**call, generator=torch.Generator().manual_seed(0))[0]

    seen = []
    plain = run()
    with attach(pipe, SoftPAG("L1H1", u=0.6, scale=2.0, window="0-0.5")) as session:
        hook = pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(session.step))
        changed = run()
        hook.remove()
    branches = [step.branch for step in seen]
    assert set(branches) == {("uncond", "cond") if guided else ("cond",)}
    assert {step.index for step in seen} == {0, 1, 2} and {step.total for step in seen} == {3}
    assert not torch.equal(changed, plain)
    assert torch.equal(run(), plain)


class _Flags:
    """Both a local variable and an attribute of that name, as two pipelines of diffusers have."""

    do_classifier_free_guidance = True

    def reads_its_attribute(self):
        do_classifier_free_guidance = False
        return guides_itself(self), self.do_classifier_free_guidance, do_classifier_free_guidance

    def reads_its_variable(self):
        do_classifier_free_guidance = False
        return guides_itself(self), do_classifier_free_guidance

    def helped(self):
        do_classifier_free_guidance = False
        return self._help(), do_classifier_free_guidance

    def _help(self):
        return guides_itself(self)


def test_the_flag_that_the_method_reads_counts():
    assert _Flags().reads_its_attribute()[0] is True
    assert _Flags().reads_its_variable()[0] is False
    assert _Flags().helped()[0] is False
    assert guides_itself(_Flags()) is True and guides_itself(object()) is False
