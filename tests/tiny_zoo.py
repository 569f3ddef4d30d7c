"""Toy versions of the built-in models, as the zoo has them: untrained, with no weight at zero."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from tiny_lessons import TINY, examples

from attn_control.zoo.train import autoencoder, loop, video_autoencoder
from attn_control.zoo.train.__main__ import module
from attn_control.zoo.train.export import export


def tiny_vae(name: str) -> torch.nn.Module:
    """An untrained autoencoder of the model's class, the same each time."""
    torch.manual_seed(1)
    return video_autoencoder.build(4) if name == "shapes-wan" else autoencoder.build(8)


def export_tiny(root: Path, *names: str) -> Path:
    """Write `root/NAME/` for each, to be named by ATTN_CONTROL_ZOO_DIR."""
    for name in names:
        model, work = module(name), root / f"{name}-work"
        settings = dataclasses.replace(TINY[name], steps=1)
        loop.train(work, model.Lesson(settings, examples(name)))
        tiny_vae(name).save_pretrained(work / "vae")
        pipe = model.pipeline(work, work)
        # Untrained networks answer zero: their last layers are.
        for parameter in (pipe.unet if name == "shapes-sd15" else pipe.transformer).parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        export(pipe, root / name)
    return root
