"""Runs to begin with: a click fills the page. Each is of a built-in model."""

from __future__ import annotations

from dataclasses import dataclass

from attn_control.studio.form import ControlOptions

TWO = "a red square left of a blue circle on a white background"
RING = "a green triangle above a yellow ring on a black background"


@dataclass(frozen=True)
class Example:
    """A label, and what it sets; the sampler's fields are the model's own."""

    label: str
    model: str
    prompt: str
    controls: tuple[ControlOptions, ...]
    cfg: float | None = None
    reference: tuple[str, int] | None = None  # texture and seed of a drawn picture


EXAMPLES = (
    Example(
        "four heads instead of CFG",
        "shapes-sd3",
        TWO,
        (("SoftPAG", {"heads": "L3H2, L0H0-1, L5H3", "scale": 1.0}),),
        cfg=1.0,
    ),
    Example(
        "PAG on layer 0", "shapes-sd3", RING, (("SoftPAG", {"heads": "L0", "scale": 1.0}),), 1.0
    ),
    Example("skip layer 2", "shapes-sd3", TWO, (("SkipLayers", {"heads": "L2", "scale": 1.0}),)),
    Example(
        "NAG and SoftPAG together",
        "shapes-sd3",
        RING,
        (("SoftPAG", {"heads": "L3H2", "scale": 1.0}), ("NAG", {"scale": 3.0})),
    ),
    Example("silence a head", "shapes-sd3", TWO, (("HeadGate", {"heads": "L0H0"}),)),
    Example(
        "the texture of a picture",
        "shapes-flux",
        "a purple circle with the texture of the reference on a black background",
        (("SoftPAG", {"heads": "L0", "scale": 1.0}),),
        reference=("checked", 1),
    ),
    Example(
        "a video from half of the pairs",
        "shapes-wan",
        "a yellow triangle moves right on a white background",
        (("NeighborhoodAttention", {"target_density": 0.5}),),
    ),
)
