"""ReshapedAttention: a narrow band, whose softmax is scaled back to the share that it had of dense
attention (Re-ttention, arXiv 2505.22918).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from attn_control.kernels.pieces import Piece
from attn_control.kernels.sparse import Fixed, Pattern
from attn_control.masks import relations
from attn_control.masks.band import band_mask
from attn_control.masks.grid import Grid
from attn_control.masks.place import Place
from attn_control.masks.products import product
from attn_control.processors.sparse import SparseControl, share, unmasked


@dataclass(frozen=True)
class ReshapedAttention(SparseControl):
    """Let a query read a narrow band of keys around its place, in videos the same band of every
    frame, and put back what the rest was at the last refresh.

    Args:
        width: of the band, as a share of the picture, or of one frame of a video; in raster order.
        correction: "rho" as published; any other.

    Raises:
        AttnControlError: a value out of range.
    """

    width: float = 0.03125
    correction: str = field(default="rho", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        share(self.owner, "width", self.width)

    def pattern(self, place: Place, device: torch.device) -> Pattern:
        block = place.block(self.block)
        frames, height, width = place.shape
        reach = max(1, int(height * width * self.width)) // 2
        if frames == 1 or len(place.axes) == 1:
            grid = place.grid(block)
            return Fixed((Piece.on(grid, unmasked(band_mask(grid, reach)), device),))
        # A band of every frame is many narrow ones; where the frames of a place lie together it is
        # a single one, of whole blocks.
        turned = Grid((height * width, frames), block, before=place.before, after=place.after)
        mask = product(turned, {(0,): relations.within(height * width, reach)})
        return Fixed((Piece(unmasked(mask).to(device), place.time_first().to(device)),))
