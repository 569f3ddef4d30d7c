"""Models of videos, as data: facts read off diffusers 0.42.1."""

from __future__ import annotations

from attn_control import layouts
from attn_control.families.family import EVERY, Family, evenly
from attn_control.families.flux import BLOCKS, ROWS
from attn_control.families.wan import ANIMATE, WAN, WAN_ROWS

_TWO = {"attn1": "self", "attn2": "cross"}
_ONE = ("hidden_states",)
_AFTER = ("hidden_states", "encoder_hidden_states")


VIDEOS: tuple[Family, ...] = (
    *WAN,
    Family(
        name="HunyuanVideo",
        denoiser="HunyuanVideoTransformer3DModel",
        blocks=BLOCKS,
        slots={"attn": "joint"},
        layout=layouts.video_then_text,
        cfg="split",
        block_returns=_AFTER,
        sigmas=evenly,
        row_fields=ROWS | {"encoder_attention_mask"},
    ),
    Family(
        name="LTX-Video",
        denoiser="LTXVideoTransformer3DModel",
        blocks=("transformer_blocks.#",),
        slots=_TWO,
        layout=layouts.packed_video_and_text,
        by_value=frozenset({"num_frames", "height", "width"}),
        cfg="batched",
        block_returns=_ONE,
        sigmas=evenly,
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
    Family(
        name="LTX-2",
        denoiser="LTX2VideoTransformer3DModel",
        blocks=("transformer_blocks.#",),
        slots=_TWO,  # of the video; audio, and what passes between the two, is left alone
        layout=layouts.packed_video_and_text,
        by_value=frozenset({"num_frames", "height", "width"}),
        cfg="batched",
        block_returns=("hidden_states", "audio_hidden_states"),
        sigmas=evenly,
        row_fields=frozenset(
            {
                "hidden_states",
                "audio_hidden_states",
                "encoder_hidden_states",
                "audio_encoder_hidden_states",
                "timestep",
                "audio_timestep",
                "sigma",
                "audio_sigma",
                "encoder_attention_mask",
                "audio_encoder_attention_mask",
                "video_coords",
                "audio_coords",
            }
        ),
    ),
    Family(
        name="CogVideoX",
        denoiser="CogVideoXTransformer3DModel",
        blocks=("transformer_blocks.#",),
        slots={"attn1": "joint"},
        layout=layouts.text_then_frames,
        cfg="batched",
        block_returns=_AFTER,
        row_fields=ROWS | {"timestep_cond"},
        shared_fields=frozenset({"image_rotary_emb", "ofs"}),
    ),
    Family(
        name="ConsisID",
        denoiser="ConsisIDTransformer3DModel",
        blocks=("transformer_blocks.#",),
        slots={"attn1": "joint"},
        layout=layouts.text_then_frames,
        cfg="batched",
        block_returns=_AFTER,
        row_fields=ROWS | {"timestep_cond"},
        shared_fields=frozenset({"image_rotary_emb"}),
    ),
    Family(
        name="HunyuanVideo 1.5",
        denoiser="HunyuanVideo15Transformer3DModel",
        blocks=("transformer_blocks.#",),
        slots={"attn": "joint"},
        layout=layouts.video_then_mixed_text,
        by_value=frozenset({"image_embeds"}),
        cfg="split",
        block_returns=_AFTER,
        sigmas=evenly,
        row_fields=ROWS
        | {
            "timestep_r",
            "encoder_attention_mask",
            "encoder_hidden_states_2",
            "encoder_attention_mask_2",
            "image_embeds",
        },
    ),
    Family(
        name="Kandinsky 5",
        denoiser="Kandinsky5Transformer3DModel",
        blocks=("visual_transformer_blocks.#",),
        slots={"self_attention": "self", "cross_attention": "cross"},
        layout=layouts.channels_last_video_and_text,
        by_value=frozenset({"sparse_params"}),
        cfg="split",
        block_returns=("visual_embed",),
        row_fields=ROWS,
        shared_fields=frozenset({"visual_rope_pos", "text_rope_pos", "sparse_params"}),
    ),
    ANIMATE,
    Family(
        name="Cosmos 1, 2, 2.5",
        denoiser="CosmosTransformer3DModel",
        blocks=("transformer_blocks.#",),
        slots=_TWO,
        layout=layouts.video_and_text,
        cfg="split",
        block_returns=_ONE,
        timestep_scale=None,
        row_fields=ROWS | {"condition_mask", "attention_mask"},
        shared_fields=frozenset({"padding_mask"}),
    ),
    Family(
        name="Allegro",
        denoiser="AllegroTransformer3DModel",
        blocks=("transformer_blocks.#",),
        slots=_TWO,
        layout=layouts.video_and_nested_text,
        cfg="batched",
        block_returns=_ONE,
        row_fields=ROWS | {"attention_mask", "encoder_attention_mask"},
        shared_fields=frozenset({"image_rotary_emb"}),
    ),
    Family(
        name="Motif-Video",
        denoiser="MotifVideoTransformer3DModel",
        blocks=BLOCKS,
        slots={"attn": "joint", "cross_attn": "cross"},
        layout=layouts.video_then_text_or_itself,
        cfg="split",
        block_returns=_AFTER,
        row_fields=ROWS | {"encoder_attention_mask", "image_embeds"},
    ),
    Family(
        name="HunyuanVideo FramePack",
        denoiser="HunyuanVideoFramepackTransformer3DModel",
        blocks=BLOCKS,
        slots={"attn": "joint"},
        layout=None,  # histories of three resolutions stand before the video
        cfg="split",
        block_returns=_AFTER,
        row_fields=ROWS
        | {
            "encoder_attention_mask",
            "image_embeds",
            "latents_clean",
            "latents_history_2x",
            "latents_history_4x",
        },
        shared_fields=frozenset(
            {
                "indices_latents",
                "indices_latents_clean",
                "indices_latents_history_2x",
                "indices_latents_history_4x",
            }
        ),
    ),
    Family(
        name="Helios",
        denoiser="HeliosTransformer3DModel",
        blocks=("blocks.#",),
        slots=_TWO,
        layout=None,  # histories of three resolutions stand before the video
        cfg="split",
        block_returns=_ONE,
        row_fields=ROWS,
    ),
    Family(
        name="Latte",
        denoiser="LatteTransformer3DModel",
        blocks=("transformer_blocks.#", "temporal_transformer_blocks.#"),
        slots=_TWO,
        layout=None,  # pictures one by one, then the frames of each place
        cfg="batched",
        block_returns=_ONE,
        folded=True,
        row_fields=ROWS | {"encoder_attention_mask"},
    ),
    Family(
        name="Mochi",
        denoiser="MochiTransformer3DModel",
        blocks=("transformer_blocks.#",),
        slots={"attn1": "joint"},
        layout=layouts.video_then_valid_text_by_row,
        cfg="batched",
        block_returns=_AFTER,
        feed_forward=("norm4", "norm4_context"),
        attention_ends=("norm2", "norm2_context"),
        by_value=frozenset({"encoder_attention_mask"}),
        parts=lambda site: EVERY,
        row_fields=ROWS | {"encoder_attention_mask"},
    ),
    Family(
        name="Sana-Video",
        denoiser="SanaVideoTransformer3DModel",
        blocks=("transformer_blocks.#",),
        slots={"attn2": "cross"},  # attn1 is linear attention: no softmax to control
        layout=layouts.video_and_text,
        cfg="batched",
        block_returns=_ONE,
        timestep_scale=None,
        row_fields=ROWS | {"encoder_attention_mask"},
    ),
    Family(
        name="AnimateDiff",
        denoiser="UNetMotionModel",
        blocks=(
            "down_blocks.#.attentions.#.transformer_blocks.#",
            "mid_block.attentions.#.transformer_blocks.#",
            "up_blocks.#.attentions.#.transformer_blocks.#",
        ),
        slots=_TWO,
        layout=layouts.unet,  # of each frame on its own; motion modules are left alone
        cfg="batched",
        block_returns=_ONE,
        sample="sample",
        folded=True,
        row_fields=frozenset(
            {"sample", "timestep", "encoder_hidden_states", "added_cond_kwargs", "attention_mask"}
        ),
    ),
    Family(
        name="AnyFlow",
        denoiser="AnyFlowTransformer3DModel",
        blocks=("blocks.#",),
        slots=_TWO,
        layout=layouts.frames_first_video_and_text,
        cfg="batched",
        block_returns=_ONE,
        row_fields=WAN_ROWS | {"r_timestep"},
    ),
)
