"""Holds sampler settings against the pipeline's own call: what it takes, what it would ignore."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.render.job import Job, Sampler, VideoSpec, close
from attn_control.render.media import VideoFormat, check_encoder
from attn_control.render.prompts import Prompt
from attn_control.render.yamlfile import KeyPath, YamlFile

# What render sets itself, and where the user says it instead.
OWNED = {
    "prompt": "prompts stand under 'prompts'",
    "image": "pictures stand beside their prompts, '- {prompt: ..., image: FILE}'",
    "generator": "seeds stand under 'seeds'",
    "latents": "the first noise comes from the seed",
    "output_type": "files are written by 'video' and else as PNG",
    "return_dict": "files are written by 'video' and else as PNG",
    "num_images_per_prompt": "each seed is one picture",
    "num_videos_per_prompt": "each seed is one video",
    "callback_on_step_end": "a file cannot hold a function",
    "callback_on_step_end_tensor_inputs": "a file cannot hold a function",
}


def call_parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of the pipeline's call, without self."""
    parameters = dict(inspect.signature(type(pipe).__call__).parameters)
    parameters.pop("self", None)
    return parameters


def makes_video(pipe: Any) -> bool:
    """Whether a call returns `frames`: its class uses an output class that has them."""
    from diffusers.utils import BaseOutput

    owner = next(cls for cls in type(pipe).__mro__ if "__call__" in vars(cls))
    known = vars(sys.modules[owner.__module__])
    methods = (inspect.unwrap(each) for each in vars(owner).values() if inspect.isfunction(each))
    used = (known.get(name) for method in methods for name in method.__code__.co_names)
    outputs = (each for each in used if isinstance(each, type) and issubclass(each, BaseOutput))
    return any("frames" in getattr(each, "__dataclass_fields__", {}) for each in outputs)


def check_pipeline(pipe: Any) -> None:
    """Refuse a pipeline whose call needs more than a prompt and a picture."""
    parameters = call_parameters(pipe)
    needed = [
        key
        for key, each in parameters.items()
        if each.default is each.empty and key not in ("prompt", "image") and each.kind not in (2, 4)
    ]
    if "prompt" not in parameters or needed:
        raise AttnControlError(
            f"{type(pipe).__name__} makes no picture or video of a prompt: its call needs "
            f"{needed or 'no prompt'}, expected a prompt, perhaps with an image"
        )


def check_pictures(pipe: Any, prompts: list[Prompt], source: YamlFile) -> None:
    """Refuse pictures beside prompts that the pipeline does not take, and prompts that lack one."""
    name, taken = type(pipe).__name__, call_parameters(pipe).get("image")
    for index, prompt in enumerate(prompts):
        if prompt.image is not None and taken is None:
            at: KeyPath = ("prompts",) if prompt.fixed else ("prompts", index, "image")
            raise source.error(at, f"{name} takes no picture, got {prompt.image.name!r}")
        if prompt.image is None and taken is not None and taken.default is taken.empty:
            raise source.error(
                ("prompts",),
                f"{name} needs a picture beside each prompt, '- {{prompt: ..., image: FILE}}'; "
                f"{prompt} has none",
            )


def video_format(
    pipe: Any, spec: VideoSpec | None, kwargs: dict[str, Any], lossless: bool, source: YamlFile
) -> VideoFormat | None:
    """How this pipeline's videos are written; None for one that makes pictures.

    lossless: whether `auto` is png. Without `fps` a video runs at the `frame_rate` or `fps` that
    the pipeline is called with, and at 16 where it knows neither.
    """
    if not makes_video(pipe):
        if spec is not None:
            raise source.error(
                ("video",), f"would be ignored: {type(pipe).__name__} makes pictures"
            )
        return None
    spec = spec or VideoSpec()
    kind = spec.format
    if kind == "auto":
        kind = "png" if lossless else "mp4"
    if kind == "mp4":
        try:
            check_encoder()
        except AttnControlError as error:
            raise source.error(("video", "format"), str(error)) from None
    rates = (kwargs.get(key) or default_of(pipe, key) for key in ("frame_rate", "fps"))
    own = next((float(rate) for rate in rates if isinstance(rate, (int, float))), 16.0)
    return VideoFormat(kind, own if spec.fps is None else spec.fps)


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
    period = frame_period(pipe)
    if "num_frames" in sampler.model_fields_set and (given["num_frames"] - 1) % period:
        near = (given["num_frames"] - 1) // period * period + 1
        raise source.error(
            (*path, "num_frames"),
            f"{given['num_frames']} is not 1 more than a multiple of {period}, as this model "
            f"needs; the next are {near} and {near + period}",
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
    names = (
        "vae_scale_factor", "vae_scale_factor_spatial",
        "vae_spatial_compression_ratio", "vae_spatial_scale_factor",
    )  # fmt: skip
    factor = next(filter(None, (getattr(pipe, name, None) for name in names)), 1)
    denoiser = getattr(pipe, "transformer", None)
    patch = getattr(getattr(denoiser, "config", None), "patch_size", None)
    if isinstance(patch, (list, tuple)) and patch:
        patch = patch[-1]  # of (time, height, width)
    if hasattr(pipe, "_pack_latents") and hasattr(pipe, "vae_scale_factor"):
        patch = 2  # packs two by two latents itself, and would round other sizes down silently
    return int(factor) * (patch if isinstance(patch, int) and patch > 0 else 1)


def frame_period(pipe: Any) -> int:
    """What the number of frames must be 1 more than a multiple of; 1 where it may be any.

    Video autoencoders that keep the first frame and halve time behind it make no other numbers.
    Pipelines whose own default is another number count differently.
    """
    names = (
        "vae_scale_factor_temporal", "vae_temporal_compression_ratio",
        "vae_temporal_scale_factor", "temporal_compression_ratio",
    )  # fmt: skip
    period = next(filter(None, (getattr(pipe, name, None) for name in names)), 1)
    own = default_of(pipe, "num_frames")
    return int(period) if isinstance(own, int) and (own - 1) % int(period) == 0 else 1
