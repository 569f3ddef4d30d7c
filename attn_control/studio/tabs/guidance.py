"""Guidance: steer away from a prediction in which chosen heads or layers are disturbed."""

from __future__ import annotations

from typing import Any

from attn_control.processors.skip_layers import WHAT
from attn_control.processors.soft_pag import OPS
from attn_control.studio.form import WINDOW, Field, Method

NAME = "Guidance"
SCALE = Field("scale", "scale", low=0.0, high=10.0, step=0.1, info="0 asks for nothing")

METHODS = (
    Method(
        "SoftPAG",
        "Heads: SoftPAG and PAG",
        "Runs the model a second time with the chosen heads looking only at themselves, and steers "
        "away from what that predicts. Single heads change single things (a shape, a colour, the "
        "light); all heads of a layer are PAG.",
        "https://arxiv.org/abs/2506.10978",
        "SoftPAG, arXiv 2506.10978",
        (
            Field("heads", "heads", "heads", "", info="for example L3H2, L0H0-1; L3 is a layer"),
            Field("u", "u, strength", low=-1.0, info="1 is all of it; below 0 sharpens in place"),
            Field("scale", "scale", start=1.0, low=0.0, high=10.0, step=0.1, info=SCALE.info),
            Field("op", "op, what attention is blended with", "choice", choices=OPS),
            Field("tokens", "whose tokens", "choice", choices=("all", "image", "text")),
            WINDOW,
        ),
    ),
    Method(
        "SEG",
        "Blur: SEG",
        "Runs the model a second time with the chosen heads' queries blurred over the picture, and "
        "steers away from what that predicts. The wider the blur, the stronger the effect; no "
        "prompt is needed for it.",
        "https://arxiv.org/abs/2408.00760",
        "SEG, arXiv 2408.00760",
        (
            Field("heads", "heads", "heads", "", info="for example L3; the paper takes the middle"),
            Field("sigma", "sigma, in tokens", start=2.0, low=0.1, high=20.0, step=0.1),
            Field("scale", "scale", start=1.0, low=0.0, high=10.0, step=0.1, info=SCALE.info),
            WINDOW,
        ),
    ),
    Method(
        "SkipLayers",
        "Layers: skip-layer guidance (SLG, STG)",
        "Runs the model a second time without the chosen layers, and steers away from what that "
        "predicts. Stability AI publishes it for SD3.5; for videos it is known as STG.",
        "https://arxiv.org/abs/2411.18664",
        "STG, arXiv 2411.18664",
        (
            Field("heads", "layers", "layers", "", info="for example L2, or L7-9"),
            Field("what", "what is left out", "choice", choices=WHAT),
            Field("u", "u, share left out"),
            Field("scale", "scale", start=1.0, low=0.0, high=10.0, step=0.1, info=SCALE.info),
            WINDOW,
        ),
    ),
    Method(
        "NAG",
        "Negative prompts in attention: NAG",
        "Lets every attention that reads text read a negative text too, and extrapolates away from "
        "it, also in models that know no CFG. Here the negative text is empty (zeros); words of "
        "your own need Python.",
        "https://arxiv.org/abs/2505.21179",
        "NAG, arXiv 2505.21179",
        (
            Field("scale", "scale", low=1.0, high=15.0, step=0.5, info="1 asks for nothing"),
            Field("tau", "tau, cap of the norm", low=0.0, high=10.0, step=0.1),
            Field("alpha", "alpha, share blended in"),
            WINDOW,
        ),
    ),
    Method(
        "HeadGate",
        "Gain of heads: HeadGate",
        "Multiplies the output of the chosen heads in place: 0 silences them, 1 leaves them. It "
        "costs no second run of the model and shows at once what a head does.",
        "https://arxiv.org/abs/1905.10650",
        "after Michel et al., arXiv 1905.10650",
        (
            Field("heads", "heads", "heads", "", info="for example L3H2"),
            Field("gain", "gain", start=0.0, low=0.0, high=2.0),
            WINDOW,
        ),
    ),
)  # fmt: skip


def layout(ui: Any) -> None:
    """The tab's sections, and nothing else."""
    from attn_control.studio.layout import section

    for method in METHODS:
        section(ui, method)
