"""Whole tiny pipelines without encoders: prompts come as embeddings, pictures go out as latents."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny
import torch


def _vae(kl: bool = True) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def _rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sd3(model: Any = None, scheduler: Any = None) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=model or tiny.sd3(),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    call = {
        "prompt_embeds": _rand(1, 5, 32, seed=1),
        "negative_prompt_embeds": _rand(1, 5, 32, seed=2),
        "pooled_prompt_embeds": _rand(1, 16, seed=3),
        "negative_pooled_prompt_embeds": _rand(1, 16, seed=4),
        "height": 16,
        "width": 16,
        "guidance_scale": 4.0,
        "num_inference_steps": 4,
    }
    return _quiet(pipe), call


def flux(model: Any = None, true_cfg: bool = False) -> tuple[Any, dict[str, Any]]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe = diffusers.FluxPipeline(
        transformer=model or tiny.flux(),
        scheduler=scheduler,
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    call: dict[str, Any] = {
        "prompt_embeds": _rand(1, 5, 32, seed=1),
        "pooled_prompt_embeds": _rand(1, 16, seed=3),
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
    }
    if true_cfg:
        call |= {
            "negative_prompt_embeds": _rand(1, 5, 32, seed=2),
            "negative_pooled_prompt_embeds": _rand(1, 16, seed=4),
            "true_cfg_scale": 3.0,
        }
    return _quiet(pipe), call


def wan(model: Any = None, second: Any = None, scheduler: Any = None) -> tuple[Any, dict[str, Any]]:
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1] * 4,
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = diffusers.WanPipeline(
        transformer=model or tiny.wan(),
        transformer_2=second,
        boundary_ratio=0.5 if second is not None else None,
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )
    call = {
        "prompt_embeds": _rand(1, 6, 16, seed=1),
        "negative_prompt_embeds": _rand(1, 6, 16, seed=2),
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "guidance_scale": 3.0,
        "num_inference_steps": 4,
    }
    return _quiet(pipe), call


def sd15(scheduler: Any = None) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableDiffusionPipeline(
        unet=tiny.unet(),
        scheduler=scheduler or diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    call = {
        "prompt_embeds": _rand(1, 7, 32, seed=1),
        "negative_prompt_embeds": _rand(1, 7, 32, seed=2),
        "height": 32,
        "width": 32,
        "guidance_scale": 4.0,
        "num_inference_steps": 4,
    }
    return _quiet(pipe), call


def sdxl() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=tiny.unet(sdxl=True),
        scheduler=diffusers.EulerDiscreteScheduler(),
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        add_watermarker=False,
    )
    call = {
        "prompt_embeds": _rand(1, 7, 32, seed=1),
        "negative_prompt_embeds": _rand(1, 7, 32, seed=2),
        "pooled_prompt_embeds": _rand(1, 16, seed=3),
        "negative_pooled_prompt_embeds": _rand(1, 16, seed=4),
        "height": 32,
        "width": 32,
        "guidance_scale": 4.0,
        "num_inference_steps": 4,
    }
    return _quiet(pipe), call


PIPELINES = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "flux_true_cfg": lambda: flux(true_cfg=True),
    "wan": wan,
}


def render(pipe: Any, call: dict[str, Any], seed: int = 0) -> torch.Tensor:
    """Final latents of a run."""
    torch.manual_seed(seed)  # some pipelines encode pictures without their generator
    output = pipe(**call, generator=torch.Generator().manual_seed(seed), output_type="latent")
    return output[0] if isinstance(output[0], torch.Tensor) else output[0][0]


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
