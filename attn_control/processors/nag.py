"""NAG: negative prompts inside attention, also for distilled and few-step models (arXiv
2505.21179).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_control.call import Layout, Site
from attn_control.errors import AttnControlError
from attn_control.kernels import Extrapolate, Region
from attn_control.plan import Part, PlanBuilder
from attn_control.processors.control import Control, number, one_of


@dataclass(frozen=True)
class NAG(Control):
    """Steer away from a negative prompt inside every attention that reads text.

    The conditional rows run a second time with the negative text; where image or video tokens
    attend to text, their output is extrapolated from the negative one's, ``scale * Z+ - (scale - 1)
    * Z-``, capped to ``tau`` times the norm of Z+ per head and token, and blended in by ``alpha``.
    Costs as much as classifier-free guidance and needs none.

    Args:
        heads: selector of cross- or joint-attention heads.
        negative: the negative prompt as the pipeline's text embedding (rows 1 or as many as cond
            rows, tokens, width), with as many tokens as the positive one; None takes zeros.
        scale: 1 asks for nothing; the paper uses about 5.
        tau: cap of the norm, relative to Z+.
        alpha: share of the extrapolated output, 0 to 1.
        order: the norm: 1 as in the paper, 2 as in its FLUX code.
        window: when it acts; late steps matter little.

    Raises:
        AttnControlError: a value out of range, or a text that does not fit the model's.
    """

    heads: str = "all"
    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25
    order: int = field(default=1, kw_only=True)
    negative: Tensor | None = field(default=None, kw_only=True, repr=False, compare=False)

    slots = ("joint", "cross")
    allowed = ("joint", "cross")
    appends = True

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = f"NAG(heads={self.heads!r})"
        number(owner, "scale", self.scale, 1.0)
        number(owner, "tau", self.tau, 0.0)
        number(owner, "alpha", self.alpha, 0.0, 1.0)
        one_of(owner, "order", self.order, (1, 2))
        if self.negative is not None and (
            not isinstance(self.negative, Tensor) or self.negative.ndim != 3
        ):
            shape = (
                tuple(self.negative.shape) if isinstance(self.negative, Tensor) else self.negative
            )
            raise AttnControlError(
                f"{owner}: negative must be a tensor (rows, tokens, width), got {shape!r}"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("branch", *super().needs, "layout")

    @property
    def branch(self) -> str | None:
        return "cond"

    @property
    def idle(self) -> str | None:
        if self.scale == 1:
            return "scale is 1"
        return "alpha is 0" if self.alpha == 0 else None

    def negative_text(self, text: Tensor) -> Tensor:
        """The negative text for the cond rows' ``text`` (rows, tokens, width)."""
        if self.negative is None:
            return torch.zeros_like(text)
        given = self.negative.to(text)
        if given.shape[1:] != text.shape[1:] or given.shape[0] not in (1, text.shape[0]):
            raise AttnControlError(
                f"{self}: negative has shape {tuple(given.shape)}, but the model's text is"
                f" {tuple(text.shape)}"
            )
        return given.expand_as(text)

    def check(self, site: Site, layout: Layout) -> None:
        if not self._spans(layout) or not any(s.role == "text" for s in layout.k):
            raise AttnControlError(f"{self}: at {site.label} no image attends to text")

    def _spans(self, layout: Layout | None) -> tuple[tuple[int, int], ...]:
        return () if layout is None else layout.span("image") + layout.span("reference")

    def contribute(
        self,
        builder: PlanBuilder,
        number: int,
        layout: Layout | None,
        heads: tuple[int, ...],
        rows: tuple[int, int] | None,
    ) -> None:
        assert rows is not None and builder.rows is not None
        region = Region(rows, heads, self._spans(layout))
        numbers = torch.tensor([self.scale, self.tau, self.alpha], device=builder.device)
        negative = (builder.rows - (rows[1] - rows[0]), builder.rows)
        builder.add(Part(number, Extrapolate(region, negative, numbers, self.order)))
