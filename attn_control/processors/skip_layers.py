"""SkipLayers: guidance by leaving out whole blocks, their attention or their feed-forward."""

from __future__ import annotations

from dataclasses import dataclass

from attn_control.errors import AttnControlError
from attn_control.processors.control import number, one_of
from attn_control.processors.guide import Guide

WHAT = ("block", "attention", "feed_forward")


@dataclass(frozen=True)
class SkipLayers(Guide):
    """Guide away from a prediction made without some layers.

    ``what="block"`` is Stability's skip-layer guidance for SD3.5 and the block skip of STG (arXiv
    2411.18664): ``h' = (1 - u) block(h) + u h``. "attention" and "feed_forward" leave out that
    branch of the block, ``h + (1 - u) f(h)``.

    Args:
        heads: selector of layers, without heads: ``"L7-9"``.
        u: share that is left out, 0 (nothing) to 1 (all).
        scale: guidance scale; Stability uses 2.8 in the window 0.01-0.2.
        what: "block", "attention" or "feed_forward".

    Raises:
        AttnControlError: a selector that names heads, or a value out of range.
    """

    u: float = 1.0
    scale: float = 2.8
    what: str = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = f"SkipLayers(heads={self.heads!r})"
        for term in self.selector.terms:
            if term.heads is not None:
                raise AttnControlError(
                    f"{owner}: layers are skipped whole, but {term.text!r} names heads"
                )
        number(owner, "u", self.u, 0.0, 1.0)
        number(owner, "scale", self.scale)
        one_of(owner, "what", self.what, WHAT)

    @property
    def bypass(self) -> str | None:
        return self.what

    @property
    def idle(self) -> str | None:
        if self.u == 0:
            return "u is 0"
        return "scale is 0" if self.scale == 0 else None

    @property
    def guidance_scale(self) -> float | None:
        return self.scale
