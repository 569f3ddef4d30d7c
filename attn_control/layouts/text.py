"""Text alone: the prompt, what has been written behind it, and what is being written."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from attn_control.call import Layout, Segment, Site
from attn_control.errors import AttnControlError
from attn_control.layouts.parts import Arguments


def prompt_then_response(site: Site, args: Arguments, model: Any) -> Layout:
    """The whole text in every call, so far as it is written or being written."""
    total, prompt = int(args["input_ids"].shape[1]), args["prompt_length"]
    if prompt is None:
        parts = [("text", total)]
    else:
        parts = [("prompt", min(prompt, total)), ("response", max(0, total - prompt))]
    tokens = _segments(parts)
    return Layout(tokens, tokens)


def cached_then_canvas(site: Site, args: Arguments, model: Any) -> Layout:
    """A canvas that reads itself and a cache of all that comes before it: in layers with a sliding
    window the end of that, in caches of a fixed size with room behind the canvas.
    """
    written, room = args["cache_written"], args["cache_lengths"][site.module.layer_idx]
    canvas, prompt = int(args["decoder_input_ids"].shape[1]), args["prompt_length"]
    cached = min(written, room)
    if prompt is None:
        parts = [("text", cached)]
    else:
        asked = min(max(0, prompt - (written - cached)), cached)
        parts = [("prompt", asked), ("response", cached - asked)]
    keys = _segments([*parts, ("canvas", canvas), ("pad", room - cached)])
    return Layout(_segments([("canvas", canvas)]), keys)


def cache_facts(args: Arguments) -> dict[str, Hashable]:
    """How much a cache has seen, and how many keys each of its layers hands out.

    Raises:
        AttnControlError: there is none, or no canvas.
    """
    cache = args.get("past_key_values")
    if cache is None or args.get("decoder_input_ids") is None:
        raise AttnControlError(
            "attach: expected the model to be called with past_key_values and decoder_input_ids, as"
            " its pipeline does"
        )
    lengths = (0 if layer.keys is None else layer.keys.shape[-2] for layer in cache.layers)
    return {"cache_written": int(cache.get_seq_length()), "cache_lengths": tuple(lengths)}


def _segments(parts: list[tuple[str, int]]) -> tuple[Segment, ...]:
    found, start = [], 0
    for name, length in parts:
        if length:
            role = "pad" if name == "pad" else "text"
            found.append(Segment(name, role, start, length))
            start += length
    return tuple(found)
