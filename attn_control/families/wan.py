"""Wan and what was built on it: a video attends to itself, then to text and an embedded picture."""

from __future__ import annotations

from dataclasses import replace

from attn_control import layouts
from attn_control.call import Site
from attn_control.families.family import Family


def _parts(site: Site) -> tuple[str, ...]:
    image = site.slot == "cross" and getattr(site.module, "add_k_proj", None) is not None
    return ("image", "main") if image else ("main",)


WAN_ROWS = frozenset(
    {"hidden_states", "encoder_hidden_states", "encoder_hidden_states_image", "timestep"}
)

_WAN = Family(
    name="Wan 2.1, 2.2",
    denoiser="WanTransformer3DModel",
    blocks=("blocks.#",),
    slots={"attn1": "self", "attn2": "cross"},
    layout=layouts.wan_video_and_text,
    cfg="split",
    block_returns=("hidden_states",),
    parts=_parts,
    row_fields=WAN_ROWS,
)

WAN: tuple[Family, ...] = (
    _WAN,
    replace(
        _WAN,
        name="Wan VACE",
        denoiser="WanVACETransformer3DModel",
        # Those that make hints run first, but Wan's own blocks keep their numbers.
        blocks=("blocks.#", "vace_blocks.#"),
        block_returns={"blocks.#": ("hidden_states",)},
        row_fields=WAN_ROWS | {"control_hidden_states"},
        shared_fields=frozenset({"control_hidden_states_scale"}),
    ),
    replace(
        _WAN,
        name="SkyReels-V2",
        denoiser="SkyReelsV2Transformer3DModel",
        row_fields=WAN_ROWS | {"fps"},
    ),
    replace(_WAN, name="ChronoEdit", denoiser="ChronoEditTransformer3DModel"),
)

ANIMATE = replace(
    _WAN,
    name="Wan Animate",
    denoiser="WanAnimateTransformer3DModel",
    layout=layouts.reference_video_and_text,
    row_fields=WAN_ROWS | {"pose_hidden_states", "face_pixel_values"},
)
