"""What attaching finds on a full-size denoiser that was never loaded: its weights are on the meta
device, so that a model of 32 billion parameters is built in a second and fits anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from fullsize.calls import CALLS, Call, big

from attn_control import attach
from attn_control.call import Layout, Segment, Site, Softmax
from attn_control.families import family_of
from attn_control.phases import Pass

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))

# What the meta device cannot run, shorter and narrower on the CPU: token counts stay.
_ONE = {"num_layers": 1, "num_attention_heads": 1}
NARROW: dict[str, dict[str, Any]] = {
    "ernie-image": _ONE | {"hidden_size": 128, "ffn_hidden_size": 64},
    "glm-image": _ONE,
    "hidream": _ONE | {"num_single_layers": 1, "llama_layers": [0, 1]},
    "hunyuanimage": _ONE | {"num_single_layers": 1},
    "hunyuanvideo15": _ONE,
    "mochi": _ONE,
    "qwen-image-21": _ONE,
    "lumina2": _ONE | {"hidden_size": 96, "num_kv_heads": 1, "num_refiner_layers": 1},
}
# Widths that the meta device can run, but for what this machine lacks.
CHANGED: dict[str, dict[str, Any]] = {
    "cosmos1-7b": {"concat_padding_mask": False},  # torchvision resizes the mask
    "cosmos2-2b": {"concat_padding_mask": False},
}
# Two frames instead of 31: its mask of all pairs of tokens would take 2.6 GB.
SHORTER: dict[str, Call] = {"hunyuanvideo15": {"hidden_states": big(1, 65, 2, 30, 53)}}


@dataclass(frozen=True)
class Seen:
    """Figures of one checkpoint.

    Attributes:
        elements: of all tensors in its state dict.
        blocks: transformer blocks with attention, over the whole model.
        sites: slot -> how many.
        heads: (heads, heads of keys, width) of its softmax calls.
        layouts: slot -> its layouts at the default size, each once, in order; empty without a row.
    """

    elements: int
    blocks: int
    sites: dict[str, int]
    heads: tuple[tuple[int, int, int], ...]
    layouts: dict[str, tuple[str, ...]]


@cache
def published(name: str) -> dict[str, Any]:
    """The file of a checkpoint: its config, and where that was read."""
    return json.loads((CONFIGS / f"{name}.json").read_text())


@lru_cache(1)
def build(name: str) -> Any:
    """The model on the meta device."""
    one = published(name)
    with torch.device("meta"):
        return getattr(diffusers, one["class"])(**one["config"]).eval()


def sites_of(model: Any) -> list[Site]:
    with attach(model) as session:
        return session.sites


def _spell(segments: tuple[Segment, ...]) -> str:
    """For example "text 512, image 64x64"; a grid of one frame is a picture's."""
    words = []
    for s in segments:
        sizes = (s.length,) if s.grid is None else s.grid[s.grid[0] == 1 :]
        words.append(f"{s.role} {'x'.join(map(str, sizes))}")
    return ", ".join(words)


def spell(layout: Layout | tuple[Softmax, ...] | None) -> str:
    if layout is None:
        return "none in common"
    if isinstance(layout, tuple):
        return "; ".join(dict.fromkeys(spell(softmax.layout) for softmax in layout))
    return _spell(layout.q) if layout.is_self else f"{_spell(layout.q)} -> {_spell(layout.k)}"


@cache
def seen(name: str) -> Seen:
    model = build(name)
    sites, family = sites_of(model), family_of(model)
    layouts: dict[str, dict[str, None]] = {}
    if family.layout is not None:
        call = CALLS[name]()
        for site in sites:
            layouts.setdefault(site.slot, {})[spell(family.layout(site, call, model))] = None
    return Seen(
        elements=sum(value.numel() for value in model.state_dict().values()),
        blocks=1 + max(site.layer for site in sites),
        sites=dict(Counter(site.slot for site in sites)),
        heads=tuple(sorted({(s.heads, s.kv_heads, s.head_dim) for s in sites})),
        layouts={slot: tuple(found) for slot, found in layouts.items()},
    )


def _moved(value: Any, meta: bool) -> Any:
    """Arguments all on the meta device, or all on the CPU with zeros for what has no memory."""
    if isinstance(value, torch.Tensor):
        if meta:
            return value.to("meta")
        return torch.zeros(value.shape) if value.is_meta else value
    if isinstance(value, dict):
        return {key: _moved(item, meta) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, meta) for item in value)
    return value


@contextlib.contextmanager
def softmaxes(model: Any) -> Iterator[dict[str, list[tuple[int, int]]]]:
    """Query and key tokens of each softmax, by module; found without attn_control, and without
    computing any: the output is never looked at.
    """
    current: list[str] = []
    found: dict[str, list[tuple[int, int]]] = {}
    handles = []
    for name, module in model.named_modules():
        if hasattr(module, "processor"):
            handles += [
                module.register_forward_pre_hook(lambda m, a, name=name: current.append(name)),
                module.register_forward_hook(lambda m, a, o: current.pop() and None),
            ]

    def shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *a: Any, **k: Any):
        if current:
            found.setdefault(current[-1], []).append((query.shape[2], key.shape[2]))
        return torch.empty_like(query)

    original = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = shapes
    try:
        yield found
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
        for handle in handles:
            handle.remove()


@torch.no_grad()
def disagreements(name: str) -> list[str]:
    """Sites whose softmax has other tokens than their layout says, when the denoiser runs."""
    call, meta = CALLS[name]() | SHORTER.get(name, {}), name not in NARROW
    model = build(name)
    changes = NARROW.get(name) or CHANGED.get(name)
    if changes:
        config = published(name)["config"] | changes
        with torch.device("meta" if meta else "cpu"):
            model = getattr(diffusers, published(name)["class"])(**config).eval()
    layout = family_of(model).layout
    assert layout is not None
    with softmaxes(model) as found, torch.device("meta" if meta else "cpu"):
        model(**_moved(call, meta))
    wrong = []
    for site in sites_of(model):
        said = layout(site, call, model)
        assert said is not None
        for one in [s.layout for s in said] if isinstance(said, tuple) else [said]:
            if (one.q_len, one.k_len) not in found.get(site.name, []):
                wrong.append(f"{site.label}: {spell(one)}, but {found.get(site.name)}")
    return wrong


def _tensors(value: Any, into: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """All tensors that a plan holds, each once."""
    if isinstance(value, torch.Tensor):
        into[id(value)] = value
    elif isinstance(value, dict):
        _tensors(list(value.values()), into)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _tensors(item, into)
    elif dataclasses.is_dataclass(value):
        _tensors([getattr(value, field.name) for field in dataclasses.fields(value)], into)
    return into


def plan_bytes(name: str, control: Any) -> int:
    """Memory of the plans of all sites of one control."""
    model, call = build(name), CALLS[name]()
    session = attach(model, control)
    try:
        phases = session._denoisers[0].phases
        plans = phases.plans(Pass(call, phases.entries, (0, 1)))
        held = _tensors(list(plans.values()), {})
    finally:
        session.close()
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())
