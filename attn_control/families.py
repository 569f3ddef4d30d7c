"""Per-model facts, as data: the only file in which a model's class is named.

A new model is one row of ``FAMILIES``: where its blocks are in execution order, which attention is
    which, in which order
the tokens stand, and how its pipelines run classifier-free guidance (facts read off diffusers
0.42.1).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn

from attn_control.call import Layout, Site
from attn_control.errors import AttnControlError

Arguments = Mapping[str, Any]
"""What the denoiser was called with, by parameter name."""

COMPONENTS = ("transformer", "transformer_2", "unet")


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: what people call it.
        denoiser: class name in diffusers.
        blocks: module paths of its blocks, "#" for an index, in execution order.
        slots: attention module's name inside a block -> slot.
        layout: (site, arguments, model) -> Layout of that site's main softmax.
        cfg: "batched" (rows [uncond, cond] in one call) or "split" (a call each, cond first).
        sample: the argument that holds the noisy latents; its first dimension is the batch.
        sigmas: number of steps -> noise levels that its pipelines hand to the scheduler, where they
            do not leave them to it.
        timestep_scale: what pipelines multiply the scheduler's timestep by.
        row_fields: arguments with a batch dimension, for perturbing the cond rows only; empty: full
            batch.
        parts: slot -> names of the softmax calls that one processor call makes, when not just
            "main".
    """

    name: str
    denoiser: str
    blocks: tuple[str, ...]
    slots: Mapping[str, str]
    layout: Callable[[Site, Arguments, Any], Layout]
    cfg: str
    sample: str = "hidden_states"
    sigmas: Callable[[int], Sequence[float]] | None = None
    timestep_scale: float = 1.0
    row_fields: frozenset[str] = frozenset()
    parts: Callable[[Site], tuple[str, ...]] = field(default=lambda site: ("main",))


def _grid(height: int, width: int, frames: int = 1) -> tuple[int, tuple[int, int, int]]:
    return frames * height * width, (frames, height, width)


def _sd3_layout(site: Site, args: Arguments, model: Any) -> Layout:
    patch = model.config.patch_size
    height, width = args["hidden_states"].shape[-2:]
    image = ("image", *_grid(height // patch, width // patch))
    if site.slot == "self2":
        return Layout.joint(image)
    return Layout.joint(image, ("text", args["encoder_hidden_states"].shape[1], None))


def _flux_layout(site: Site, args: Arguments, model: Any) -> Layout:
    text = ("text", args["encoder_hidden_states"].shape[1], None)
    tokens = args["hidden_states"].shape[1]
    ids = args.get("img_ids")
    if ids is None:
        return Layout.joint(text, ("image", tokens, None))
    # Kontext appends its reference after the image and marks it in the first column of the position
    # ids.
    ids = (ids[0] if ids.ndim == 3 else ids).detach().to("cpu", torch.float32)
    count = int((ids[:, 0] == 0).sum())
    height, width = (int(n) + 1 for n in ids[:count, 1:3].amax(dim=0))
    grid = (1, height, width) if height * width == count else None
    return Layout.joint(text, ("image", count, grid), ("reference", tokens - count, None))


def _wan_layout(site: Site, args: Arguments, model: Any) -> Layout:
    patch = model.config.patch_size
    frames, height, width = (
        n // p for n, p in zip(args["hidden_states"].shape[-3:], patch, strict=True)
    )
    video = Layout.joint(("video", *_grid(height, width, frames)))
    if site.slot == "self":
        return video
    return Layout.cross(video, Layout.joint(("text", args["encoder_hidden_states"].shape[1], None)))


def _wan_parts(site: Site) -> tuple[str, ...]:
    image = site.slot == "cross" and getattr(site.module, "add_k_proj", None) is not None
    return ("image", "main") if image else ("main",)


def _unet_layout(site: Site, args: Arguments, model: Any) -> Layout:
    height, width = args["sample"].shape[-2:]
    deepest = len(model.config.down_block_types) - 1
    group, *index = site.name.split(".")
    depth = {
        "down_blocks": lambda: int(index[0]),
        "up_blocks": lambda: deepest - int(index[0]),
    }.get(group, lambda: deepest)()
    for _ in range(depth):  # each level is a convolution of stride 2 and padding 1
        height, width = -(-height // 2), -(-width // 2)
    image = Layout.joint(("image", *_grid(height, width)))
    if site.slot == "self":
        return image
    return Layout.cross(image, Layout.joint(("text", args["encoder_hidden_states"].shape[1], None)))


FAMILIES: tuple[Family, ...] = (
    Family(
        name="SD 1.5, SDXL",
        denoiser="UNet2DConditionModel",
        blocks=(
            "down_blocks.#.attentions.#.transformer_blocks.#",
            "mid_block.attentions.#.transformer_blocks.#",
            "up_blocks.#.attentions.#.transformer_blocks.#",
        ),
        slots={"attn1": "self", "attn2": "cross"},
        layout=_unet_layout,
        cfg="batched",
        sample="sample",
        row_fields=frozenset(
            {
                "sample",
                "timestep",
                "encoder_hidden_states",
                "encoder_attention_mask",
                "timestep_cond",
                "added_cond_kwargs",
                "down_block_additional_residuals",
                "mid_block_additional_residual",
            }
        ),
    ),
    Family(
        name="SD3, SD3.5",
        denoiser="SD3Transformer2DModel",
        blocks=("transformer_blocks.#",),
        slots={"attn": "joint", "attn2": "self2"},
        layout=_sd3_layout,
        cfg="batched",
        row_fields=frozenset(
            {
                "hidden_states",
                "encoder_hidden_states",
                "pooled_projections",
                "timestep",
                "block_controlnet_hidden_states",
            }
        ),
    ),
    Family(
        name="FLUX.1",
        denoiser="FluxTransformer2DModel",
        blocks=("transformer_blocks.#", "single_transformer_blocks.#"),
        slots={"attn": "joint"},
        layout=_flux_layout,
        cfg="split",
        sigmas=lambda steps: [1 - n / steps for n in range(steps)],
        timestep_scale=1e-3,
    ),
    Family(
        name="Wan 2.1, 2.2",
        denoiser="WanTransformer3DModel",
        blocks=("blocks.#",),
        slots={"attn1": "self", "attn2": "cross"},
        layout=_wan_layout,
        cfg="split",
        parts=_wan_parts,
    ),
)

_BY_CLASS = {family.denoiser: family for family in FAMILIES}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper, or the module itself."""
    return getattr(model, "_orig_mod", model)


def family_of(model: nn.Module) -> Family:
    """The family row of a denoiser. Raises AttnControlError for a class without a row."""
    for cls in type(unwrap(model)).__mro__:
        if cls.__name__ in _BY_CLASS:
            return _BY_CLASS[cls.__name__]
    known = ", ".join(f"{family.denoiser} ({family.name})" for family in FAMILIES)
    raise AttnControlError(
        f"attach: {type(unwrap(model)).__name__} is not a model that attn_control knows; known:"
        f" {known}"
    )


def denoisers(target: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline, or the bare model itself, by component name.

    Raises:
        AttnControlError: neither a pipeline with a denoiser nor a model.
    """
    if isinstance(target, nn.Module):
        name = "unet" if family_of(target).sample == "sample" else "transformer"
        return {name: target}
    parts = ((name, getattr(target, name, None)) for name in COMPONENTS)
    found = {name: module for name, module in parts if isinstance(module, nn.Module)}
    if not found:
        raise AttnControlError(
            f"attach: expected a diffusers pipeline with a {' or '.join(COMPONENTS)}, or such a"
            " model;"
            f" got {type(target).__name__}"
        )
    for module in found.values():
        family_of(module)
    return found


def find_sites(model: nn.Module, component: str) -> list[Site]:
    """The denoiser's attention modules with a callable ``processor``, in execution order."""
    model = unwrap(model)
    family = family_of(model)
    patterns = [
        re.compile(re.escape(path).replace(r"\#", r"(\d+)") + r"\.(\w+)") for path in family.blocks
    ]
    found: list[tuple[tuple[int, ...], str, str, Any]] = []
    for name, module in model.named_modules():
        if not callable(getattr(module, "processor", None)):
            continue
        for order, pattern in enumerate(patterns):
            match = pattern.fullmatch(name)
            if match and match.groups()[-1] in family.slots:
                *index, leaf = match.groups()
                found.append(((order, *map(int, index)), name, family.slots[leaf], module))
    if not found:
        raise AttnControlError(
            f"attach: {type(model).__name__} has no attention module with a processor"
        )
    layers = {key: n for n, key in enumerate(sorted({key for key, *_ in found}))}
    sites = [
        Site(
            name=name,
            model=component,
            layer=layers[key],
            slot=slot,
            heads=module.heads,
            kv_heads=module.heads,
            head_dim=module.inner_dim // module.heads,
            module=module,
        )
        for key, name, slot, module in found
    ]
    return sorted(sites, key=lambda site: (site.layer, site.slot != "joint", site.slot == "cross"))


@lru_cache(64)
def _parameters(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The denoiser's arguments by name, read off the class: hooks hide the instance's."""
    return {**dict(zip(_parameters(cast(Any, type(unwrap(model)))), args, strict=False)), **kwargs}


def slice_rows(
    family: Family, arguments: Arguments, rows: tuple[int, int]
) -> dict[str, Any] | None:
    """The rows' arguments alone, or None where some argument's batch dimension is not known."""
    total = arguments[family.sample].shape[0]
    if rows == (0, total):
        return dict(arguments)

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[rows[0] : rows[1]] if value.ndim and value.shape[0] == total else value
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(cut(item) for item in value)
        return value

    def has_tensor(value: Any) -> bool:
        if isinstance(value, (dict, list, tuple)):
            return any(map(has_tensor, value.values() if isinstance(value, dict) else value))
        return isinstance(value, torch.Tensor)

    if any(has_tensor(value) for name, value in arguments.items() if name not in family.row_fields):
        return None
    return {
        name: cut(value) if name in family.row_fields else value
        for name, value in arguments.items()
    }
