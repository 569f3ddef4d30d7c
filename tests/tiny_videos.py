"""Tiny models of further video families; videos are 3 x 2 x 2 tokens."""

from __future__ import annotations

from typing import Any

import torch
from tiny_wide import TEXT, Tiny, make, rand, time

_VIDEO = {"hidden_states": rand(2, 4, 3, 4, 4), "timestep": time()}
_TEXT = {"encoder_hidden_states": rand(2, TEXT, 32, seed=1)}
_MASK = {"encoder_attention_mask": torch.ones(2, TEXT, dtype=torch.bool)}
_SMALL = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "num_layers": 2}
_GRID: dict[str, Any] = {"dims": (2, 3, 4), "grid": (3, 2, 2)}
_SELF = (("L1", "transformer_blocks.1.attn1"),)
_COG = _SMALL | {
    "attention_head_dim": 16,
    "time_embed_dim": 16,
    "text_embed_dim": 32,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": TEXT,
    "use_rotary_positional_embeddings": True,
}
_ROPE = {"image_rotary_emb": (torch.ones(12, 16), torch.zeros(12, 16))}

VIDEOS = {
    "cogvideox": Tiny(
        make("CogVideoXTransformer3DModel", **_COG),
        lambda: _TEXT | _ROPE | {"hidden_states": rand(2, 3, 4, 4, 4), "timestep": time()},
        _SELF,
        dims=(1, 3, 4),
        grid=(3, 2, 2),
    ),
    "cogvideox1.5": Tiny(
        make("CogVideoXTransformer3DModel", **_COG, patch_size_t=2, patch_bias=False),
        lambda: (
            _TEXT
            | {
                "hidden_states": rand(2, 4, 4, 4, 4),
                "timestep": time(),
                "image_rotary_emb": (torch.ones(8, 16), torch.zeros(8, 16)),
            }
        ),
        _SELF,
        patch=(2, 2, 2),
        dims=(1, 3, 4),
        grid=(2, 2, 2),
    ),
    "consisid": Tiny(
        make("ConsisIDTransformer3DModel", **_COG),
        lambda: _TEXT | _ROPE | {"hidden_states": rand(2, 3, 4, 4, 4), "timestep": time()},
        _SELF,
        dims=(1, 3, 4),
        grid=(3, 2, 2),
    ),
    "hunyuanvideo15": Tiny(
        make(
            "HunyuanVideo15Transformer3DModel",
            **_SMALL,
            attention_head_dim=16,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            text_embed_dim=32,
            text_embed_2_dim=24,
            image_embed_dim=16,
            rope_axes_dim=(4, 4, 8),
        ),
        lambda: (
            _VIDEO
            | _TEXT
            | _MASK
            | {
                "encoder_hidden_states_2": rand(2, 3, 24, seed=3),
                "encoder_attention_mask_2": torch.ones(2, 3, dtype=torch.bool),
                "image_embeds": rand(2, 4, 16, seed=4),
            }
        ),
        (("L1", "transformer_blocks.1.attn"),),
        texts=(("encoder_hidden_states_2", 0), ("encoder_hidden_states", 3)),
        mixes=True,
        **_GRID,
    ),
    "kandinsky5": Tiny(
        make(
            "Kandinsky5Transformer3DModel",
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=32,
            in_text_dim2=16,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 4, 8),
        ),
        lambda: (
            _TEXT
            | {
                "hidden_states": rand(2, 3, 4, 4, 4),
                "timestep": time(),
                "pooled_projections": rand(2, 16, seed=2),
                "visual_rope_pos": [torch.arange(3), torch.arange(2), torch.arange(2)],
                "text_rope_pos": torch.arange(TEXT),
            }
        ),
        (
            ("L1", "visual_transformer_blocks.1.self_attention"),
            ("L0.cross", "visual_transformer_blocks.0.cross_attention"),
        ),
        mixes=True,
        dims=(1, 2, 3),
        grid=(3, 2, 2),
    ),
    "cosmos": Tiny(
        make(
            "CosmosTransformer3DModel",
            **_SMALL,
            attention_head_dim=16,
            text_embed_dim=32,
            adaln_lora_dim=4,
            max_size=(4, 16, 16),
            patch_size=(1, 2, 2),
            concat_padding_mask=False,  # which would need torchvision
        ),
        lambda: _VIDEO | _TEXT | {"fps": 24},
        _SELF,
        **_GRID,
    ),
    "allegro": Tiny(
        make(
            "AllegroTransformer3DModel",
            **_SMALL,
            attention_head_dim=16,
            cross_attention_dim=32,
            sample_height=4,
            sample_width=4,
            sample_frames=3,
            caption_channels=32,
        ),
        lambda: _VIDEO | _TEXT | {"encoder_attention_mask": torch.ones(2, TEXT)},
        _SELF,
        **_GRID,
    ),
    "motif": Tiny(
        make(
            "MotifVideoTransformer3DModel",
            **_SMALL,
            attention_head_dim=16,
            num_single_layers=2,
            text_embed_dim=32,
            image_embed_dim=16,
            rope_axes_dim=(4, 4, 8),
        ),
        lambda: _VIDEO | _TEXT | _MASK | {"image_embeds": rand(2, 4, 16, seed=4)},
        (("L1", "transformer_blocks.1.attn"), ("L2", "single_transformer_blocks.0.attn")),
        **_GRID,
    ),
    "wan_animate": Tiny(
        make(
            "WanAnimateTransformer3DModel",
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=12,
            latent_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            image_dim=16,
            added_kv_proj_dim=24,
            rope_max_seq_len=32,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        lambda: (
            {
                # The processor takes the last 512 keys for the text, whatever comes in.
                "encoder_hidden_states": rand(2, 512, 32, seed=1),
                "hidden_states": rand(2, 12, 3, 4, 4),
                "timestep": time(),
                "encoder_hidden_states_image": rand(2, 3, 16, seed=2),
                "pose_hidden_states": rand(2, 4, 2, 4, 4, seed=3),
                "face_pixel_values": rand(2, 3, 5, 16, 16, seed=4),
            }
        ),
        (("L1", "blocks.1.attn1"),),
        dims=(2, 3, 4),
        grid=(2, 2, 2),
        before=1,
    ),
    "ltx2": Tiny(
        make(
            "LTX2VideoTransformer3DModel",
            **_SMALL,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            caption_channels=32,
        ),
        lambda: (
            _TEXT
            | {
                "hidden_states": rand(2, 12, 4),
                "audio_hidden_states": rand(2, 6, 4, seed=2),
                "audio_encoder_hidden_states": rand(2, TEXT, 32, seed=3),
                "timestep": time(),
                "encoder_attention_mask": torch.ones(2, TEXT),
                "audio_encoder_attention_mask": torch.ones(2, TEXT),
                "num_frames": 3,
                "height": 2,
                "width": 2,
                "audio_num_frames": 6,
            }
        ),
        _SELF,
        dims=(),
        grid=(3, 2, 2),
    ),
    "sana_video": Tiny(
        make(
            "SanaVideoTransformer3DModel",
            **_SMALL,
            attention_head_dim=12,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=32,
            sample_size=4,
        ),
        lambda: _VIDEO | _TEXT | {"encoder_attention_mask": torch.ones(2, TEXT)},
        (("L1.cross", "transformer_blocks.1.attn2"),),
        **_GRID,
    ),
    "anyflow": Tiny(
        make(
            "AnyFlowTransformer3DModel",
            **_SMALL,
            attention_head_dim=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            image_dim=16,
            rope_max_seq_len=32,
        ),
        lambda: (
            _TEXT
            | {
                "hidden_states": rand(2, 3, 4, 4, 4),
                "timestep": time().repeat(3, 1).T,
                "r_timestep": time(400.0).repeat(3, 1).T,
                "encoder_hidden_states_image": rand(2, 4, 16, seed=4),
            }
        ),
        (("L1", "blocks.1.attn1"), ("L0.cross", "blocks.0.attn2")),
        dims=(1, 3, 4),
        grid=(3, 2, 2),
    ),
}
