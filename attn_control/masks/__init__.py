"""Which query tokens may read which key tokens, listed by blocks. Knows no model and no module."""

from attn_control.masks.band import band_mask
from attn_control.masks.block import BlockMask
from attn_control.masks.combine import per_head
from attn_control.masks.cross import cross_mask
from attn_control.masks.frame_band import frame_band_mask
from attn_control.masks.grid import Grid
from attn_control.masks.neighborhood import neighborhood_mask
from attn_control.masks.power_of_two import power_of_two_mask
from attn_control.masks.product import product
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

__all__ = [
    "BlockMask",
    "Grid",
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
