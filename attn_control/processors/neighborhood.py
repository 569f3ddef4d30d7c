"""NeighborhoodAttention: every query reads the window around it (NATTEN; Generalized Neighborhood
Attention, arXiv 2504.16922).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from attn_control.errors import AttnControlError
from attn_control.kernels.pieces import Piece
from attn_control.kernels.sparse import Fixed, Pattern
from attn_control.masks.block import BlockMask
from attn_control.masks.neighborhood import neighborhood_mask
from attn_control.masks.place import Place
from attn_control.masks.solve import densest
from attn_control.processors.control import one_of
from attn_control.processors.sparse import QUARTER, SparseControl, along, sizes, target, unmasked

ORDERS = "tiles", "raster"


@dataclass(frozen=True)
class NeighborhoodAttention(SparseControl):
    """Let a query read the window of keys around it, always as many, moved inwards at the borders.

    Args:
        kernel: keys along each axis, (frames, height, width) or one for all; an axis that is
            shorter is read whole.
        stride: neighbouring queries that share the window of the one in their middle; at most the
            kernel.
        dilation: distance between neighbours; where the axis is too short for it, less.
        order: "tiles": boxes of tokens lie together, "raster": rows do. Changes the time, and no
            result but in rounding.
        target_density: instead of ``kernel``: the largest window, in proportion to the video, that
            computes at most this share of all pairs. Without either: a quarter.

    Raises:
        AttnControlError: a value out of range.
    """

    kernel: int | tuple[int, ...] | None = None
    stride: int | tuple[int, ...] = field(default=1, kw_only=True)
    dilation: int | tuple[int, ...] = field(default=1, kw_only=True)
    order: str = field(default="tiles", kw_only=True)
    target_density: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("kernel", 2), ("stride", 1), ("dilation", 1)):
            given = sizes(self.owner, name, getattr(self, name), low, optional=name == "kernel")
            object.__setattr__(self, name, given)
        one_of(self.owner, "order", self.order, ORDERS)
        target(self.owner, self.target_density, "kernel", self.kernel)

    def pattern(self, place: Place, device: torch.device) -> Pattern:
        block = place.block(self.block)
        tile = place.box(block) if self.order == "tiles" else None
        grid = place.grid(block, tile)
        axes = place.spatial
        if min(axes) < 2:
            raise AttnControlError(
                f"{self}: a picture of {place.shape} tokens has no neighbourhood"
            )
        dilation = along(self, "dilation", self.dilation, place)
        dilation = tuple(max(1, min(d, n // 2)) for d, n in zip(dilation, axes, strict=True))
        stride = along(self, "stride", self.stride, place)

        def window(kernel: tuple[int, ...]) -> BlockMask:
            fits = [max(2, min(k, n // d)) for k, n, d in zip(kernel, axes, dilation, strict=True)]
            strides = [min(s, k) for s, k in zip(stride, fits, strict=True)]
            return neighborhood_mask(grid, fits, stride=strides, dilation=dilation)

        if self.kernel is not None:
            mask = window(along(self, "kernel", self.kernel, place))
        else:
            most = max(axes)

            def of_size(size: int) -> BlockMask:
                return window(tuple(max(2, round(n * size / most)) for n in axes))

            _, mask = densest(str(self), of_size, most, self.target_density or QUARTER)
        return Fixed((Piece.on(grid, unmasked(mask), device),))
