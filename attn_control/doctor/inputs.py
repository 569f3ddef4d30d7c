"""A call of a bare denoiser, made up from its configuration and the names of its arguments.

Rules go by what an argument is called, never by the model: diffusers names alike what is alike.
What has no rule, and must be given, is named in the reason for not making a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_control.doctor.finding import Skipped
from attn_control.doctor.subject import copied
from attn_control.families import Family, unwrap

ROWS, FRAMES, HEIGHT, WIDTH, TEXT = (
    2,
    3,
    4,
    6,
    7,
)  # in tokens; unlike, so that none passes as another
_NEVER = "no inputs can be made up for a bare {}: {}; give the whole pipeline"
_TEXT_WIDTHS = (
    "joint_attention_dim",
    "caption_channels",
    "text_dim",
    "text_embed_dim",
    "text_hidden_dim",
    "cap_feat_dim",
    "in_text_dim",
    "cross_attention_dim",
)


@dataclass(frozen=True)
class _Model:
    """A denoiser's configuration, its argument names, and a source of numbers."""

    config: Any
    names: tuple[str, ...]
    generator: torch.Generator

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def number(self, *names: str) -> int:
        """The first of these settings that the configuration has."""
        for name in names:
            value = self.config.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        raise KeyError(f"its configuration has none of {', '.join(names)}")

    @property
    def packed(self) -> bool:
        """Whether the latents are a list of tokens, with their places beside them."""
        names = set(self.names)
        return bool(names & {"img_ids", "img_shapes"}) or {"num_frames", "height"} <= names

    @property
    def patch(self) -> tuple[int, int, int]:
        size = self.config.get("patch_size") or 1
        if isinstance(size, int):
            size = (self.config.get("patch_size_t") or 1, size, size)
        return (1, 1, *size)[-3:]


def _sample(m: _Model) -> Tensor:
    channels = m.number("in_channels", "in_visual_dim")
    if m.packed:
        frames = FRAMES if "num_frames" in m.names else 1
        return m.rand(ROWS, frames * HEIGHT * WIDTH, channels)
    t, h, w = m.patch
    if "temporal_compression_ratio" in m.config:  # frames before channels
        return m.rand(ROWS, FRAMES * t, channels, HEIGHT * h, WIDTH * w)
    if "sample" in m.names:  # a UNet halves its picture at each level but the last
        halvings = 2 ** (len(m.config["down_block_types"]) - 1)
        return m.rand(ROWS, channels, HEIGHT * halvings, WIDTH * halvings)
    if m.config.get("patch_size_t") is not None or not isinstance(m.config.get("patch_size"), int):
        return m.rand(ROWS, channels, FRAMES * t, HEIGHT * h, WIDTH * w)
    return m.rand(ROWS, channels, HEIGHT * h, WIDTH * w)


def _ids(m: _Model) -> Tensor:
    """Places of the tokens of a picture: (tokens, axes), row and column in columns 1 and 2."""
    axes = m.config.get("axes_dims_rope")
    ids = torch.zeros(HEIGHT, WIDTH, len(axes) if axes else 3)
    ids[..., 1] += torch.arange(HEIGHT)[:, None]
    ids[..., 2] += torch.arange(WIDTH)[None]
    return ids.flatten(0, 1)


def _added(m: _Model) -> dict[str, Tensor] | None:
    """What SDXL adds to the timestep."""
    if m.config.get("addition_embed_type") != "text_time":
        return None
    width = m.number("projection_class_embeddings_input_dim")
    width -= 6 * m.number("addition_time_embed_dim")
    return {"text_embeds": m.rand(ROWS, width), "time_ids": m.rand(ROWS, 6)}


_RULES: dict[str, Callable[[_Model], Any]] = {
    "hidden_states": _sample,
    "sample": _sample,
    "encoder_hidden_states": lambda m: m.rand(ROWS, TEXT, m.number(*_TEXT_WIDTHS)),
    "encoder_attention_mask": lambda m: torch.ones(ROWS, TEXT),
    "encoder_hidden_states_mask": lambda m: torch.ones(ROWS, TEXT),
    "pooled_projections": lambda m: (
        m.rand(ROWS, m.config["pooled_projection_dim"])
        if m.config.get("pooled_projection_dim")
        else None
    ),
    "timestep": lambda m: torch.full((ROWS,), 0.5 if "img_ids" in m.names else 500.0),
    "guidance": lambda m: torch.ones(ROWS) if m.config.get("guidance_embeds") else None,
    "img_ids": _ids,
    "img_shapes": lambda m: [[(1, HEIGHT, WIDTH)]] * ROWS,
    "original_size": lambda m: torch.full((ROWS, 2), 512.0),
    "target_size": lambda m: torch.full((ROWS, 2), 512.0),
    "crop_coords": lambda m: torch.zeros(ROWS, 2),
    "txt_ids": lambda m: torch.zeros(TEXT, _ids(m).shape[-1]),
    "added_cond_kwargs": _added,
    "num_frames": lambda m: FRAMES if m.packed else None,
    "height": lambda m: HEIGHT if m.packed else None,
    "width": lambda m: WIDTH if m.packed else None,
}


def made_up_call(model: nn.Module, family: Family) -> dict[str, Any]:
    """Arguments of one call with random numbers, on the model's device and in its precision.

    Raises:
        Skipped: some argument has no rule, or the model does not run with what the rules gave.
    """
    inner: Any = unwrap(model)
    known = inspect.signature(type(inner).forward).parameters
    config = dict(inner.config)
    m = _Model(config, tuple(known), torch.Generator().manual_seed(0))
    call: dict[str, Any] = {}
    try:
        for name, parameter in known.items():
            value = _RULES[name](m) if name in _RULES else None
            if value is not None:
                call[name] = _placed(value, inner)
            elif parameter.default is inspect.Parameter.empty and name != "self":
                raise KeyError(f"nothing is known of its argument {name!r}")
        with torch.no_grad():
            model(**copied(call))
    except KeyError as error:
        raise Skipped(_NEVER.format(family.name, error.args[0])) from None
    except Exception as error:
        text = f"it does not run with random ones ({type(error).__name__}: {error})"
        raise Skipped(_NEVER.format(family.name, " ".join(text.split())[:200])) from None
    return call


def _placed(value: Any, model: Any) -> Any:
    if isinstance(value, dict):
        return {name: _placed(item, model) for name, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype)
