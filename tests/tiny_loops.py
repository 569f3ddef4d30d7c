"""Explicit sampling loops: scheduler, bare model and hand-made perturbed attention, without
pipelines and without attn_control.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from tiny_oracle import Change, attention
from torch import Tensor

Due = Callable[[int, int], bool]
"""(step, number of steps) -> whether guidance acts there."""


def always(step: int, steps: int) -> bool:
    return True


def _perturbed(model: Any, changes: dict[str, Change], **kwargs: Any) -> Tensor:
    with attention(model, changes) as seen:
        out = model(**kwargs, return_dict=False)[0]
    assert set(changes) <= set(seen)
    return out


def start(family: str) -> Tensor:
    """The initial latents that both the pipeline and the loop are given."""
    g = torch.Generator().manual_seed(7)
    shape = {"flux": (1, 16, 16), "wan": (1, 4, 3, 4, 4), "sd3": (1, 4, 8, 8)}.get(
        family, (1, 4, 16, 16)
    )
    return torch.randn(shape, generator=g)


@torch.no_grad()
def batched(
    model: Any,
    scheduler: Any,
    call: dict[str, Any],
    latents: Tensor,
    changes: dict[str, Change],
    scale: float,
    due: Due = always,
    gates: dict[str, Change] | None = None,
) -> Tensor:
    """SD 1.5, SDXL and SD3: one forward of [uncond, cond], one of the perturbed cond row; with
    ``gates``, changes of the main forward at the due steps.
    """
    scheduler.set_timesteps(call["num_inference_steps"])
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    cfg = call["guidance_scale"] > 1
    unet = hasattr(model, "conv_in")
    pooled = "pooled_prompt_embeds" in call

    def arguments(rows: Tensor, t: Tensor, branches: tuple[str, ...]) -> dict[str, Any]:
        prompts = torch.cat([call[f"{b}prompt_embeds"] for b in branches])
        pools = torch.cat([call[f"{b}pooled_prompt_embeds"] for b in branches]) if pooled else None
        if not unet:
            return {
                "hidden_states": rows,
                "timestep": t.expand(len(rows)),
                "encoder_hidden_states": prompts,
                "pooled_projections": pools,
            }
        given: dict[str, Any] = {"sample": rows, "timestep": t, "encoder_hidden_states": prompts}
        if pooled:
            size = [call["height"], call["width"]]
            ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)
            given["added_cond_kwargs"] = {
                "text_embeds": pools,
                "time_ids": ids.repeat(len(rows), 1),
            }
        return given

    steps = len(scheduler.timesteps)
    for number, t in enumerate(scheduler.timesteps):
        rows = torch.cat([latents] * 2) if cfg else latents
        if hasattr(scheduler, "scale_model_input"):
            rows = scheduler.scale_model_input(rows, t)
        with attention(model, gates if gates and due(number, steps) else {}):
            prediction = model(**arguments(rows, t, ("negative_", "") if cfg else ("",)))[0]
        cond = prediction[-1:]
        if cfg:
            prediction = prediction[:1] + call["guidance_scale"] * (cond - prediction[:1])
        if changes and due(number, steps):
            perturbed = _perturbed(model, changes, **arguments(rows[-1:], t, ("",)))
            prediction = prediction + scale * (cond - perturbed)
        latents = scheduler.step(prediction, t, latents)[0]
    return latents


@torch.no_grad()
def flux(
    model: Any,
    scheduler: Any,
    call: dict[str, Any],
    latents: Tensor,
    changes: dict[str, Change],
    scale: float,
    due: Due = always,
) -> Tensor:
    """True CFG (two forwards) when there is a negative prompt, else the bare prediction."""
    steps = call["num_inference_steps"]
    scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps))
    ids = torch.zeros(4, 4, 3)
    ids[..., 1] += torch.arange(4)[:, None]
    ids[..., 2] += torch.arange(4)[None]

    def arguments(t: Tensor, branch: str) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": t.expand(1) / 1000,
            "encoder_hidden_states": call[f"{branch}prompt_embeds"],
            "pooled_projections": call[f"{branch}pooled_prompt_embeds"],
            "img_ids": ids.reshape(16, 3),
            "txt_ids": torch.zeros(5, 3),
        }

    for number, t in enumerate(scheduler.timesteps):
        cond = prediction = model(**arguments(t, ""))[0]
        if "true_cfg_scale" in call:
            uncond = model(**arguments(t, "negative_"))[0]
            prediction = uncond + call["true_cfg_scale"] * (cond - uncond)
        if due(number, len(scheduler.timesteps)):
            perturbed = _perturbed(model, changes, **arguments(t, ""))
            prediction = prediction + scale * (cond - perturbed)
        latents = scheduler.step(prediction, t, latents)[0]
    return latents


@torch.no_grad()
def wan(
    model: Any,
    scheduler: Any,
    call: dict[str, Any],
    latents: Tensor,
    changes: dict[str, Change],
    scale: float,
    due: Due = always,
    low: Any = None,
) -> Tensor:
    """Two forwards a step; with ``low``, the second model takes over below half the noise."""
    scheduler.set_timesteps(call["num_inference_steps"])
    for number, t in enumerate(scheduler.timesteps):
        current = model if low is None or t >= 500 else low

        def arguments(prompt: str, t: Tensor = t, latents: Tensor = latents) -> dict[str, Any]:
            return {
                "hidden_states": latents,
                "timestep": t.expand(1),
                "encoder_hidden_states": call[prompt],
            }

        cond = current(**arguments("prompt_embeds"))[0]
        uncond = current(**arguments("negative_prompt_embeds"))[0]
        prediction = uncond + call["guidance_scale"] * (cond - uncond)
        if due(number, len(scheduler.timesteps)):
            perturbed = _perturbed(current, changes, **arguments("prompt_embeds"))
            prediction = prediction + scale * (cond - perturbed)
        latents = scheduler.step(prediction, t, latents)[0]
    return latents
