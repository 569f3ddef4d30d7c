"""Layouts of attention that has picture and text in one sequence."""

from __future__ import annotations

from typing import Any

import torch

from attn_control.call import Layout, Site, Softmax
from attn_control.layouts.parts import Arguments, Part, grid, patches, picture_of, text_of


def image_then_text(site: Site, args: Arguments, model: Any) -> Layout:
    """[image, text] of a latent picture; a second self-attention sees the image alone."""
    image = picture_of(args, model)
    return (
        Layout.joint(image) if site.slot == "self2" else Layout.joint(image, text_of(args, model))
    )


def text_then_image(site: Site, args: Arguments, model: Any) -> Layout:
    """[registers, text, image] of a latent picture, where the model has registers."""
    registers = getattr(model, "register_tokens", None)
    before = 0 if registers is None else int(registers.shape[1])
    return Layout.joint(("register", before, None), text_of(args), picture_of(args, model))


def text_then_image_or_cached(site: Site, args: Arguments, model: Any) -> Layout:
    """[text, image], where a cache may hold the keys of references: calls that fill it are given a
    reference alone, later ones ask [reference, text, image].
    """
    text, image = text_of(args), picture_of(args, model)
    caches = args.get("kv_caches")
    cache = None if caches is None else caches[site.layer]
    if cache is not None and cache.mode == "write":
        return Layout.joint(text, ("reference", *image[1:]))
    own = Layout.joint(text, image)
    if cache is None or cache.mode != "read" or not cache.k_caches:
        return own
    kept = ("reference", int(cache.k_caches[0].shape[1]), None)
    return Layout.cross(own, Layout.joint(kept, text, image))


def valid_text_then_image(site: Site, args: Arguments, model: Any) -> Layout | None:
    """[text without its padding, image]; none if the rows' texts differ in length."""
    lengths = set(args["encoder_attention_mask"].sum(dim=1).tolist())
    if len(lengths) > 1:
        return None
    return Layout.joint(("text", int(lengths.pop()), None), picture_of(args, model))


def image_asks_text_and_image(site: Site, args: Arguments, model: Any) -> Layout:
    """The image's queries see [text, image]."""
    image = picture_of(args, model)
    return Layout.cross(Layout.joint(image), Layout.joint(text_of(args), image))


def padded_image_then_text(site: Site, args: Arguments, model: Any) -> Layout:
    """[image, padding, text]: pictures that are not square are padded to the most tokens there are;
    the text is one encoder's, then another's last layer, then its layer for this block.
    """
    image = picture_of(args, model)
    square = args["hidden_states"].shape[-2] == args["hidden_states"].shape[-1]
    padding = 0 if square else model.max_seq - image[1]
    text = args["encoder_hidden_states_t5"].shape[1]
    text += 2 * args["encoder_hidden_states_llama3"][0].shape[-2]
    return Layout.joint(image, ("pad", padding, None), ("text", text, None))


def padded_rows(site: Site, args: Arguments, model: Any) -> Layout | None:
    """[image, padding, text with its padding] of rows given as lists, each part padded to a
    multiple of 32; none if rows differ in that, or hold several pictures.
    """
    pictures, texts = args["x"], args["cap_feats"]
    if isinstance(pictures[0], list):
        return None
    shapes = {tuple(picture.shape[-3:]) for picture in pictures}
    lengths = {-(-len(text) // 32) * 32 for text in texts}
    if len(shapes) > 1 or len(lengths) > 1:
        return None
    frames, height, width = shapes.pop()
    patch = args.get("patch_size", 2)
    image = grid("image", height // patch, width // patch, frames // args.get("f_patch_size", 1))
    return Layout.joint(image, ("pad", -image[1] % 32, None), ("text", lengths.pop(), None))


def text_then_frames(site: Site, args: Arguments, model: Any) -> Layout:
    """[text, video] of latents (rows, frames, channels, height, width)."""
    frames, height, width = patches(args, model, dims=(1, -2, -1))
    return Layout.joint(text_of(args), grid("video", height, width, frames))


def text_then_packed(site: Site, args: Arguments, model: Any) -> Layout:
    """[text, image, reference] of packed latents, told apart by their position ids.

    References are appended by the pipeline and marked in the first column of the ids, or come as an
    argument of their own. Where they come as channels (FLUX.1 Fill), marks tell parts of the image
    apart, such as VisualCloze's rows. Blocks before the joint ones see the image alone.
    """
    text, tokens, ids = text_of(args), args["hidden_states"].shape[1], args.get("img_ids")
    if ids is None and args.get("position_ids") is not None:
        ids = args["position_ids"][text[1] :]
    if ids is None:
        return Layout.joint(text, ("image", tokens, None))
    ids = (ids[0] if ids.ndim == 3 else ids).detach().to("cpu", torch.float32)
    channels = getattr(model.config, "out_channels", None) or model.config.in_channels
    count = tokens
    if channels == model.config.in_channels:
        count = int((ids[:, 0] == ids[0, 0]).sum())
    # Counted, not read off the largest: FLUX.3's are half as far apart, LongCat's start at 512.
    height, width = (len(ids[:count, column].unique()) for column in (1, 2))
    shape = (1, height, width) if height * width == count else None
    image: Part = ("image", count, shape)
    if site.slot == "self":
        return Layout.joint(image)
    apart = args.get("image_cond_hidden_states")
    more = tokens - count + (0 if apart is None else int(apart.shape[1]))
    return Layout.joint(text, image, ("reference", more, None))


def text_then_packed_or_cached(site: Site, args: Arguments, model: Any) -> Layout:
    """As above. Where processors keep the keys of references from step to step, queries are [text,
    image] and keys [text, reference, image]; in the step that fills the cache, the references stand
    before the image among what the denoiser is given.
    """
    fills, cache = args.get("kv_cache_mode") == "extract", args.get("kv_cache")
    count = args.get("num_ref_tokens", 0) if fills else getattr(cache, "num_ref_tokens", 0)
    if not count or "KV" not in type(site.module.processor).__name__:
        return text_then_packed(site, args, model)
    if fills:
        given = {"hidden_states": args["hidden_states"][:, count:]}
        args = {**args, **given, "img_ids": args["img_ids"][..., count:, :]}
    queries = text_then_packed(site, args, model)
    text, image = ((s.role, s.length, s.grid) for s in queries.q)
    return Layout.cross(queries, Layout.joint(text, ("reference", count, None), image))


def text_then_shapes(site: Site, args: Arguments, model: Any) -> Layout:
    """[text, image, reference, ...] of packed latents whose shapes are given as (frames, height,
    width). A model of layered pictures makes all of them but the last.
    """
    shapes = args["img_shapes"][0]
    shapes = [shapes] if isinstance(shapes[0], int) else list(shapes)
    made = len(shapes) - 1 if getattr(model.config, "use_layer3d_rope", False) else 1
    roles = ["image"] * made + ["reference"] * (len(shapes) - made)
    parts = [grid(role, h, w, f) for role, (f, h, w) in zip(roles, shapes, strict=True)]
    return Layout.joint(text_of(args), *parts)


def video_then_text(site: Site, args: Arguments, model: Any) -> Layout:
    """[video, embedded picture, text] of latents (rows, channels, frames, height, width)."""
    picture, text = args.get("image_embeds"), text_of(args, model)
    length = 0 if picture is None else int(picture.shape[1])
    return Layout.joint(picture_of(args, model), ("reference", length, None), text)


def video_then_valid_text_by_row(site: Site, args: Arguments, model: Any) -> tuple[Softmax, ...]:
    """[video, text without its padding], a softmax for each row of the batch."""
    video = picture_of(args, model)
    lengths = args["encoder_attention_mask"].bool().sum(dim=1).tolist()
    return tuple(
        Softmax(Layout.joint(video, ("text", int(length), None)), (row, row + 1))
        for row, length in enumerate(lengths)
    )


def stretches_then_image(
    site: Site, args: Arguments, model: Any
) -> Layout | tuple[Softmax, ...] | None:
    """A softmax for each stretch of text and each reference, whose keys are all that went before
    and itself, and one for the image, whose keys are everything; from a cache of the others' keys,
    the last alone. None where one kernel runs them all.
    """
    flex = "Flex" in type(site.module.processor).__name__
    mask, shapes = args["img_mask"][0], args["img_shapes"][0]
    sizes = [int(frames * height * width) for frames, height, width in shapes]
    parts: list[Part] = []
    slots = iter(zip(sizes, shapes, strict=True))
    left = 0  # slots of the encoder that belong to the picture begun; each is 2 x 2 tokens
    for is_image in mask.tolist():
        if not is_image:
            if parts and parts[-1][0] == "text":
                parts[-1] = ("text", parts[-1][1] + 1, None)
            else:
                parts.append(("text", 1, None))
        elif left:
            left -= 1
        else:
            size, (frames, height, width) = next(slots)
            left = size // 4 - 1
            parts.append(("reference", size, (int(frames), int(height), int(width))))
    parts[-1] = ("image", *parts[-1][1:])
    image, everything = Layout.joint(parts[-1]), Layout.joint(*parts)
    if args.get("kv_cache_mode") == "cached":
        return (
            Layout.cross(image, everything) if flex else (Softmax(Layout.cross(image, everything)),)
        )
    if flex:
        return None
    return tuple(
        Softmax(Layout.cross(Layout.joint(part), Layout.joint(*parts[: n + 1])))
        for n, part in enumerate(parts)
    )


def video_then_text_or_itself(site: Site, args: Arguments, model: Any) -> Layout:
    """As above, but the last single blocks are a decoder: they see the video, and after it what the
    blocks before have made of it. A cross-attention beside the joint one asks the text alone.
    """
    video, blocks = picture_of(args, model), model.single_transformer_blocks
    if site.slot == "cross":
        return Layout.cross(Layout.joint(video), Layout.joint(text_of(args)))
    group, index = site.name.split(".")[:2]
    first = len(blocks) - model.config.num_decoder_layers
    if group == "single_transformer_blocks" and int(index) >= first:
        return Layout.joint(video, ("reference", *video[1:]))
    return video_then_text(site, args, model)


def video_then_mixed_text(site: Site, args: Arguments, model: Any) -> Layout:
    """[video, embedded picture, text], but a picture of zeros is none: its tokens go to the text's
    padding.
    """
    picture, text = args["image_embeds"], text_of(args, model)
    length = int(picture.shape[1])
    if bool(picture.any()):
        return Layout.joint(picture_of(args, model), ("reference", length, None), text)
    return Layout.joint(picture_of(args, model), ("text", length + text[1], None))
