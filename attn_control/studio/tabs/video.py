"""Video: queries read a part of the keys, by a pattern, with a correction for what is left out."""

from __future__ import annotations

from typing import Any

from attn_control.kernels.corrections import CORRECTIONS
from attn_control.processors.neighborhood import ORDERS
from attn_control.processors.selected import SCORES
from attn_control.processors.spatial_temporal import WHEN
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
TARGET = Field("target_density", "target density", low=0.05, step=0.01, info="of all pairs")
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
        "Gives each head the mask that its sampled queries lose least by: tokens near in the "
        "picture, or near in time. It decides while it runs, so that no mask can be drawn before.",
        "https://arxiv.org/abs/2502.01776",
        "Sparse VideoGen, arXiv 2502.01776",
        (
            HEADS,
            TARGET,
            *ALWAYS,
        ),
    ),
    Method(
        "SelectedAttention",
        "Blocks that score best",
        "Lets each block of queries read the blocks of keys that score best for it, head by head. "
        "It scores them while it runs, so that no mask can be drawn before.",
        "https://arxiv.org/abs/2509.24014",
        "SparseD, arXiv 2509.24014",
        (
            HEADS,
            Field(
                "keep", "keep, share of the blocks", "share", start=0.25, step=0.01,
                info="0: a quarter, or as many as top p asks for", absent=0.0,
            ),
            Field(
                "top_p", "top p, share of attention", "share", start=0.0, step=0.01,
                info="the fewest blocks that hold so much; 0 asks for nothing", absent=0.0,
            ),
            Field("score", "score", "choice", choices=SCORES, info="exact costs half of dense"),
            Field("order", "order of tokens", "choice", choices=ORDERS),
            Field(
                "select_at", "chosen anew", "choice", choices=WHEN,
                info="at each step needs the correction none",
            ),
            *ALWAYS,
        ),
    ),
    Method(
        "ReshapedAttention",
        "A narrow band, reshaped",
        "Lets a query read a narrow band of keys around its place, in a video the same band of "
        "every frame. What it finds is scaled back to its share of the last dense softmax.",
        "https://arxiv.org/abs/2505.22918",
        "Re-ttention, arXiv 2505.22918",
        (
            HEADS,
            Field("width", "width, share of a frame", low=0.00625, high=0.5, step=0.00625),
            *ALWAYS,
        ),
    ),
    Method(
        "AutoSparse",
        "A mask for each head",
        "Measures in the last dense step what each head would lose under several masks, and gives "
        "much to heads that need much, at one mean density (ours; the price is MoA's). It decides "
        "while it runs, so that no mask can be drawn before.",
        "https://arxiv.org/abs/2406.14909",
        "after MoA, arXiv 2406.14909",
        (HEADS, TARGET, *ALWAYS),
    ),
)  # fmt: skip


def layout(ui: Any) -> None:
    """What the patterns would do at this size, drawn live; then their sections."""
    import gradio as gr

    from attn_control.studio.layout import section

    ui.add("foreseen", gr.HTML("", apply_default_css=False, elem_id="foreseen"))
    for method in METHODS:
        section(ui, method)
