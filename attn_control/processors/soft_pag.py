"""SoftPAG: guidance by softly perturbing attention heads (arXiv 2506.10978, Eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_control.call import Layout, Site
from attn_control.errors import AttnControlError
from attn_control.kernels import Blend, Region
from attn_control.plan import Part, PlanBuilder
from attn_control.processors.control import TOKENS, Control, number, one_of, require_tokens, span_of

OPS = ("identity",)


@dataclass(frozen=True)
class SoftPAG(Control):
    """Guide away from a prediction in which chosen heads attend only to themselves.

    Per selected head the perturbed pass uses ``A' = (1 - u) A + u I``, computed as ``O' = (1 - u) O
    + u V`` (no map of tokens by tokens), and the guided prediction is ``pred + scale * (cond -
    perturbed)``, where ``pred`` is whatever classifier-free guidance the pipeline makes. All heads
    of a layer at ``u=1`` are PAG (arXiv 2403.17377).

    Args:
        heads: selector of self- or joint-attention heads, e.g. ``"L7H3, L9H11-14"``.
        u: strength of the perturbation, 0 (none, and no extra forward) to 1 (identity).
        scale: guidance scale ``w``; the papers use 3 for SD3. 0 asks for nothing.
        op: what attention is blended with: "identity".
        tokens: whose queries are perturbed: "all" (as in the paper), "image" (or "video"), "text"
            or "reference".
        window: when it acts.

    Raises:
        AttnControlError: a value out of range, or a selector that does not parse.
    """

    u: float = 1.0
    scale: float = 3.0
    op: str = "identity"
    tokens: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = f"SoftPAG(heads={self.heads!r})"
        number(owner, "u", self.u, 0.0, 1.0)
        number(owner, "scale", self.scale)
        one_of(owner, "op", self.op, OPS)
        one_of(owner, "tokens", self.tokens, TOKENS)

    @property
    def needs(self) -> tuple[str, ...]:
        layout = () if self.tokens == "all" else ("layout",)
        return ("branch", *super().needs, *layout)

    @property
    def idle(self) -> str | None:
        if self.u == 0:
            return "u is 0"
        return "scale is 0" if self.scale == 0 else None

    @property
    def guidance_scale(self) -> float | None:
        return self.scale

    def check(self, site: Site, layout: Layout) -> None:
        if not layout.is_self:
            raise AttnControlError(
                f"{self}: {site.label} attends from {layout.q_len} queries to {layout.k_len} other"
                " keys;"
                " the identity needs query i and key i to be the same token"
            )
        require_tokens(self, self.tokens, site, layout)

    def contribute(
        self,
        builder: PlanBuilder,
        number: int,
        layout: Layout | None,
        heads: tuple[int, ...],
        rows: tuple[int, int] | None,
    ) -> None:
        u = torch.full((len(heads),), float(self.u), dtype=torch.float32, device=builder.device)
        builder.add(Part(number, Blend(Region(rows, heads, span_of(self.tokens, layout)), u)))
