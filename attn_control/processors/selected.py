"""SelectedAttention: blocks of keys that score best, by a pooled score or by attention itself
(SparseD, arXiv 2509.24014; MInference, 2407.02490; NABLA, 2507.13546; Quest, 2406.10774).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_control.call import Layout, Site
from attn_control.errors import AttnControlError
from attn_control.kernels.by_head import Selected
from attn_control.kernels.sparse import Pattern
from attn_control.masks.grid import Grid
from attn_control.masks.line import REGIONS, Line
from attn_control.masks.place import Place
from attn_control.masks.selectors import (
    Budget,
    PerRegion,
    Sampled,
    Score,
    Threshold,
    TopK,
    TopP,
    exact_pooled,
    mean_pooled,
    min_max_bound,
)
from attn_control.masks.text import text_mask
from attn_control.masks.tiles import tiles_mask
from attn_control.processors.control import one_of, whole
from attn_control.processors.neighborhood import ORDERS
from attn_control.processors.sparse import QUARTER, SparseControl, along, share, sizes
from attn_control.processors.spatial_temporal import refuse_choice

SCORES = "mean", "minmax", "sampled", "exact"


@dataclass(frozen=True)
class SelectedAttention(SparseControl):
    """Let each block of queries read the blocks of keys that score best for it, head by head.

    Args:
        keep: how many blocks of the picture: a share of them, or a number. Beside ``top_p`` the
            most of them. None: a quarter, or any number beside another budget. In language models
            that many of the prompt and that many of the response, which do not compete (SparseD);
            or ``{"prompt": 0.5, "response": 0.3}``, where a region left out is read whole.
        top_p: the fewest blocks whose shares of attention add up to this.
        threshold: blocks whose share of attention is at least this.
        score: "mean" query on mean key, "minmax" (a bound from each channel's least and greatest
            key), "sampled" (the attention of a few queries of each block), "exact" (of all, half
            the price of dense attention).
        samples: queries of each block that "sampled" asks.
        near: tiles around a query's own that are read in any case, one number or one an axis; of a
            text blocks.
        order: "tiles" (blocks are boxes) or "raster" (blocks are strips of rows); a text has one.
        select_at: "refresh": choose at refreshes, and keep to it (SparseD: once), "step": at each
            sparse step (MInference, NABLA); then nothing can be corrected by an earlier mask.

    Raises:
        AttnControlError: a value out of range, or options that do not go together.
    """

    keep: float | int | Mapping[str, float | int] | None = field(default=None, hash=False)
    top_p: float | None = field(default=None, kw_only=True)
    threshold: float | None = field(default=None, kw_only=True)
    score: str = field(default="mean", kw_only=True)
    samples: int = field(default=4, kw_only=True)
    near: int | tuple[int, ...] | None = field(default=None, kw_only=True)
    order: str = field(default="tiles", kw_only=True)
    select_at: str = field(default="refresh", kw_only=True)

    reads_text = True

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = self.owner
        if isinstance(self.keep, Mapping):
            object.__setattr__(self, "keep", _by_region(owner, self.keep))
        elif self.keep is not None:
            _amount(owner, "keep", self.keep)
        for name in ("top_p", "threshold"):
            if getattr(self, name) is not None:
                share(owner, name, getattr(self, name))
        if self.threshold is not None and (self.keep, self.top_p) != (None, None):
            raise AttnControlError(
                f"{owner}: threshold={self.threshold!r} stands alone; got keep={self.keep!r} and"
                f" top_p={self.top_p!r} beside it"
            )
        one_of(owner, "score", self.score, SCORES)
        whole(owner, "samples", self.samples, 1)
        if self.samples != 4 and self.score != "sampled":
            raise AttnControlError(
                f"{owner}: samples={self.samples} has no meaning with score={self.score!r};"
                " expected score='sampled'"
            )
        object.__setattr__(self, "near", sizes(owner, "near", self.near, 1, optional=True))
        one_of(owner, "order", self.order, ORDERS)
        if self.near is not None and self.order != "tiles":
            raise AttnControlError(
                f"{owner}: near={self.near!r} counts tiles; expected order='tiles'"
            )
        refuse_choice(self, self.select_at)

    @property
    def fixed(self) -> bool:
        return False

    @property
    def selects(self) -> bool:
        return self.select_at == "refresh"

    @property
    def text_only(self) -> bool:
        return isinstance(self.keep, dict)

    def place(self, layout: Layout) -> Any:
        return Line.of(layout) if Line.fits(layout) else super().place(layout)

    def check_place(self, site: Site, place: Place | Line) -> None:
        if not isinstance(place, Line):
            return
        if isinstance(self.keep, dict):
            place.refuse_unknown(str(self), self.keep)
        if isinstance(self.near, tuple) and len(self.near) > 1:
            raise AttnControlError(
                f"{self}: near={self.near!r} has {len(self.near)} values, but the text at"
                f" {site.label} has one axis; expected one number of blocks"
            )

    def expect(self, place: Place | Line) -> tuple[float, float] | None:
        if self.top_p is not None or self.threshold is not None or self.near is not None:
            return None
        if isinstance(place, Line):
            kept = sum(
                tokens * _share_of(self._keep_in(region), -(-tokens // place.block(self.block)))
                for region, tokens in place.tokens.items()
            )
            return kept / place.length, kept / place.length
        grid = self._grid(place)
        blocks = grid.spatial.stop - grid.spatial.start
        kept = _share_of(self._keep_in("picture"), blocks)
        text = (place.before + place.after) / place.length
        share = kept * (1 - text) ** 2 + 1 - (1 - text) ** 2
        return share, share

    def _grid(self, place: Place) -> Grid:
        block = place.block(self.block)
        return place.grid(block, place.box(block) if self.order == "tiles" else None)

    def _keep_in(self, region: str) -> float | int:
        """How much of a region's blocks is read, at most beside another budget."""
        keep = self.keep.get(region, 1.0) if isinstance(self.keep, Mapping) else self.keep
        if keep is None:
            keep = QUARTER if self.top_p is None else 1.0
        return keep if type(keep) is int else float(keep)

    def _budget(self, region: str = "picture") -> Budget:
        if self.threshold is not None:
            return Threshold(float(self.threshold))
        if self.top_p is not None and not self._whole(region):
            return TopP(float(self.top_p), self._keep_in(region))
        return TopK(self._keep_in(region))

    def _whole(self, region: str) -> bool:
        return isinstance(self.keep, Mapping) and region not in self.keep

    def _score(self) -> Score:
        known = {"mean": mean_pooled, "minmax": min_max_bound, "exact": exact_pooled}
        return Sampled(self.samples) if self.score == "sampled" else known[self.score]

    def pattern(self, place: Place | Line, device: torch.device) -> Pattern:
        if isinstance(place, Line):
            return self._on_line(place, device)
        grid = self._grid(place)
        budget, always = self._budget(), None
        if place.before or place.after:
            always = text_mask(grid)
            runs = [(place.before, None), (place.tokens, budget), (place.after, None)]
            budget = PerRegion([run for run in runs if run[0]])
        if self.near is not None:
            near = tiles_mask(grid, along(self, "near", self.near, place))
            always = near if always is None else always | near
        order = None if grid.tile is None else torch.from_numpy(grid.order()).to(device)
        always = always.to(device) if always is not None else None
        return Selected(grid, order, budget, self._score(), always, self.selects)

    def _on_line(self, line: Line, device: torch.device) -> Pattern:
        block = line.block(self.block)
        asking, keys = line.cuts(block)
        runs = [(n, None if region is None else self._budget(region)) for region, n in line.runs]
        reach = self.near[0] if isinstance(self.near, tuple) else self.near or 1
        always = line.near(block, reach).to(device)
        return Selected(
            asking, None, PerRegion(runs), self._score(), always, self.selects, keys=keys
        )


def _amount(owner: str, name: str, value: object) -> None:
    """Refuse anything but a number of blocks or a share of them."""
    if type(value) is int:
        whole(owner, name, value, 1)
    else:
        share(owner, name, value)


def _by_region(owner: str, keep: Mapping[str, float | int]) -> dict[str, float | int]:
    """Budgets by region. Raises AttnControlError for other regions, or none."""
    if not keep or not set(keep) <= set(REGIONS):
        raise AttnControlError(
            f"{owner}: keep by region must name some of {', '.join(map(repr, REGIONS))}, got"
            f" keep={dict(keep)!r}"
        )
    for region, value in keep.items():
        _amount(owner, f"keep[{region!r}]", value)
    return {region: keep[region] for region in REGIONS if region in keep}


def _share_of(keep: float | int, blocks: int) -> float:
    """The share of some blocks that a budget keeps."""
    kept = keep if type(keep) is int else math.ceil(keep * blocks - 1e-9)
    return min(1.0, kept / blocks) if blocks else 0.0
