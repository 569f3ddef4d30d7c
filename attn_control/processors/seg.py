"""SEG: smoothed energy guidance, by blurring queries (arXiv 2408.00760)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from attn_control.call import Layout, Segment, Site
from attn_control.errors import AttnControlError
from attn_control.kernels import TARGETS, Blend, Blur, Region, gaussian
from attn_control.plan import Part, PlanBuilder
from attn_control.processors.control import number
from attn_control.processors.guide import Guide


@dataclass(frozen=True)
class SEG(Guide):
    """Guide away from a prediction whose queries are blurred over the picture.

    The queries of image or video tokens of the chosen heads are blurred by a 2-D Gaussian on their
    grid, frame by frame, with weights that sum to one at the border too. The blur acts on what the
    softmax sees, that is after rotary embedding where the model has one; the paper's model has
    none.

    Args:
        heads: selector of self- or joint-attention heads; the paper uses all heads of the UNet's
            mid block.
        sigma: standard deviation in tokens; ``inf`` is the mean query.
        scale: guidance scale; the paper fixes 3. 0 asks for nothing; not with ``fused``.

    Raises:
        AttnControlError: a value out of range, or a selector that does not parse.
    """

    sigma: float = math.inf
    scale: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = f"SEG(heads={self.heads!r})"
        if self.sigma != math.inf:
            number(owner, "sigma", self.sigma, 1e-3)
        number(owner, "scale", self.scale)

    @property
    def needs(self) -> tuple[str, ...]:
        return (*super().needs, "layout")

    @property
    def idle(self) -> str | None:
        return "scale is 0" if self.scale == 0 else None

    @property
    def guidance_scale(self) -> float | None:
        return None if self.fused else self.scale

    def _pictures(self, layout: Layout | None) -> list[Segment]:
        return [s for s in layout.q if s.role in ("image", "video")] if layout else []

    def check(self, site: Site, layout: Layout) -> None:
        pictures = self._pictures(layout)
        if not pictures or (self.sigma != math.inf and any(s.grid is None for s in pictures)):
            raise AttnControlError(f"{self}: {site.label} has no image tokens on a known grid")

    def contribute(
        self,
        builder: PlanBuilder,
        number: int,
        layout: Layout | None,
        heads: tuple[int, ...],
        rows: tuple[int, int] | None,
    ) -> None:
        u = torch.ones(len(heads), dtype=torch.float32, device=builder.device)
        for picture in self._pictures(layout):
            region = Region(rows, heads, ((picture.start, picture.stop),))
            target: Any = TARGETS["mean_query"]
            if self.sigma != math.inf:
                assert picture.grid is not None
                frames, height, width = picture.grid
                down, across = (gaussian(n, self.sigma, builder.device) for n in (height, width))
                target = Blur(frames, down, across)
            builder.add(Part(number, Blend(region, u, target, own_keys=False)))
