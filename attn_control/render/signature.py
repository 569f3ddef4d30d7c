"""Holds sampler settings against the pipeline's own call: what it takes, what it would ignore."""

from __future__ import annotations

import inspect
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.render.job import Job, Sampler, close
from attn_control.render.yamlfile import KeyPath, YamlFile

# What render sets itself, and where the user says it instead.
OWNED = {
    "prompt": "prompts stand under 'prompts'",
    "generator": "seeds stand under 'seeds'",
    "latents": "the first noise comes from the seed",
    "output_type": "pictures are always PNG",
    "return_dict": "pictures are always PNG",
    "num_images_per_prompt": "each seed is one picture",
    "callback_on_step_end": "a file cannot hold a function",
    "callback_on_step_end_tensor_inputs": "a file cannot hold a function",
}


def call_parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of the pipeline's call, without self."""
    parameters = dict(inspect.signature(type(pipe).__call__).parameters)
    parameters.pop("self", None)
    return parameters


def check_pipeline(pipe: Any) -> None:
    """Refuse a pipeline that does not turn a prompt into pictures."""
    parameters = call_parameters(pipe)
    name = type(pipe).__name__
    if "num_frames" in parameters:
        raise AttnControlError(
            f"{name} makes video; `render` writes pictures so far, use attach() in Python for video"
        )
    needed = [
        key
        for key, each in parameters.items()
        if each.default is each.empty and key != "prompt" and each.kind not in (2, 4)
    ]
    if "prompt" not in parameters or needed:
        raise AttnControlError(
            f"{name} is not text-to-image: its call needs {needed or 'no prompt'}, expected "
            "a prompt alone"
        )


def check_sampler(pipe: Any, sampler: Sampler, source: YamlFile, path: KeyPath) -> None:
    """Refuse keys that this pipeline's call does not take, and values that it would ignore."""
    parameters = call_parameters(pipe)
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    given = sampler.kwargs()
    for key, value in given.items():
        at = (*path, "extra", key) if key in sampler.extra else (*path, key)
        if key in OWNED:
            raise source.error(at, f"cannot be set here, {OWNED[key]}")
        if key not in parameters and not open_ended:
            raise source.error(
                at,
                f"{type(pipe).__name__} takes no {key!r}{close(key, parameters)} (got {value!r})",
            )
    multiple = size_multiple(pipe)
    for key in ("height", "width"):
        if key in given and given[key] % multiple:
            raise source.error(
                (*path, key), f"{given[key]} is not a multiple of {multiple}, as this model needs"
            )


def check_samplers(
    pipe: Any, job: Job, source: YamlFile, merged: dict[str, dict[str, Any]]
) -> None:
    """The job's sampler and that of every variant; `merged` is what each variant will run with."""
    check_sampler(pipe, job.sampler, source, ("sampler",))
    with_cfg = {name for name, kwargs in merged.items() if uses_cfg(pipe, kwargs)}
    switch = "true_cfg_scale" if "true_cfg_scale" in call_parameters(pipe) else "guidance_scale"
    ignored = f"would be ignored without CFG; set {switch} above 1"
    for name, variant in job.variants.items():
        path = ("variants", name, "sampler")
        check_sampler(pipe, variant.sampler, source, path)
        if variant.sampler.kwargs().get("negative_prompt") and name not in with_cfg:
            raise source.error((*path, "negative_prompt"), ignored)
    if job.sampler.kwargs().get("negative_prompt") and not with_cfg:
        raise source.error(("sampler", "negative_prompt"), f"{ignored} in some variant")


def default_of(pipe: Any, key: str, fallback: Any = None) -> Any:
    """The default of one call parameter."""
    parameter = call_parameters(pipe).get(key)
    if parameter is None or parameter.default is parameter.empty:
        return fallback
    return parameter.default


def uses_cfg(pipe: Any, kwargs: dict[str, Any]) -> bool:
    """True when a run with these arguments has an unconditional row beside each conditional one."""
    parameters = call_parameters(pipe)
    if "true_cfg_scale" in parameters:
        scale = kwargs.get("true_cfg_scale", default_of(pipe, "true_cfg_scale", 1.0))
        return bool(scale > 1 and kwargs.get("negative_prompt") is not None)
    if "guidance_scale" not in parameters:
        return False
    denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if getattr(getattr(denoiser, "config", None), "guidance_embeds", False):
        return False  # guidance-distilled: the scale is an input of the model
    scale = kwargs.get("guidance_scale", default_of(pipe, "guidance_scale", 1.0))
    return bool(scale is not None and scale > 1)


def size_multiple(pipe: Any) -> int:
    """What height and width must be multiples of."""
    factor = getattr(pipe, "vae_scale_factor", None) or 1
    denoiser = getattr(pipe, "transformer", None)
    patch = getattr(getattr(denoiser, "config", None), "patch_size", None)
    if hasattr(pipe, "_pack_latents"):
        patch = 2  # packs two by two latents itself, and would round other sizes down silently
    return int(factor) * (patch if isinstance(patch, int) and patch > 0 else 1)
