"""Which query tokens may read which key tokens, listed by blocks. Knows no model and no module."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_control.masks.band import band_mask
    from attn_control.masks.block import BlockMask
    from attn_control.masks.combine import per_head
    from attn_control.masks.cross import cross_mask
    from attn_control.masks.frame_band import frame_band_mask
    from attn_control.masks.grid import Grid
    from attn_control.masks.group import GroupMask
    from attn_control.masks.neighborhood import neighborhood_mask
    from attn_control.masks.power_of_two import power_of_two_mask
    from attn_control.masks.products import product
    from attn_control.masks.radial import radial_block_mask
    from attn_control.masks.sink import sink_mask
    from attn_control.masks.spatial_temporal import (
        spatial_mask,
        spatial_temporal_mask,
        temporal_mask,
    )
    from attn_control.masks.strided import strided_mask
    from attn_control.masks.text import text_mask
    from attn_control.masks.tiles import tiles_mask

_HOMES = {
    "BlockMask": "block",
    "Grid": "grid",
    "GroupMask": "group",
    "band_mask": "band",
    "cross_mask": "cross",
    "frame_band_mask": "frame_band",
    "neighborhood_mask": "neighborhood",
    "per_head": "combine",
    "power_of_two_mask": "power_of_two",
    "product": "products",
    "radial_block_mask": "radial",
    "sink_mask": "sink",
    "spatial_mask": "spatial_temporal",
    "spatial_temporal_mask": "spatial_temporal",
    "strided_mask": "strided",
    "temporal_mask": "spatial_temporal",
    "text_mask": "text",
    "tiles_mask": "tiles",
}
__all__ = [
    "BlockMask",
    "Grid",
    "GroupMask",
    "band_mask",
    "cross_mask",
    "frame_band_mask",
    "neighborhood_mask",
    "per_head",
    "power_of_two_mask",
    "product",
    "radial_block_mask",
    "sink_mask",
    "spatial_mask",
    "spatial_temporal_mask",
    "strided_mask",
    "temporal_mask",
    "text_mask",
    "tiles_mask",
]


def __getattr__(name: str) -> Any:
    # Each file of a pattern is also a program: `python -m` must find it not yet imported.
    if name in _HOMES:
        return getattr(importlib.import_module(f"attn_control.masks.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'attn_control.masks' has no attribute {name!r}")
