"""Models of videos, as data: facts read off diffusers 0.42.1."""

from __future__ import annotations

from attn_control import layouts
from attn_control.call import Site
from attn_control.families.family import Family


def _wan_parts(site: Site) -> tuple[str, ...]:
    image = site.slot == "cross" and getattr(site.module, "add_k_proj", None) is not None
    return ("image", "main") if image else ("main",)


_FLUX_ROWS = frozenset(
    {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"}
)
_FLUX_BLOCKS = ("transformer_blocks.#", "single_transformer_blocks.#")
_TWO = {"attn1": "self", "attn2": "cross"}
_WAN_ROWS = frozenset(
    {"hidden_states", "encoder_hidden_states", "encoder_hidden_states_image", "timestep"}
)

VIDEOS: tuple[Family, ...] = (
    Family(
        name="Wan 2.1, 2.2",
        denoiser="WanTransformer3DModel",
        blocks=("blocks.#",),
        slots=_TWO,
        layout=layouts.video_and_text,
        cfg="split",
        block_returns=("hidden_states",),
        feed_forward=("ffn",),
        parts=_wan_parts,
        row_fields=_WAN_ROWS,
    ),
    Family(
        name="Wan VACE",
        denoiser="WanVACETransformer3DModel",
        blocks=("blocks.#", "vace_blocks.#"),
        slots=_TWO,
        layout=layouts.video_and_text,
        cfg="split",
        parts=_wan_parts,
        row_fields=_WAN_ROWS | {"control_hidden_states"},
        shared_fields=frozenset({"control_hidden_states_scale"}),
    ),
    Family(
        name="SkyReels-V2",
        denoiser="SkyReelsV2Transformer3DModel",
        blocks=("blocks.#",),
        slots=_TWO,
        layout=layouts.video_and_text,
        cfg="split",
        parts=_wan_parts,
        row_fields=_WAN_ROWS | {"fps"},
    ),
    Family(
        name="ChronoEdit",
        denoiser="ChronoEditTransformer3DModel",
        blocks=("blocks.#",),
        slots=_TWO,
        layout=layouts.video_and_text,
        cfg="split",
        parts=_wan_parts,
        row_fields=_WAN_ROWS,
    ),
    Family(
        name="HunyuanVideo",
        denoiser="HunyuanVideoTransformer3DModel",
        blocks=_FLUX_BLOCKS,
        slots={"attn": "joint"},
        layout=layouts.video_then_text,
        cfg="split",
        row_fields=_FLUX_ROWS | {"encoder_attention_mask"},
    ),
    Family(
        name="LTX-Video",
        denoiser="LTXVideoTransformer3DModel",
        blocks=("transformer_blocks.#",),
        slots=_TWO,
        layout=layouts.packed_video_and_text,
        by_value=frozenset({"num_frames", "height", "width"}),
        cfg="batched",
        row_fields=frozenset(
            {
                "hidden_states",
                "encoder_hidden_states",
                "timestep",
                "encoder_attention_mask",
                "video_coords",
            }
        ),
    ),
)
