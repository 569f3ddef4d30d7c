"""ReshapedAttention: a narrow band, whose softmax is scaled back to the share that it had of dense
attention (Re-ttention, arXiv 2505.22918).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from attn_control.kernels.pieces import Piece
from attn_control.kernels.sparse import Fixed, Pattern
from attn_control.masks.band import band_mask
from attn_control.masks.frame_band import frame_band_mask
from attn_control.masks.place import Place
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
        grid = place.grid(place.block(self.block))
        frames, height, width = place.shape
        reach = max(1, int(height * width * self.width)) // 2
        of_frames = frames > 1 and len(place.axes) > 1
        mask = frame_band_mask(grid, reach) if of_frames else band_mask(grid, reach)
        return Fixed((Piece.on(grid, unmasked(mask), device),))
