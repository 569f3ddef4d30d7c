"""Runs of whole pipelines, as they are or guided by hand where they meet their scheduler."""

from __future__ import annotations

from typing import Any

from tiny_loops import AtTheScheduler
from tiny_oracle import attention
from tiny_pipelines import render
from torch import Tensor


def denoisers(pipe: Any) -> list[Any]:
    found = (getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2"))
    return [model for model in found if model is not None]


def explicit(
    pipe: Any, call: Any, layout: str, changes: Any, scale: float, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The same, with guidance added there by hand."""
    by_hand = AtTheScheduler(
        pipe, denoisers(pipe), lambda model: attention(model, changes), scale, layout, **options
    )
    with by_hand:
        latents = render(pipe, call)
    return latents, by_hand.predictions


def recorded(pipe: Any, call: Any) -> tuple[Tensor, list[Tensor]]:
    """Final latents, and what the pipeline hands its scheduler."""
    with AtTheScheduler(pipe, []) as seen:
        latents = render(pipe, call)
    return latents, seen.predictions
