"""Which family a model is of, where its attention is, and what it was called with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

from torch import nn

from attn_control.call import Site
from attn_control.errors import AttnControlError
from attn_control.families.controlnets import CONTROLNETS
from attn_control.families.family import Family
from attn_control.families.language import LANGUAGE
from attn_control.families.pictures import PICTURES
from attn_control.families.refused import REFUSED
from attn_control.families.videos import VIDEOS

COMPONENTS = ("transformer", "transformer_2", "unet", "model")
FAMILIES = PICTURES + VIDEOS
_HOW = {False: " with a processor", True: ""}
_BY_CLASS = {family.denoiser: family for family in FAMILIES + CONTROLNETS + LANGUAGE}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper, or the module itself."""
    return getattr(model, "_orig_mod", model)


def family_of(model: nn.Module) -> Family:
    """The family row of a denoiser. Raises AttnControlError for a class without a row."""
    for cls in type(unwrap(model)).__mro__:
        if cls.__name__ in _BY_CLASS:
            return _BY_CLASS[cls.__name__]
        if cls.__name__ in REFUSED:
            raise AttnControlError(
                f"attach: {cls.__name__} cannot be controlled: {REFUSED[cls.__name__]}"
            )
    known = ", ".join(f"{family.denoiser} ({family.name})" for family in FAMILIES + LANGUAGE)
    raise AttnControlError(
        f"attach: {type(unwrap(model)).__name__} is not a model that attn_control knows; known:"
        f" {known}"
    )


def denoisers(target: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline, or the bare model itself, by component name; then the
    ControlNets beside them that have a row.

    Raises:
        AttnControlError: neither a pipeline with a denoiser nor a model.
    """
    if isinstance(target, nn.Module):
        family = family_of(target)
        name = "unet" if family.sample == "sample" else "transformer"
        name = "model" if family.language else name
        return {"controlnet" if family in CONTROLNETS else name: target}
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
    return found | _beside(target)


def _beside(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's ControlNets of a known class, numbered where there are several."""
    given = getattr(pipe, "controlnet", None)
    nets = dict.fromkeys(getattr(given, "nets", [given]))  # one may be given twice
    names = {family.denoiser for family in CONTROLNETS}
    return {
        "controlnet" if len(nets) == 1 else f"controlnet_{number}": net
        for number, net in enumerate(nets)
        if net is not None and type(unwrap(net)).__name__ in names
    }


def find_sites(model: nn.Module, component: str) -> list[Site]:
    """The denoiser's attention modules, in execution order: those with a callable ``processor``, or
    of a language model all that its row names.
    """
    model = unwrap(model)
    family = family_of(model)
    patterns = [
        re.compile(re.escape(path).replace(r"\#", r"(\d+)") + r"\.(\w+)") for path in family.blocks
    ]
    found: list[tuple[tuple[int, ...], str, str, Any]] = []
    for name, module in model.named_modules():
        if not family.language and not callable(getattr(module, "processor", None)):
            continue
        # DiffusionGemma's pipeline is compiled by wrapping a part of its model.
        path = name.replace("_orig_mod.", "") if family.language else name
        for order, pattern in enumerate(patterns):
            match = pattern.fullmatch(path)
            if match is None:
                continue
            *index, leaf = match.groups()
            slot = family.slots.get(f"{family.blocks[order]}.{leaf}", family.slots.get(leaf))
            if slot is not None:
                found.append(((order, *map(int, index)), name, slot, module))
    if not found:
        elsewhere = [n for n, m in model.named_modules() if callable(getattr(m, "processor", None))]
        where = f"; it is at {elsewhere[0]} and elsewhere" if elsewhere else ""
        raise AttnControlError(
            f"attach: this {type(model).__name__} has no attention{_HOW[family.language]} where"
            f" {family.name} has it ({', '.join(family.blocks)}){where}"
        )
    layers = {key: n for n, key in enumerate(sorted({key for key, *_ in found}))}
    sites = [
        Site(
            name=name,
            model=component,
            layer=layers[key],
            slot=slot,
            **(_shared_geometry if family.language else _geometry)(module),
            module=module,
        )
        for key, name, slot, module in found
    ]
    return sorted(sites, key=lambda site: (site.layer, site.slot != "joint", site.slot == "cross"))


def _geometry(module: Any) -> dict[str, int]:
    """Heads, key heads and their width, under the names that diffusers' attention classes use."""
    heads = int(getattr(module, "heads", 0) or module.num_heads)
    width = getattr(module, "inner_dim", None)
    if width is None:
        width = getattr(module, "to_q", None) or module.to_query
        width = width.out_features
    kv_heads = getattr(module, "num_kv_heads", None) or heads
    return {"heads": heads, "kv_heads": int(kv_heads), "head_dim": int(width) // heads}


def _shared_geometry(module: Any) -> dict[str, int]:
    """As `_geometry`, under the names of transformers, where heads share keys."""
    heads = int(module.config.num_attention_heads)
    return {
        "heads": heads,
        "kv_heads": heads // int(module.num_key_value_groups),
        "head_dim": int(module.head_dim),
    }


@lru_cache(64)
def parameters(cls: Any) -> tuple[str, ...]:
    """Names of the arguments of a module class's forward."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The denoiser's arguments by name, read off the class: hooks hide the instance's."""
    return {**dict(zip(parameters(cast(Any, type(unwrap(model)))), args, strict=False)), **kwargs}
