"""HeadGate: scale or silence heads in place (head ablation, arXiv 1905.10650)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_control.call import SLOTS, Layout, Site
from attn_control.kernels import Gain, Region
from attn_control.plan import Part, PlanBuilder
from attn_control.processors.control import TOKENS, Control, number, one_of, require_tokens, span_of


@dataclass(frozen=True)
class HeadGate(Control):
    """Multiply the output of chosen heads by ``gain``: 0 silences them, 1 asks for nothing. No
    extra forward.

    Args:
        heads: selector of heads; without a slot it takes self- and joint attention, ``L3.cross``
            takes cross.
        gain: finite factor.
        tokens: whose queries are changed: "all", or a role ("image", "video", "text", "reference").
        window: when it acts.

    Raises:
        AttnControlError: a value out of range, or a selector that does not parse.
    """

    gain: float = 0.0
    tokens: str = "all"

    allowed = SLOTS
    reads_text = True

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = f"HeadGate(heads={self.heads!r})"
        number(owner, "gain", self.gain)
        one_of(owner, "tokens", self.tokens, TOKENS)

    @property
    def needs(self) -> tuple[str, ...]:
        return (*super().needs, *(() if self.tokens == "all" else ("layout",)))

    @property
    def idle(self) -> str | None:
        return "gain is 1" if self.gain == 1 else None

    def check(self, site: Site, layout: Layout) -> None:
        require_tokens(self, self.tokens, site, layout)

    def contribute(
        self,
        builder: PlanBuilder,
        number: int,
        layout: Layout | None,
        heads: tuple[int, ...],
        rows: tuple[int, int] | None,
    ) -> None:
        gain = torch.full(
            (len(heads),), float(self.gain), dtype=torch.float32, device=builder.device
        )
        builder.add(Part(number, Gain(Region(rows, heads, span_of(self.tokens, layout)), gain)))
