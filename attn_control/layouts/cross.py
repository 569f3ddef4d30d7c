"""Layouts of models that attend to the picture itself first, and then ask the text."""

from __future__ import annotations

from typing import Any

from attn_control.call import Layout, Site
from attn_control.layouts.parts import Arguments, Part, grid, patches, picture_of, text_of


def _two(site: Site, args: Arguments, *parts: Part, keys: tuple[Part, ...] = ()) -> Layout:
    """Self-attention, or cross-attention to the text, or to ``keys``."""
    own = Layout.joint(*parts)
    if site.slot == "self":
        return own
    return Layout.cross(own, Layout.joint(*(keys or (text_of(args),))))


WAN_TEXT = 512
"""How many keys Wan's processors take for text where they know pictures too."""


def _wan_keys(site: Site, args: Arguments, model: Any) -> tuple[Part, ...]:
    """Keys of Wan's softmax over the text. A module that projects an embedded picture apart takes
    the last 512 of [picture, text] for the text, however long it is: a shorter text drags the end
    of the picture in, a longer one loses its beginning to the picture's softmax.
    """
    text = text_of(args)[1]
    if getattr(site.module, "add_k_proj", None) is None:
        return (("text", text, None),)
    picture = args.get("encoder_hidden_states_image")
    length = 0 if picture is None else int(picture.shape[1])
    embedder = getattr(model.condition_embedder, "image_embedder", None)
    if getattr(embedder, "pos_embed", None) is not None:
        length *= 2  # first and last frame, given as two rows
    whole = length + text
    cut = whole - WAN_TEXT
    if cut < 0:  # as Python slices: from the end, or everything
        cut = max(whole + cut, 0)
    return (("reference", max(length - cut, 0), None), ("text", min(whole - cut, text), None))


def video_and_text(site: Site, args: Arguments, model: Any) -> Layout:
    """A video or picture attends to itself, then to text."""
    return _two(site, args, picture_of(args, model))


def wan_video_and_text(site: Site, args: Arguments, model: Any) -> Layout:
    """As above, with Wan's way of telling text from an embedded picture."""
    keys = _wan_keys(site, args, model)
    return _two(site, args, picture_of(args, model), keys=keys)


def video_and_nested_text(site: Site, args: Arguments, model: Any) -> Layout:
    """As above, where pipelines give the text as (rows, 1, tokens, width)."""
    text = args["encoder_hidden_states"]
    return video_and_text(site, {**args, "encoder_hidden_states": text.flatten(1, -2)}, model)


def reference_video_and_text(site: Site, args: Arguments, model: Any) -> Layout:
    """A video attends to itself, then to text; its first frame is a reference."""
    frames, height, width = patches(args, model)
    reference, video = grid("reference", height, width), grid("video", height, width, frames - 1)
    return _two(site, args, reference, video, keys=_wan_keys(site, args, model))


def frames_first_video_and_text(site: Site, args: Arguments, model: Any) -> Layout:
    """As above for latents (rows, frames, channels, height, width); an embedded picture stands
    before the text.
    """
    frames, height, width = patches(args, model, dims=(1, -2, -1))
    video = Layout.joint(grid("video", height, width, frames))
    picture = args.get("encoder_hidden_states_image")
    length = 0 if picture is None else int(picture.shape[1])
    keys = Layout.joint(("reference", length, None), text_of(args))
    return video if site.slot == "self" else Layout.cross(video, keys)


def channels_last_video_and_text(site: Site, args: Arguments, model: Any) -> Layout:
    """As above for latents (rows, frames, height, width, channels); sparse attention reorders them
    into blocks, which has no grid.
    """
    frames, height, width = patches(args, model, dims=(1, 2, 3))
    video: Part = grid("video", height, width, frames)
    if (args.get("sparse_params") or {}).get("to_fractal"):
        video = (*video[:2], None)
    return _two(site, args, video)


def packed_video_and_text(site: Site, args: Arguments, model: Any) -> Layout:
    """As above for packed latents, whose size is given beside them. LTX-2 appends the tokens of
    frames that it is shown; LTX-Video's pipeline with conditions tells neither size nor place, and
    all tokens count as the video's.
    """
    sizes = [args.get(name) for name in ("height", "width", "num_frames")]
    tokens = args["hidden_states"].shape[1]
    if None in sizes or sizes[0] * sizes[1] * sizes[2] > tokens:
        return _two(site, args, ("video", tokens, None))
    video = grid("video", *sizes)
    return _two(site, args, video, ("reference", tokens - video[1], None))


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
    return _two(site, args, grid("image", height, width))
