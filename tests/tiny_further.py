"""Further tiny pipelines from text alone, one for each way in which guidance is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from tiny_more import MORE
from tiny_pictures import PICTURES
from tiny_pipelines import _quiet, _rand

Made = tuple[Any, dict[str, Any], str]
_TEXTS = {
    "prompt_embeds": _rand(1, 5, 32, seed=1),
    "negative_prompt_embeds": _rand(1, 5, 32, seed=2),
    "num_inference_steps": 3,
}
_MASKS = {
    f"{name}prompt_attention_mask": torch.ones(1, 5, dtype=torch.bool) for name in ("", "negative_")
}


def _made(cls: str, model: Any, layout: str, call: dict[str, Any], **parts: Any) -> Made:
    """Without encoders and decoders, which no step needs."""
    made = getattr(diffusers, cls)
    names = made._get_signature_keys(made)[0]
    given = dict.fromkeys(names) | {
        "transformer": model,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }
    return _quiet(made(**given | parts)), _TEXTS | call, layout


def qwen() -> Made:
    """Two calls, each in a cache context of its branch."""
    mask = torch.ones(1, 5, dtype=torch.bool)
    call = {
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds_mask": mask,
        "true_cfg_scale": 3.0,
        "height": 64,
        "width": 64,
    }
    return _made("QwenImagePipeline", MORE["qwen"](), "split", call)


def chroma() -> Made:
    """Two calls without a context."""
    call = _MASKS | {"guidance_scale": 3.0, "height": 64, "width": 64}
    return _made("ChromaPipeline", MORE["chroma"](), "split", call)


def ltx() -> Made:
    """One call of both branches, in a context that says so."""
    call = _MASKS | {"guidance_scale": 3.0, "height": 64, "width": 64, "num_frames": 17}
    return _made("LTXPipeline", MORE["ltx"](), "neg pos", call)


def cogview4() -> Made:
    call = {"guidance_scale": 3.0, "height": 64, "width": 64}
    return _made("CogView4Pipeline", MORE["cogview4"](), "split", call)


def hunyuanvideo() -> Made:
    """True CFG beside the distilled model's embedded scale."""
    call = _MASKS | {
        "pooled_prompt_embeds": _rand(1, 16, seed=3),
        "negative_pooled_prompt_embeds": _rand(1, 16, seed=4),
        "true_cfg_scale": 3.0,
        "height": 32,
        "width": 32,
        "num_frames": 9,
    }
    return _made("HunyuanVideoPipeline", MORE["hunyuanvideo"](), "split", call)


def lumina2() -> Made:
    """Two calls, whose prediction the pipeline turns round; timesteps that fall the other way."""
    call = _MASKS | {"guidance_scale": 3.0, "height": 32, "width": 32}
    return _made("Lumina2Pipeline", PICTURES["lumina2"].make(), "split", call)


FURTHER: dict[str, Callable[[], Made]] = {
    made.__name__: made for made in (qwen, chroma, ltx, cogview4, hunyuanvideo, lumina2)
}
