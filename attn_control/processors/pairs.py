"""Which controls cannot act together, decided when they are attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from attn_control.call import Site
from attn_control.errors import AttnControlError
from attn_control.processors.control import Control
from attn_control.select import Window

Chosen = tuple[Control, Mapping[Site, Any]]
"""A control and the sites of one model that it selects."""


def check_pairs(chosen: Sequence[Chosen]) -> None:
    """Raises AttnControlError for the first two controls of which one would be lost."""
    for (a, sites), (b, others) in combinations(chosen, 2):
        if a.idle or b.idle or not _meet(a.when, b.when):
            continue
        why = _conflict(a, sites, b, others)
        if why:
            raise AttnControlError(f"attach: {a} and {b} cannot act together: {why}")


def _conflict(
    a: Control, sites: Mapping[Site, Any], b: Control, others: Mapping[Site, Any]
) -> str | None:
    if a.appends and b.appends:
        return (
            "each would run the conditional rows again with a negative text of its own; expected"
            " one of them, or windows that do not meet"
        )
    if a.sparse and b.sparse:
        return _same_heads(sites, others)
    for one, other in ((a, b), (b, a)):
        if other.appends and one.rides:
            return "rows that run twice cannot carry perturbed ones too; expected batched=False"
        if other.appends and one.by_row:
            return "gates by row do not fit rows that run twice; expected gates (layers, heads)"
    if _own_forward(a) or _own_forward(b):
        return None
    return _in_one_forward(a, set(sites), b, set(others))


def _same_heads(sites: Mapping[Site, Any], others: Mapping[Site, Any]) -> str | None:
    for site, heads in sites.items():
        both = sorted(set(heads) & set(others.get(site, ())))
        if both:
            return (
                f"both decide which keys {site.label}H{both[0]} reads; expected other heads, or"
                " windows that do not meet"
            )
    return None


def _own_forward(control: Control) -> bool:
    return control.guidance_scale is not None and not control.rides


def _in_one_forward(a: Control, sites: set[Site], b: Control, others: set[Site]) -> str | None:
    blocks = {(site.model, site.layer) for site in sites}
    shared = sorted({site.layer for site in others if (site.model, site.layer) in blocks})
    layers = ", ".join(f"L{layer}" for layer in shared)
    if shared and a.bypass and a.bypass == b.bypass:
        return f"both leave out the same {a.bypass.replace('_', '-')} in one forward: {layers}"
    if not a.branch == b.branch == "uncond":
        return None  # each has rows of its own
    for one, other in ((a, b), (b, a)):
        whole = getattr(one, "u", None) == 1 and not getattr(one, "stochastic", None)
        inside = shared if one.bypass == "block" else []
        if one.bypass == "attention" and not other.bypass:
            inside = sorted({site.layer for site in sites & others})
        if whole and inside:
            layers = ", ".join(f"L{layer}" for layer in inside)
            return f"{one} leaves out whole what {other} would change: {layers}"
    return None


def _meet(a: Window, b: Window) -> bool:
    """Whether two windows may hold the same step; of progress and sigma nobody can tell."""
    if a.kind != b.kind:
        return True
    if a.kind == "sigma":
        return a.last <= b.first and b.last <= a.first
    return a.first < b.last and b.first < a.last
