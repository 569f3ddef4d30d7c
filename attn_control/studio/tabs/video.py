"""Video: queries read a part of the keys, by a pattern, with a correction for what is left out."""

from __future__ import annotations

from typing import Any

from attn_control.kernels.corrections import CORRECTIONS
from attn_control.studio.form import WINDOW, Field, Method

NAME = "Video"

HEADS = Field("heads", "heads", "heads", info="all, or for example L1, L3H0-1")
CORRECTION = Field(
    "correction",
    "correction, for what the mask leaves out",
    "choice",
    choices=tuple(CORRECTIONS),
    info="from the last dense step; none uses the mask alone",
)
FIRST = Field(
    "policy.first", "dense steps at the beginning, share", high=0.95, info="the rest is sparse"
)
REFRESH = Field("policy.refresh", "a dense step again every", "whole", low=1, high=50, info="steps")
DENSE = Field("policy.layers", "dense layers", "text", info="for example L0; empty for none")
ALWAYS = (CORRECTION, FIRST, REFRESH, DENSE, WINDOW)


def density(start: float, otherwise: str) -> Field:
    """A target density; 0 stands for not asking for one."""
    info = f"share of all pairs; 0: {otherwise}"
    return Field("target_density", "target density", start=start, step=0.01, info=info, absent=0.0)


METHODS = (
    Method(
        "RadialAttention",
        "Radial attention",
        "Lets a query read keys that are the nearer in place, the farther away their frame is, and "
        "the first frame always. Long videos cost n log n instead of n squared.",
        "https://arxiv.org/abs/2506.19852",
        "Radial Attention, arXiv 2506.19852",
        (
            HEADS,
            density(0.5, "by the decay factor"),
            Field("decay_factor", "decay factor", low=0.05, high=4.0, info="with density 0"),
            *ALWAYS,
        ),
    ),
    Method(
        "NeighborhoodAttention",
        "Neighbourhood attention",
        "Lets a query read the window of keys around it, moved inwards at the borders, always as "
        "many. It works on pictures and on videos.",
        "https://arxiv.org/abs/2504.16922",
        "Generalized Neighborhood Attention, arXiv 2504.16922",
        (HEADS, density(0.5, "a quarter"), *ALWAYS),
    ),
    Method(
        "TileAttention",
        "Sliding tiles",
        "Cuts frames into tiles, and lets a tile read the whole tiles around its own. No block of "
        "the mask is cut, so that time follows density.",
        "https://arxiv.org/abs/2502.04507",
        "Sliding Tile Attention, arXiv 2502.04507",
        (HEADS, density(0.5, "a quarter"), *ALWAYS),
    ),
    Method(
        "SpatialTemporalAttention",
        "Spatial and temporal heads",
        "Gives each head the mask that its sampled queries lose least by: its own frame, or its "
        "own place in all frames. It decides while it runs, so that no mask can be drawn before.",
        "https://arxiv.org/abs/2502.01776",
        "Sparse VideoGen, arXiv 2502.01776",
        (
            HEADS,
            Field("target_density", "target density", low=0.05, step=0.01, info="of all pairs"),
            *ALWAYS,
        ),
    ),
)  # fmt: skip


def layout(ui: Any) -> None:
    """What the patterns would do at this size, drawn live; then their sections."""
    import gradio as gr

    from attn_control.studio.layout import section

    ui.add("foreseen", gr.HTML("", apply_default_css=False, elem_id="foreseen"))
    for method in METHODS:
        section(ui, method)
