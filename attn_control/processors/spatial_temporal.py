"""SpatialTemporalAttention: a head looks around in its frames, or along time; which, is found out
while it runs (Sparse VideoGen, arXiv 2502.01776).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from attn_control.call import Site
from attn_control.errors import AttnControlError
from attn_control.kernels.by_head import Best, sampled_queries
from attn_control.kernels.pieces import Piece
from attn_control.kernels.sparse import Pattern
from attn_control.masks.band import band_mask
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.place import Place
from attn_control.masks.sink import sink_mask
from attn_control.masks.solve import densest
from attn_control.processors.control import one_of, whole
from attn_control.processors.sparse import SparseControl, share, unmasked, video

WHEN = "refresh", "step"


@dataclass(frozen=True)
class SpatialTemporalAttention(SparseControl):
    """Give each head the mask that its sampled queries lose least by: tokens shortly before and
    after in raster order ("spatial"), or the same in an order that runs along time first
    ("temporal"). Videos only.

    Args:
        target_density: the widest bands that compute at most this share of all pairs. What the
            public code calls sparsity.
        samples: queries of each head that decide, evenly spaced over the video.
        sink: whether spatial heads read the first frame too, as published for Wan.
        select_at: "refresh": decide at refreshes, and keep to it, "step": at each sparse step, as
            published; then nothing can be corrected by an earlier mask.

    Raises:
        AttnControlError: a value out of range, a picture.
    """

    target_density: float = 0.3
    samples: int = field(default=64, kw_only=True)
    sink: bool = field(default=True, kw_only=True)
    select_at: str = field(default="refresh", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        share(self.owner, "target_density", self.target_density)
        whole(self.owner, "samples", self.samples, 1)
        one_of(self.owner, "sink", self.sink, (True, False))
        refuse_choice(self, self.select_at)

    @property
    def fixed(self) -> bool:
        return False

    @property
    def selects(self) -> bool:
        return self.select_at == "refresh"

    def check_place(self, site: Site, place: Place) -> None:
        video(self, site, place)

    def expect(self, place: Place) -> tuple[float, float] | None:
        return self.target_density, self.target_density

    def pattern(self, place: Place, device: torch.device) -> Pattern:
        block = place.block(self.block)
        grid = place.grid(block)
        # Along time first, a token's neighbours are the same place in other frames.
        turned = Grid((place.tokens,), block, before=place.before, after=place.after)

        def spatial(reach: int) -> BlockMask:
            band = band_mask(grid, reach)
            return band | sink_mask(grid) if self.sink else band

        _, near = densest(str(self), spatial, place.tokens, self.target_density)
        _, along = densest(
            str(self), lambda reach: band_mask(turned, reach), place.tokens, self.target_density
        )
        pieces = (
            Piece.on(grid, unmasked(near), device),
            Piece(unmasked(along).to(device), place.time_first().to(device)),
        )
        queries = sampled_queries(place.before, place.tokens, self.samples, device)
        return Best(pieces, queries, self.selects)


def refuse_choice(control: SparseControl, when: str) -> None:
    """Refuse a mask of each step together with a correction by an earlier mask."""
    one_of(control.owner, "select_at", when, WHEN)
    if when == "step" and control.correction != "none":
        raise AttnControlError(
            f"{control.owner}: select_at='step' makes a mask for each step, but"
            f" correction={control.correction!r} belongs to the mask of a refresh; expected"
            " select_at='refresh' or correction='none'"
        )
