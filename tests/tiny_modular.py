"""Tiny modular pipelines: blocks that set timesteps and denoise, no encoders and no decoders."""

from __future__ import annotations

import importlib
from typing import Any

import diffusers
import tiny
import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks
from tiny_more import MORE
from tiny_pipelines import _rand

_EULER = diffusers.FlowMatchEulerDiscreteScheduler


def _blocks(family: str, **names: str) -> Any:
    """A pipeline of blocks, given as module=class of one of diffusers' modular families."""
    made = {}
    for place, name in names.items():
        module = "denoise" if place == "denoise" else "before_denoise"
        path = f"diffusers.modular_pipelines.{family}.{module}"
        made[place] = getattr(importlib.import_module(path), name)()
    return SequentialPipelineBlocks.from_blocks_dict(made).init_pipeline()


def sd3() -> tuple[Any, dict[str, Any]]:
    """Guider-driven: a call for each branch, though the ordinary pipeline makes one of both."""
    pipe = _blocks(
        "stable_diffusion_3",
        times="StableDiffusion3SetTimestepsStep",
        denoise="StableDiffusion3DenoiseStep",
    )
    pipe.update_components(transformer=tiny.sd3(), scheduler=_EULER())
    return pipe, {
        "latents": _rand(1, 4, 8, 8, seed=0),
        "prompt_embeds": _rand(1, 5, 32, seed=1),
        "negative_prompt_embeds": _rand(1, 5, 32, seed=2),
        "pooled_prompt_embeds": _rand(1, 16, seed=3),
        "negative_pooled_prompt_embeds": _rand(1, 16, seed=4),
        "height": 64,
        "width": 64,
        "num_inference_steps": 3,
    }


def ltx() -> tuple[Any, dict[str, Any]]:
    """As above, with a cache context for each branch."""
    pipe = _blocks("ltx", times="LTXSetTimestepsStep", denoise="LTXDenoiseStep")
    pipe.update_components(transformer=MORE["ltx"](), scheduler=_EULER())
    return pipe, {
        "latents": _rand(1, 12, 8, seed=0),
        "prompt_embeds": _rand(1, 5, 32, seed=1),
        "negative_prompt_embeds": _rand(1, 5, 32, seed=2),
        "prompt_attention_mask": torch.ones(1, 5),
        "negative_prompt_attention_mask": torch.ones(1, 5),
        "height": 64,
        "width": 64,
        "num_frames": 17,
        "dtype": torch.float32,
        "num_inference_steps": 3,
    }


def wan() -> tuple[Any, dict[str, Any]]:
    pipe = _blocks("wan", times="WanSetTimestepsStep", denoise="WanDenoiseStep")
    pipe.update_components(transformer=tiny.wan(), scheduler=_EULER())
    return pipe, {
        "latents": _rand(1, 4, 3, 4, 4, seed=0),
        "prompt_embeds": _rand(1, 6, 16, seed=1),
        "negative_prompt_embeds": _rand(1, 6, 16, seed=2),
        "dtype": torch.float32,
        "num_inference_steps": 3,
    }


def wan_two() -> tuple[Any, dict[str, Any]]:
    """Wan 2.2: two denoisers, each with a guider of its own."""
    pipe = _blocks("wan", times="WanSetTimestepsStep", denoise="Wan22DenoiseStep")
    low = tiny.wan()
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.mul_(0.9)
    pipe.update_components(
        transformer=tiny.wan(), transformer_2=low, scheduler=_EULER(), boundary_ratio=0.5
    )
    call = wan()[1]
    return pipe, call | {"num_inference_steps": 4}


def flux() -> tuple[Any, dict[str, Any]]:
    """Distilled: no guider, and one call a step."""
    pipe = _blocks(
        "flux", times="FluxSetTimestepsStep", places="FluxRoPEInputsStep", denoise="FluxDenoiseStep"
    )
    pipe.update_components(transformer=tiny.flux(), scheduler=_EULER())
    return pipe, {
        "latents": _rand(1, 16, 16, seed=0),
        "prompt_embeds": _rand(1, 5, 32, seed=1),
        "pooled_prompt_embeds": _rand(1, 16, seed=3),
        "batch_size": 1,
        "height": 64,
        "width": 64,
        "num_inference_steps": 3,
    }


MODULAR = {"sd3": sd3, "ltx": ltx, "wan": wan, "wan_two": wan_two, "flux": flux}
