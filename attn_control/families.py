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

from attn_control import layouts
from attn_control.call import Site
from attn_control.errors import AttnControlError
from attn_control.layouts import Arguments, LayoutOf

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
        block_returns: the arguments that a block hands on, in the order in which it returns them;
            empty where blocks cannot be skipped yet.
        feed_forward: names of the feed-forward modules inside a block.
        shared_fields: tensors that all rows share.
        text: the argument that holds the text embedding.
        parts: slot -> names of the softmax calls that one processor call makes, when not just
            "main".
    """

    name: str
    denoiser: str
    blocks: tuple[str, ...]
    slots: Mapping[str, str]
    layout: LayoutOf
    cfg: str
    block_returns: tuple[str, ...] = ()
    feed_forward: tuple[str, ...] = ("ff", "ff_context")
    sample: str = "hidden_states"
    sigmas: Callable[[int], Sequence[float]] | None = None
    timestep_scale: float = 1.0
    row_fields: frozenset[str] = frozenset()
    shared_fields: frozenset[str] = frozenset()
    text: str = "encoder_hidden_states"
    parts: Callable[[Site], tuple[str, ...]] = field(default=lambda site: ("main",))


def _wan_parts(site: Site) -> tuple[str, ...]:
    image = site.slot == "cross" and getattr(site.module, "add_k_proj", None) is not None
    return ("image", "main") if image else ("main",)


_FLUX_ROWS = frozenset(
    {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"}
)
_WAN_ROWS = frozenset(
    {"hidden_states", "encoder_hidden_states", "encoder_hidden_states_image", "timestep"}
)
_IDS = frozenset({"img_ids", "txt_ids"})
_JOINT = ("encoder_hidden_states", "hidden_states")
_FLUX_BLOCKS = ("transformer_blocks.#", "single_transformer_blocks.#")
_TWO = {"attn1": "self", "attn2": "cross"}

FAMILIES: tuple[Family, ...] = (
    Family(
        name="SD 1.5, SDXL",
        denoiser="UNet2DConditionModel",
        blocks=(
            "down_blocks.#.attentions.#.transformer_blocks.#",
            "mid_block.attentions.#.transformer_blocks.#",
            "up_blocks.#.attentions.#.transformer_blocks.#",
        ),
        slots=_TWO,
        layout=layouts.unet,
        cfg="batched",
        block_returns=("hidden_states",),
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
        layout=layouts.image_then_text,
        cfg="batched",
        block_returns=_JOINT,
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
        blocks=_FLUX_BLOCKS,
        slots={"attn": "joint"},
        layout=layouts.text_then_packed,
        cfg="split",
        block_returns=_JOINT,
        feed_forward=("ff", "ff_context", "act_mlp"),
        timestep_scale=1e-3,
        row_fields=_FLUX_ROWS,
        shared_fields=_IDS,
    ),
    Family(
        name="FLUX.2",
        denoiser="Flux2Transformer2DModel",
        blocks=_FLUX_BLOCKS,
        slots={"attn": "joint"},
        layout=layouts.text_then_packed,
        cfg="split",
        sigmas=lambda steps: [1 - n / steps for n in range(steps)],
        timestep_scale=1e-3,
        row_fields=_FLUX_ROWS | _IDS,
    ),
    Family(
        name="Chroma",
        denoiser="ChromaTransformer2DModel",
        blocks=_FLUX_BLOCKS,
        slots={"attn": "joint"},
        layout=layouts.text_then_packed,
        cfg="split",
        timestep_scale=1e-3,
        row_fields=_FLUX_ROWS | {"attention_mask"},
        shared_fields=_IDS,
    ),
    Family(
        name="Ovis-Image",
        denoiser="OvisImageTransformer2DModel",
        blocks=_FLUX_BLOCKS,
        slots={"attn": "joint"},
        layout=layouts.text_then_packed,
        cfg="split",
        timestep_scale=1e-3,
        row_fields=_FLUX_ROWS,
        shared_fields=_IDS,
    ),
    Family(
        name="LongCat-Image",
        denoiser="LongCatImageTransformer2DModel",
        blocks=_FLUX_BLOCKS,
        slots={"attn": "joint"},
        layout=layouts.text_then_packed,
        cfg="split",
        timestep_scale=1e-3,
        row_fields=_FLUX_ROWS,
        shared_fields=_IDS,
    ),
    Family(
        name="Qwen-Image, Qwen-Image-Edit",
        denoiser="QwenImageTransformer2DModel",
        blocks=("transformer_blocks.#",),
        slots={"attn": "joint"},
        layout=layouts.text_then_shapes,
        cfg="split",
        timestep_scale=1e-3,
        row_fields=_FLUX_ROWS | {"encoder_hidden_states_mask", "additional_t_cond"},
    ),
    Family(
        name="CogView4",
        denoiser="CogView4Transformer2DModel",
        blocks=("transformer_blocks.#",),
        slots={"attn1": "joint"},
        layout=layouts.text_then_image,
        cfg="split",
        row_fields=frozenset(
            {
                "hidden_states",
                "encoder_hidden_states",
                "timestep",
                "original_size",
                "target_size",
                "crop_coords",
                "attention_mask",
            }
        ),
    ),
    Family(
        name="Wan 2.1, 2.2",
        denoiser="WanTransformer3DModel",
        blocks=("blocks.#",),
        slots=_TWO,
        layout=layouts.video_and_text,
        cfg="split",
        block_returns=("hidden_states",),
        feed_forward=("ffn",),
        parts=_wan_parts,
        row_fields=_WAN_ROWS,
    ),
    Family(
        name="Wan VACE",
        denoiser="WanVACETransformer3DModel",
        blocks=("blocks.#", "vace_blocks.#"),
        slots=_TWO,
        layout=layouts.video_and_text,
        cfg="split",
        parts=_wan_parts,
        row_fields=_WAN_ROWS | {"control_hidden_states"},
        shared_fields=frozenset({"control_hidden_states_scale"}),
    ),
    Family(
        name="SkyReels-V2",
        denoiser="SkyReelsV2Transformer3DModel",
        blocks=("blocks.#",),
        slots=_TWO,
        layout=layouts.video_and_text,
        cfg="split",
        parts=_wan_parts,
        row_fields=_WAN_ROWS | {"fps"},
    ),
    Family(
        name="ChronoEdit",
        denoiser="ChronoEditTransformer3DModel",
        blocks=("blocks.#",),
        slots=_TWO,
        layout=layouts.video_and_text,
        cfg="split",
        parts=_wan_parts,
        row_fields=_WAN_ROWS,
    ),
    Family(
        name="HunyuanVideo",
        denoiser="HunyuanVideoTransformer3DModel",
        blocks=_FLUX_BLOCKS,
        slots={"attn": "joint"},
        layout=layouts.video_then_text,
        cfg="split",
        row_fields=_FLUX_ROWS | {"encoder_attention_mask"},
    ),
    Family(
        name="LTX-Video",
        denoiser="LTXVideoTransformer3DModel",
        blocks=("transformer_blocks.#",),
        slots=_TWO,
        layout=layouts.packed_video_and_text,
        cfg="batched",
        row_fields=frozenset(
            {
                "hidden_states",
                "encoder_hidden_states",
                "timestep",
                "encoder_attention_mask",
                "video_coords",
            }
        ),
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
def parameters(cls: Any) -> tuple[str, ...]:
    """Names of the arguments of a module class's forward."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The denoiser's arguments by name, read off the class: hooks hide the instance's."""
    return {**dict(zip(parameters(cast(Any, type(unwrap(model)))), args, strict=False)), **kwargs}


def slice_rows(
    family: Family, arguments: Arguments, rows: tuple[int, int]
) -> dict[str, Any] | None:
    """The rows' arguments alone, or None where some argument's batch dimension is not known."""
    total = arguments[family.sample].shape[0]
    if rows == (0, total):
        return dict(arguments)
    return _by_rows(family, arguments, total, lambda value: value[rows[0] : rows[1]])


def repeat_rows(
    family: Family, arguments: Arguments, rows: tuple[int, int], text: torch.Tensor
) -> dict[str, Any] | None:
    """The arguments with some rows once more at the end, there with another text; None as above."""
    total = arguments[family.sample].shape[0]

    def again(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value, value[rows[0] : rows[1]]])

    given = arguments[family.text]
    made = _by_rows(family, arguments, total, again)
    return None if made is None else {**made, family.text: torch.cat([given, text])}


def _by_rows(
    family: Family,
    arguments: Arguments,
    total: int,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Any] | None:
    """Change every tensor with a batch dimension; None if an argument is not known to have one."""

    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value) if value.ndim and value.shape[0] == total else value
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(walk(item) for item in value)
        return value

    def has_tensor(value: Any) -> bool:
        if isinstance(value, (dict, list, tuple)):
            return any(map(has_tensor, value.values() if isinstance(value, dict) else value))
        return isinstance(value, torch.Tensor)

    known = family.row_fields | family.shared_fields
    if any(has_tensor(value) for name, value in arguments.items() if name not in known):
        return None
    return {n: walk(v) if n in family.row_fields else v for n, v in arguments.items()}
