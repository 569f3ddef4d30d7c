"""Models of pictures, as data: facts read off diffusers 0.42.1."""

from __future__ import annotations

from attn_control import layouts
from attn_control.families.family import Family

_FLUX_ROWS = frozenset(
    {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"}
)
_FLUX_BLOCKS = ("transformer_blocks.#", "single_transformer_blocks.#")
_TWO = {"attn1": "self", "attn2": "cross"}
_IDS = frozenset({"img_ids", "txt_ids"})
_BY_IDS = frozenset({"img_ids"})
_JOINT = ("encoder_hidden_states", "hidden_states")

PICTURES: tuple[Family, ...] = (
    Family(
        name="SD 1.5, SDXL",
        denoiser="UNet2DConditionModel",
        blocks=(
            "down_blocks.#.attentions.#.transformer_blocks.#",
            "mid_block.attentions.#.transformer_blocks.#",
            "up_blocks.#.attentions.#.transformer_blocks.#",
        ),
        slots=_TWO,
        layout=layouts.unet,
        cfg="batched",
        block_returns=("hidden_states",),
        sample="sample",
        row_fields=frozenset(
            {
                "sample",
                "timestep",
                "encoder_hidden_states",
                "encoder_attention_mask",
                "timestep_cond",
                "added_cond_kwargs",
                "down_block_additional_residuals",
                "mid_block_additional_residual",
            }
        ),
    ),
    Family(
        name="SD3, SD3.5",
        denoiser="SD3Transformer2DModel",
        blocks=("transformer_blocks.#",),
        slots={"attn": "joint", "attn2": "self2"},
        layout=layouts.image_then_text,
        cfg="batched",
        block_returns=_JOINT,
        row_fields=frozenset(
            {
                "hidden_states",
                "encoder_hidden_states",
                "pooled_projections",
                "timestep",
                "block_controlnet_hidden_states",
            }
        ),
    ),
    Family(
        name="FLUX.1",
        denoiser="FluxTransformer2DModel",
        blocks=_FLUX_BLOCKS,
        slots={"attn": "joint"},
        layout=layouts.text_then_packed,
        by_value=_BY_IDS,
        cfg="split",
        block_returns=_JOINT,
        feed_forward=("ff", "ff_context", "act_mlp"),
        timestep_scale=1e-3,
        row_fields=_FLUX_ROWS,
        shared_fields=_IDS,
    ),
    Family(
        name="FLUX.2",
        denoiser="Flux2Transformer2DModel",
        blocks=_FLUX_BLOCKS,
        slots={"attn": "joint"},
        layout=layouts.text_then_packed,
        by_value=_BY_IDS,
        cfg="split",
        sigmas=lambda steps: [1 - n / steps for n in range(steps)],
        timestep_scale=1e-3,
        row_fields=_FLUX_ROWS | _IDS,
    ),
    Family(
        name="Chroma",
        denoiser="ChromaTransformer2DModel",
        blocks=_FLUX_BLOCKS,
        slots={"attn": "joint"},
        layout=layouts.text_then_packed,
        by_value=_BY_IDS,
        cfg="split",
        timestep_scale=1e-3,
        row_fields=_FLUX_ROWS | {"attention_mask"},
        shared_fields=_IDS,
    ),
    Family(
        name="Ovis-Image",
        denoiser="OvisImageTransformer2DModel",
        blocks=_FLUX_BLOCKS,
        slots={"attn": "joint"},
        layout=layouts.text_then_packed,
        by_value=_BY_IDS,
        cfg="split",
        timestep_scale=1e-3,
        row_fields=_FLUX_ROWS,
        shared_fields=_IDS,
    ),
    Family(
        name="LongCat-Image",
        denoiser="LongCatImageTransformer2DModel",
        blocks=_FLUX_BLOCKS,
        slots={"attn": "joint"},
        layout=layouts.text_then_packed,
        by_value=_BY_IDS,
        cfg="split",
        timestep_scale=1e-3,
        row_fields=_FLUX_ROWS,
        shared_fields=_IDS,
    ),
    Family(
        name="Qwen-Image, Qwen-Image-Edit",
        denoiser="QwenImageTransformer2DModel",
        blocks=("transformer_blocks.#",),
        slots={"attn": "joint"},
        layout=layouts.text_then_shapes,
        by_value=frozenset({"img_shapes"}),
        cfg="split",
        timestep_scale=1e-3,
        row_fields=_FLUX_ROWS | {"encoder_hidden_states_mask", "additional_t_cond"},
    ),
    Family(
        name="CogView4",
        denoiser="CogView4Transformer2DModel",
        blocks=("transformer_blocks.#",),
        slots={"attn1": "joint"},
        layout=layouts.text_then_image,
        cfg="split",
        row_fields=frozenset(
            {
                "hidden_states",
                "encoder_hidden_states",
                "timestep",
                "original_size",
                "target_size",
                "crop_coords",
                "attention_mask",
            }
        ),
    ),
)
