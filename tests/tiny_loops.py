"""Explicit sampling loops: scheduler, bare model and hand-made perturbed attention, without
attn_control. ``AtTheScheduler`` borrows a pipeline's own loop.
"""

from __future__ import annotations

import contextlib
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


class AtTheScheduler:
    """Guidance where a pipeline hands its combined prediction to its scheduler: the pipeline's own
    loop, ``scheduler.step(prediction + scale * (cond - perturbed))``.

    Which call is conditional, and which of its rows, is written down by the test. Without
    ``perturbing`` it only records.

    Attributes:
        predictions: what the scheduler was given, step by step.
        rows: batch sizes of the denoiser's calls.
    """

    def __init__(
        self,
        pipe: Any,
        models: list[Any],
        perturbing: Callable[[Any], Any] | None = None,
        scale: float = 0.0,
        layout: str = "one",
        sign: float = 1.0,
        due: Due = always,
        steps: int = 0,
    ) -> None:
        self.pipe, self.models, self.perturbing, self.scale = pipe, models, perturbing, scale
        self.layout, self.sign, self.due, self.steps = layout, sign, due, steps
        self.predictions: list[Tensor] = []
        self.rows: list[int] = []
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Tensor]] = []

    def _keep(self, model: Any, args: Any, kwargs: Any, output: Any) -> None:
        kwargs = {n: dict(v) if isinstance(v, dict) else v for n, v in kwargs.items()}
        self._calls.append((model, args, kwargs, self._tensor(output)))
        self.rows.append(len(self._calls[-1][-1]))

    def _tensor(self, output: Any) -> Tensor:
        found = output if isinstance(output, Tensor) else output[0]
        return torch.stack(found) if isinstance(found, list) else found

    def _delta(self) -> Tensor:
        """Of the conditional rows of this step's conditional call."""
        model, args, kwargs, cond = self._calls[0]
        calls = {"one": 1, "split": 2, "neg pos": 1, "pos neg": 1, "pos image neg": 1}[self.layout]
        assert len(self._calls) == calls, (len(self._calls), self.layout)
        branches = {"neg pos": 2, "pos neg": 2, "pos image neg": 3}.get(self.layout, 1)
        rows = len(cond) // branches
        first = rows if self.layout == "neg pos" else 0
        assert self.perturbing is not None
        with self._silent(), self.perturbing(model):
            perturbed = self._tensor(model(*args, **kwargs))
        return (cond - perturbed)[first : first + rows]

    def _silent(self) -> Any:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        stack = contextlib.ExitStack()
        stack.callback(self._listen)
        return stack

    def _listen(self) -> None:
        self._hooks = [
            model.register_forward_hook(self._keep, with_kwargs=True) for model in self.models
        ]

    def __enter__(self) -> AtTheScheduler:
        self._listen()
        scheduler = self.pipe.scheduler
        own = scheduler.step

        def step(prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
            number = len(self.predictions)
            if self.perturbing is not None and self.due(number, self.steps):
                delta = self.sign * self.scale * self._delta()
                if delta.ndim == 3:  # packed tokens, of which references are not denoised
                    delta = delta[:, : prediction.shape[1]]
                prediction = prediction + delta.reshape(prediction.shape)
            self.predictions.append(prediction.clone())
            self._calls = []
            return own(prediction, *args, **kwargs)

        scheduler.step = step
        return self

    def __exit__(self, *error: Any) -> None:
        del self.pipe.scheduler.step
        for hook in self._hooks:
            hook.remove()
