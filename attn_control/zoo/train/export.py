"""From checkpoints to a folder that `StableDiffusion3Pipeline.from_pretrained` loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from attn_control.zoo.train.common import load
from attn_control.zoo.train.denoiser import Settings, Trainee
from attn_control.zoo.train.text import build_silent_t5

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
    t5, t5_tokenizer = build_silent_t5()
    return StableDiffusion3Pipeline(
        transformer=trainee.denoiser.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae.eval(),
        text_encoder=trainee.encoders[0].eval(),
        tokenizer=trainee.tokenizer,
        text_encoder_2=trainee.encoders[1].eval(),
        tokenizer_2=trainee.tokenizer,
        text_encoder_3=t5.eval(),
        tokenizer_3=t5_tokenizer,
    )


def export(work: Path, out: Path) -> None:
    """Write the pipeline to `out` as safetensors (large parts in float16, no variant suffix)."""
    pipe = pipeline(work)
    # Only the large parts: transformers loads text encoders as they are stored, diffusers its own
    # as float32, and a plain `from_pretrained` must end in one dtype.
    pipe.transformer.to(torch.float16)
    pipe.vae.to(torch.float16)
    pipe.save_pretrained(out, safe_serialization=True)
    # The tokenizer class by the name that older transformers know, too.
    index = out / "model_index.json"
    parts = json.loads(index.read_text())
    parts["tokenizer_3"] = ["transformers", "PreTrainedTokenizerFast"]
    index.write_text(json.dumps(parts, indent=2) + "\n")
    # AutoencoderTiny writes this key and warns of it when it reads it back.
    config = out / "vae" / "config.json"
    values = json.loads(config.read_text())
    values.pop("block_out_channels", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
