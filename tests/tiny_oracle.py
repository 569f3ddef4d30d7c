"""Explicit attention, written without attn_control: what the tests believe.

The oracle finds out who asks for a softmax with module hooks and answers through the global
``torch.nn.functional.scaled_dot_product_attention``: another mechanism than the package's.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SDPA = torch.nn.functional.scaled_dot_product_attention
Change = Callable[[Tensor, Tensor], Tensor]
"""(attention map, value) in float64 -> attention output."""


@dataclass
class Softmax:
    """One captured call: tensors of (batch, heads, tokens, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


def dense(q: Tensor, k: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """The attention map in float64."""
    scores = q.double() @ k.double().transpose(-1, -2)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        far = torch.finfo(torch.float64).min / 2  # finite: rows without any key stay numbers
        scores = scores.masked_fill(~mask, far) if mask.dtype == torch.bool else scores + mask
    scores = (scores - scores.amax(-1, keepdim=True)).exp()
    return scores / scores.sum(-1, keepdim=True)


def toward_identity(heads: Any, u: float, tokens: slice = slice(None)) -> Change:
    """``A' = (1 - u) A + u I`` for some heads and query tokens, as explicit maps."""

    def change(a: Tensor, v: Tensor) -> Tensor:
        a = a.clone()
        eye = torch.eye(a.shape[-1], dtype=a.dtype)
        for head in heads:
            a[:, head, tokens] = ((1 - u) * a[:, head] + u * eye)[:, tokens]
        return a @ v

    return change


def gated(heads: Any, gain: float, tokens: slice = slice(None)) -> Change:
    def change(a: Tensor, v: Tensor) -> Tensor:
        out = a @ v
        for head in heads:
            out[:, head, tokens] = gain * out[:, head, tokens]
        return out

    return change


@contextlib.contextmanager
def attention(
    model: nn.Module, changes: dict[str, Change] | None = None
) -> Iterator[dict[str, list[Softmax]]]:
    """Run ``model`` with some modules' attention replaced by an explicit map, and record all
    softmaxes by module name.
    """
    changes = changes or {}
    current: list[str] = []
    seen: dict[str, list[Softmax]] = {}
    handles = []
    for name, module in model.named_modules():
        if hasattr(module, "processor"):
            handles.append(
                module.register_forward_pre_hook(lambda m, a, name=name: current.append(name))
            )
            handles.append(module.register_forward_hook(lambda m, a, o: current.pop() and None))

    def sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not current:
            return _SDPA(query, key, value, *args, **kwargs)
        name = current[-1]
        if name in changes:
            mask = args[0] if args else kwargs.get("attn_mask")
            repeats = query.shape[1] // key.shape[1]
            a = dense(query, key.repeat_interleave(repeats, 1), kwargs.get("scale"), mask)
            v = value.repeat_interleave(repeats, 1).double()
            out = changes[name](a, v).to(query.dtype)
        else:
            out = _SDPA(query, key, value, *args, **kwargs)
        seen.setdefault(name, []).append(Softmax(query, key, value, out))
        return out

    torch.nn.functional.scaled_dot_product_attention = sdpa
    try:
        yield seen
    finally:
        torch.nn.functional.scaled_dot_product_attention = _SDPA
        for handle in handles:
            handle.remove()


def expose_heads(model: nn.Module) -> nn.Module:
    """Make every attention module return its heads' outputs, by taking away the projections behind
    them (their widths agree in the tiny models).
    """
    for module in model.modules():
        if hasattr(module, "processor"):
            if getattr(module, "to_out", None) is not None:
                module.to_out[0] = nn.Identity()
            if getattr(module, "to_add_out", None) is not None:
                module.to_add_out = nn.Identity()
    return model


TOUCHED = (  # modules in which attaching replaces a name
    "diffusers.models.attention_processor",
    "diffusers.models.attention_dispatch",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.transformers.transformer_wan",
    "tiny_odd_processors",
    "torch.nn.functional",
)


def fingerprint(*models: nn.Module) -> list:
    """Identities of everything that attaching may touch: names in modules, classes, attributes and
    hooks of models, processors and their classes.
    """
    found: list = []
    for module in map(importlib.import_module, TOUCHED):
        for name in ("dispatch_attention_fn", "F", "scaled_dot_product_attention"):
            found.append((module.__name__, name, id(vars(module).get(name))))
    for model in models:
        for name, module in model.named_modules():
            found.append((name, id(type(module)), sorted(vars(module))))
            found.append((len(module._forward_hooks), len(module._forward_pre_hooks)))
            processor = getattr(module, "processor", None)
            found.append((id(processor), id(type(processor))))
            found.append(sorted(getattr(processor, "__dict__", ())))
    return found


@contextlib.contextmanager
def outputs(module: nn.Module, heads: int, text_first: bool = False) -> Iterator[list[Tensor]]:
    """What an exposed attention module returned, each as (batch, heads, tokens, head_dim) in the
    order of its softmax.
    """
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, out: Any) -> None:
        if isinstance(out, tuple):
            out = torch.cat(out[::-1] if text_first else out, dim=1)
        found.append(out.unflatten(-1, (heads, -1)).transpose(1, 2).clone())

    handle = module.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def forwards(model: nn.Module) -> Iterator[list[int]]:
    """Batch sizes of the forwards that really ran, counted in the patch embedding (or the UNet's
    first convolution), which no one wraps.
    """
    for name in ("pos_embed", "patch_embedding", "conv_in", "x_embedder"):
        first = getattr(model, name, None)
        if first is not None and not (name == "pos_embed" and hasattr(model, "x_embedder")):
            break
    seen: list[int] = []
    handle = first.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[0]))
    try:
        yield seen
    finally:
        handle.remove()


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Arguments with their floating-point tensors in another precision."""
    if isinstance(value, dict):
        return {name: cast(item, dtype) for name, item in value.items()}
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within ``tolerance`` of the larger of 1 and the reference's largest element."""
    assert a.shape == b.shape
    error = (a.double() - b.double()).abs().max().item()
    scale = max(1.0, b.double().abs().max().item())
    assert error <= tolerance * scale, f"{error=:.3g} at {scale=:.3g}"


@dataclass(frozen=True)
class Spot:
    """A self-attention site of a tiny model, written down by hand."""

    family: str
    label: str
    name: str
    heads: int
    spans: dict[str, slice]
    text_first: bool = False

    def __str__(self) -> str:
        return f"{self.family}-{self.label}"


_TB = "transformer_blocks.0.attn1"
_ALL = slice(None)
_SD3 = {"all": _ALL, "image": slice(0, 16), "text": slice(16, 21)}
_FLUX = {"all": _ALL, "text": slice(0, 5), "image": slice(5, 21)}
_IMAGE = {"all": _ALL, "image": _ALL}
_VIDEO = {"all": _ALL, "image": _ALL, "video": _ALL}

SPOTS = (
    Spot("sd15", "L0", f"down_blocks.0.attentions.0.{_TB}", 2, _IMAGE),
    Spot("sd15", "L2", f"mid_block.attentions.0.{_TB}", 4, _IMAGE),
    Spot("sd15", "L6", f"up_blocks.1.attentions.1.{_TB}", 2, _IMAGE),
    Spot("sdxl", "L2", "down_blocks.1.attentions.0.transformer_blocks.1.attn1", 4, _IMAGE),
    Spot("sdxl", "L9", f"up_blocks.1.attentions.0.{_TB}", 2, _IMAGE),
    Spot("sd3", "L1", "transformer_blocks.1.attn", 4, _SD3),
    Spot("sd35", "L0.self2", "transformer_blocks.0.attn2", 4, _IMAGE),
    Spot("sd35", "L1", "transformer_blocks.1.attn", 4, _SD3),
    Spot("flux", "L1", "transformer_blocks.1.attn", 2, _FLUX, text_first=True),
    Spot("flux", "L2", "single_transformer_blocks.0.attn", 2, _FLUX),
    Spot("wan", "L1", "blocks.1.attn1", 2, _VIDEO),
)
