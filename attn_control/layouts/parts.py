"""What layouts are put together from: texts, and pictures on their grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attn_control.call import Layout, Site, Softmax

Arguments = Mapping[str, Any]
"""What the denoiser was called with, by parameter name."""

LayoutOf = Callable[[Site, Arguments, Any], Layout | tuple[Softmax, ...] | None]
Part = tuple[str, int, tuple[int, int, int] | None]


def grid(role: str, height: int, width: int, frames: int = 1) -> Part:
    """A segment that is a whole picture, or a whole video."""
    return role, frames * height * width, (frames, height, width)


_TEXTS = (
    "encoder_hidden_states",
    "encoder_hidden_states_2",
    "encoder_hidden_states_t5",
    "text_bth",
)


def text_of(args: Arguments, model: Any = None) -> Part:
    """All text tokens, from however many encoders; a second text that the model cannot read is
    none.
    """
    given = [args.get(name) for name in _TEXTS]
    if getattr(model, "context_embedder_2", True) is None:
        given[1] = None
    tensors = [value[0] if isinstance(value, tuple) else value for value in given]
    return "text", sum(int(value.shape[1]) for value in tensors if value is not None), None


def patches(
    args: Arguments, model: Any, dims: tuple[int, int, int] = (-3, -2, -1)
) -> tuple[int, int, int]:
    """Grid (frames, height, width) of a sample in patches; ``dims``: where its sizes stand."""
    sizes = args["hidden_states"].shape
    frames, height, width = (sizes[dim] for dim in dims)
    frames = frames if len(sizes) == 5 else 1
    patch = model.config.patch_size
    if isinstance(patch, int):
        patch = (getattr(model.config, "patch_size_t", None) or 1, patch, patch)
    t, h, w = (1, *patch)[-3:]
    return -(-frames // t), height // h, width // w


def picture_of(args: Arguments, model: Any) -> Part:
    """The picture or video that the denoiser is given, as channels of latents."""
    frames, height, width = patches(args, model)
    return grid("video" if args["hidden_states"].ndim == 5 else "image", height, width, frames)
