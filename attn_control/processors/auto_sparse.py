"""AutoSparse: which mask, and how dense, for each head of each layer, measured in a dense step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from attn_control.call import Step
from attn_control.kernels.auto import Auto
from attn_control.kernels.by_head import Selected, sampled_queries
from attn_control.kernels.pieces import Piece
from attn_control.kernels.sparse import Pattern
from attn_control.masks.neighborhood import neighborhood_mask
from attn_control.masks.place import Place
from attn_control.masks.selectors import Budget, PerRegion, TopK, mean_pooled
from attn_control.masks.sink import sink_mask
from attn_control.masks.spatial_temporal import spatial_mask, temporal_mask
from attn_control.masks.text import text_mask
from attn_control.processors.control import whole
from attn_control.processors.sparse import SparseControl, share, unmasked

WINDOWS = 0.25, 0.4, 0.6, 0.8
"""Sides of the neighbourhoods that are tried, as shares of the video's."""
SHARES = 0.03, 0.06, 0.12, 0.2, 0.3, 0.45, 0.65
"""Shares of selected blocks that are tried."""


@dataclass(frozen=True)
class AutoSparse(SparseControl):
    """Give each head of each layer the mask that it loses least by, all together at one density.

    In the last dense step before the first sparse one, a few queries of each head tell how far the
    output would be off under each of some masks: neighbourhoods, own frame and first, own place in
    all frames, and the blocks that score best, in several sizes. One price of density for all heads
    then decides: heads that need much get much. Ours; the price is that of MoA (arXiv 2406.14909).

    Args:
        target_density: mean share of pairs that is computed, over all selected heads of a model.
        samples: queries of each head that are asked.

    Raises:
        AttnControlError: a value out of range.
    """

    target_density: float = 0.2
    samples: int = field(default=64, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        share(self.owner, "target_density", self.target_density)
        whole(self.owner, "samples", self.samples, 1)

    @property
    def fixed(self) -> bool:
        return False

    @property
    def selects(self) -> bool:
        return True

    def measures(self, step: Step) -> bool:
        """Whether this dense step is the last before the first sparse one."""
        if step.level is None or step.levels is None:
            return False
        return step.level == self.policy.span(step.levels)[0] - 1

    def stays_dense(self, step: Step) -> bool:
        return super().stays_dense(step) and not self.measures(step)

    def expect(self, place: Place) -> tuple[float, float] | None:
        return self.target_density, self.target_density

    def pattern(self, place: Place, device: torch.device) -> Pattern:
        block = place.block(self.block)
        grid = place.grid(block, place.box(block))
        masks = []
        if min(place.spatial) > 1:
            masks += [
                neighborhood_mask(grid, [max(2, round(n * side)) for n in place.spatial])
                for side in WINDOWS
            ]
        if place.shape[0] > 1 and len(place.axes) > 1:
            frame, own = spatial_mask(grid), temporal_mask(grid, 1)
            masks += [frame | sink_mask(grid), own, frame | own]
        always = text_mask(grid) if place.before or place.after else None
        selectors = []
        order = torch.from_numpy(grid.order()).to(device)
        for kept in SHARES:
            budget: Budget = TopK(kept)
            if always is not None:
                runs = [(place.before, None), (place.tokens, budget), (place.after, None)]
                budget = PerRegion([run for run in runs if run[0]])
            on = None if always is None else always.to(device)
            selectors.append(Selected(grid, order, budget, mean_pooled, on, True))
        return Auto(
            tuple(Piece(unmasked(mask).to(device), order) for mask in masks),
            tuple(selectors),
            sampled_queries(place.before, place.tokens, self.samples, device),
            self.target_density,
        )
