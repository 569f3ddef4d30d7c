"""Unfinished trainings, small enough to be committed, so that another machine can go on from them.

Averaged weights of all that is trained, in float16, and the autoencoder whose latents they know;
no optimizer state. `--init-from DIR/trainee.safetensors` starts from them. What is finished is
exported instead (export.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors.torch import load_model, save_model
from torch import nn


def keep(trainee: nn.Module, vae: ModelMixin, out: Path) -> None:
    """Write `out/trainee.safetensors` and `out/vae`, in float16."""
    out.mkdir(parents=True, exist_ok=True)
    save_model(trainee.to(torch.float16), str(out / "trainee.safetensors"))
    vae.to(torch.float16).save_pretrained(out / "vae")


def load_kept(trainee: nn.Module, file: Path) -> None:
    """Put the weights of a `trainee.safetensors` into a trainee of any dtype."""
    load_model(trainee, str(file))
