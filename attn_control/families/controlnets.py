"""ControlNets, as data: models that stand beside a denoiser and hand it residuals."""

from __future__ import annotations

from attn_control import layouts
from attn_control.families.family import Family

CONTROLNETS: tuple[Family, ...] = (
    Family(
        name="ControlNet of SD 1.5 and SDXL",
        denoiser="ControlNetModel",
        blocks=(
            "down_blocks.#.attentions.#.transformer_blocks.#",
            "mid_block.attentions.#.transformer_blocks.#",
        ),
        slots={"attn1": "self", "attn2": "cross"},
        layout=layouts.unet,
        cfg="batched",
        sample="sample",
    ),
    Family(
        name="ControlNet of SD3",
        denoiser="SD3ControlNetModel",
        blocks=("transformer_blocks.#",),
        slots={"attn": "joint"},
        layout=layouts.image_then_text,
        cfg="batched",
    ),
    Family(
        name="ControlNet of FLUX.1",
        denoiser="FluxControlNetModel",
        blocks=("transformer_blocks.#", "single_transformer_blocks.#"),
        slots={"attn": "joint"},
        layout=layouts.text_then_packed,
        by_value=frozenset({"img_ids"}),
        cfg="split",
        timestep_scale=1e-3,
    ),
)
