"""From checkpoints to a folder that `StableDiffusion3Pipeline.from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from attn_control.zoo.train.common import load
from attn_control.zoo.train.denoiser import Settings, Trainee

SHIFT = 2.0  # of the sampler's times


def pipeline(work: Path, checkpoint: str = "denoiser.pt") -> StableDiffusion3Pipeline:
    """The pipeline with the averaged weights of a checkpoint, float32."""
    state = load(work / checkpoint)
    trainee = Trainee(Settings(**state["settings"]))
    trainee.load_state_dict(state["model"])
    for value, p in zip(state["average"]["values"], trainee.parameters(), strict=True):
        p.data.copy_(value)
    refined = work / "vae-refined"
    vae = AutoencoderTiny.from_pretrained(refined if refined.is_dir() else work / "vae")
    return StableDiffusion3Pipeline(
        transformer=trainee.denoiser.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae.eval(),
        text_encoder=trainee.encoders[0].eval(),
        tokenizer=trainee.tokenizer,
        text_encoder_2=trainee.encoders[1].eval(),
        tokenizer_2=trainee.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def export(work: Path, out: Path) -> None:
    """Write the pipeline to `out` as float16 safetensors, without variant suffix."""
    pipe = pipeline(work)
    pipe.to(torch.float16)
    pipe.save_pretrained(out, safe_serialization=True)
