"""From what a denoiser is called with to the order of its tokens. Each function serves every family
that packs alike.

Signature: (site, arguments by name, model) -> Layout of the site's main softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from attn_control.call import Layout, Site

Arguments = Mapping[str, Any]
"""What the denoiser was called with, by parameter name."""

LayoutOf = Callable[[Site, Arguments, Any], Layout]
Part = tuple[str, int, tuple[int, int, int] | None]


def grid(role: str, height: int, width: int, frames: int = 1) -> Part:
    """A segment that is a whole picture, or a whole video."""
    return role, frames * height * width, (frames, height, width)


def text_of(args: Arguments, name: str = "encoder_hidden_states") -> Part:
    return "text", int(args[name].shape[1]), None


def _patches(args: Arguments, model: Any) -> tuple[int, ...]:
    """Grid of a (..., height, width) sample in patches."""
    patch = model.config.patch_size
    sizes = args["hidden_states"].shape
    if isinstance(patch, int):
        return tuple(size // patch for size in sizes[-2:])
    return tuple(size // p for size, p in zip(sizes[-len(patch) :], patch, strict=True))


def image_then_text(site: Site, args: Arguments, model: Any) -> Layout:
    """[image, text] of a latent picture; a second self-attention sees the image alone."""
    image = grid("image", *_patches(args, model))
    return Layout.joint(image) if site.slot == "self2" else Layout.joint(image, text_of(args))


def text_then_image(site: Site, args: Arguments, model: Any) -> Layout:
    """[text, image] of a latent picture."""
    return Layout.joint(text_of(args), grid("image", *_patches(args, model)))


def text_then_packed(site: Site, args: Arguments, model: Any) -> Layout:
    """[text, image, reference] of packed latents, told apart by their position ids.

    References are appended by the pipeline and marked in the first column of the ids.
    """
    text, tokens, ids = text_of(args), args["hidden_states"].shape[1], args.get("img_ids")
    if ids is None:
        return Layout.joint(text, ("image", tokens, None))
    ids = (ids[0] if ids.ndim == 3 else ids).detach().to("cpu", torch.float32)
    count = int((ids[:, 0] == ids[0, 0]).sum())
    height, width = (int(n) + 1 for n in (ids[:count, 1:3] - ids[0, 1:3]).amax(dim=0))
    shape = (1, height, width) if height * width == count else None
    return Layout.joint(text, ("image", count, shape), ("reference", tokens - count, None))


def text_then_shapes(site: Site, args: Arguments, model: Any) -> Layout:
    """[text, image, reference, ...] of packed latents whose shapes are given as (frames, height,
    width).
    """
    shapes = args["img_shapes"][0]
    shapes = [shapes] if isinstance(shapes[0], int) else list(shapes)
    roles = ["image", *["reference"] * (len(shapes) - 1)]
    parts = [grid(role, h, w, f) for role, (f, h, w) in zip(roles, shapes, strict=True)]
    return Layout.joint(text_of(args), *parts)


def video_then_text(site: Site, args: Arguments, model: Any) -> Layout:
    """[video, text] of latents (batch, channels, frames, height, width)."""
    frames, height, width = args["hidden_states"].shape[-3:]
    p, t = model.config.patch_size, model.config.patch_size_t
    return Layout.joint(grid("video", height // p, width // p, frames // t), text_of(args))


def video_and_text(site: Site, args: Arguments, model: Any) -> Layout:
    """Video attends to itself, then to text; patches of (frames, height, width)."""
    frames, height, width = _patches(args, model)
    video = Layout.joint(grid("video", height, width, frames))
    return video if site.slot == "self" else Layout.cross(video, Layout.joint(text_of(args)))


def packed_video_and_text(site: Site, args: Arguments, model: Any) -> Layout:
    """As above for packed latents, whose size is given beside them."""
    sizes = [args.get(name) for name in ("height", "width", "num_frames")]
    tokens = args["hidden_states"].shape[1]
    known = None not in sizes and sizes[0] * sizes[1] * sizes[2] == tokens
    video = Layout.joint(grid("video", *sizes) if known else ("video", tokens, None))
    return video if site.slot == "self" else Layout.cross(video, Layout.joint(text_of(args)))


def unet(site: Site, args: Arguments, model: Any) -> Layout:
    """An image at the block's resolution attends to itself, then to text."""
    height, width = args["sample"].shape[-2:]
    deepest = len(model.config.down_block_types) - 1
    group, *index = site.name.split(".")
    depth = deepest
    if group == "down_blocks":
        depth = int(index[0])
    elif group == "up_blocks":
        depth = deepest - int(index[0])
    for _ in range(depth):  # each level is a convolution of stride 2 and padding 1
        height, width = -(-height // 2), -(-width // 2)
    image = Layout.joint(grid("image", height, width))
    return image if site.slot == "self" else Layout.cross(image, Layout.joint(text_of(args)))
