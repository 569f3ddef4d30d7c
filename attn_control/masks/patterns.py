"""Patterns by name, with options as text: what the command line draws."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from attn_control import masks
from attn_control.errors import AttnControlError
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid


def _radial(grid: Grid, **options: Any) -> BlockMask:
    if grid.before or grid.tile:
        raise AttnControlError("mask radial: its order is raster, with text after the video")
    frames = grid.shape[0]
    given = {"block_size": grid.block, "text_tokens": grid.after} | options
    return masks.radial_block_mask(frames, grid.tokens // frames, **given)


PATTERNS: dict[str, Callable[..., BlockMask]] = {
    "radial": _radial,
    "neighborhood": masks.neighborhood_mask,
    "tiles": masks.tiles_mask,
    "band": masks.band_mask,
    "frame_band": masks.frame_band_mask,
    "cross": masks.cross_mask,
    "strided": masks.strided_mask,
    "power_of_two": masks.power_of_two_mask,
    "sink": masks.sink_mask,
    "spatial": masks.spatial_mask,
    "temporal": masks.temporal_mask,
    "text": masks.text_mask,
}


def make(name: str, grid: Grid, options: Sequence[str]) -> BlockMask:
    """A mask from its name and options such as ``kernel_size=3,5,5``.

    Several names joined by ``+`` are united; each then takes those options that it knows.

    Raises:
        AttnControlError: an unknown name or option, a value that the pattern refuses.
    """
    names = name.split("+")
    for one in names:
        if one not in PATTERNS:
            close = difflib.get_close_matches(one, PATTERNS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise AttnControlError(
                f"mask: no pattern {one!r}{hint}; there are: {', '.join(PATTERNS)}"
            )
    given = dict(_option(text) for text in options)
    known = {one: _options(one) for one in names}
    for key in given:
        if not any(key in each for each in known.values()):
            expected = ", ".join(f"{one}: {', '.join(each)}" for one, each in known.items())
            raise AttnControlError(f"mask: unknown option {key!r}; known are {expected}")
    found: BlockMask | None = None
    for one in names:
        mine = {key: value for key, value in given.items() if key in known[one]}
        try:
            mask = PATTERNS[one](grid, **mine)
        except TypeError as error:
            raise AttnControlError(f"mask {one}: {error}") from None
        found = mask if found is None else found | mask
    assert found is not None
    return found


def _options(name: str) -> list[str]:
    function = masks.radial_block_mask if name == "radial" else PATTERNS[name]
    names = list(inspect.signature(function).parameters)
    return names[2:] if name == "radial" else names[1:]


def _option(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise AttnControlError(f"mask: expected an option such as reach=64, got {text!r}")
    parts = [yaml.safe_load(part) for part in value.split(",")]
    return key.strip(), parts[0] if len(parts) == 1 else tuple(parts)
