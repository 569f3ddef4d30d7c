"""SkipLayers: guidance by leaving out whole blocks, their attention or their feed-forward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from attn_control.call import SLOTS, Site, Step
from attn_control.errors import AttnControlError
from attn_control.processors.control import number, one_of, whole
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
        scale: guidance scale; Stability uses 2.8 in the window 0.01-0.2; not with ``fused``.
        what: "block", "attention" or "feed_forward".
        stochastic: how many of the selected layers are left out, drawn anew at each step
            (S2-Guidance, arXiv 2508.12880); None: all of them at every step. Drawn layers are
            computed all the same, so that no draw is a graph of its own.
        seed: of the draws; a step's draw depends on it and on the step's index alone.

    Raises:
        AttnControlError: a selector that names heads, a value out of range, or as many layers to
            draw as there are.
    """

    u: float = 1.0
    scale: float = 2.8
    what: str = "block"
    stochastic: int | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)

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
        whole(owner, "seed", self.seed, 0)
        if self.stochastic is not None:
            whole(owner, "stochastic", self.stochastic, 1)
        elif self.seed:
            raise AttnControlError(
                f"{owner}: seed={self.seed} has no meaning without stochastic, the number of layers"
                " to draw"
            )

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
        return None if self.fused else self.scale

    def select(self, sites: Iterable[Site]) -> dict[Site, tuple[int, ...]]:
        if self.what == "attention":
            chosen = super().select(sites)
        else:  # one site stands for its block, whatever it attends to
            chosen = self.selector.resolve(sites, slots=SLOTS, allowed=SLOTS, who=str(self))
            first: dict[tuple[str, int], Site] = {}
            for site in chosen:
                first.setdefault((site.model, site.layer), site)
            chosen = {site: chosen[site] for site in first.values()}
        for model in dict.fromkeys(site.model for site in chosen):
            layers = _layers(site for site in chosen if site.model == model)
            if self.stochastic is not None and self.stochastic >= len(layers):
                raise AttnControlError(
                    f"{self}: expected to draw fewer than the {len(layers)} selected layers of"
                    f" {model}, got stochastic={self.stochastic}"
                )
        return chosen

    def sites_at(self, step: Step, sites: Iterable[Site]) -> set[Site]:
        sites = set(sites)
        if self.stochastic is None:
            return sites
        layers = _layers(sites)
        # By seed and step alone: a run repeats, and calls need not be counted.
        mixed = self.seed * 1_000_003 + (step.index or 0)
        generator = torch.Generator().manual_seed(mixed % (1 << 63))
        order = torch.randperm(len(layers), generator=generator)[: self.stochastic]
        drawn = {layers[n] for n in order.tolist()}
        return {site for site in sites if site.layer in drawn}


def _layers(sites: Iterable[Site]) -> list[int]:
    return sorted({site.layer for site in sites})
