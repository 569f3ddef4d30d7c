"""Tiny models of further picture families."""

from __future__ import annotations

import torch
from tiny_wide import TEXT, Tiny, ids, make, rand, time

_PICTURE = {"hidden_states": rand(2, 4, 8, 8), "timestep": time()}
_TEXT = {"encoder_hidden_states": rand(2, TEXT, 32, seed=1)}
_MASK = {"encoder_attention_mask": torch.ones(2, TEXT, dtype=torch.bool)}
_SMALL = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "num_layers": 2,
}
_DOUBLE = (("L1", "transformer_blocks.1.attn"), ("L2", "single_transformer_blocks.0.attn"))
_SELF = (("L1", "transformer_blocks.1.attn1"),)

PICTURES = {
    "auraflow": Tiny(
        make(
            "AuraFlowTransformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        ),
        lambda: _PICTURE | _TEXT | {"timestep": time(0.5)},
        (("L1", "joint_transformer_blocks.1.attn"), ("L2", "single_transformer_blocks.0.attn")),
    ),
    "pixart": Tiny(
        make(
            "PixArtTransformer2DModel",
            **_SMALL,
            attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=8,
            use_additional_conditions=False,
        ),
        lambda: _PICTURE | _TEXT | {"encoder_attention_mask": torch.ones(2, TEXT)},
        _SELF,
    ),
    "sana": Tiny(
        make(
            "SanaTransformer2DModel",
            **_SMALL | {"patch_size": 1},
            attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=4,
        ),
        lambda: _TEXT | {"hidden_states": rand(2, 4, 4, 4), "timestep": time()},
        (("L0.cross", "transformer_blocks.0.attn2"), ("L1.cross", "transformer_blocks.1.attn2")),
        patch=(1, 1, 1),
    ),
    "lumina2": Tiny(
        make(
            "Lumina2Transformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 4, 8),
            axes_lens=(32, 32, 32),
            cap_feat_dim=32,
        ),
        lambda: _PICTURE | _TEXT | _MASK | {"timestep": time(0.5)},
        (("L1", "layers.1.attn"),),
        quiet=r".*_refiner",
    ),
    "hunyuanimage": Tiny(
        make(
            "HunyuanImageTransformer2DModel",
            **_SMALL | {"patch_size": (2, 2)},
            attention_head_dim=16,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=32,
            text_embed_2_dim=24,
            rope_axes_dim=(8, 8),
        ),
        lambda: (
            _PICTURE
            | _TEXT
            | _MASK
            | {
                "encoder_hidden_states_2": rand(2, 3, 24, seed=3),
                "encoder_attention_mask_2": torch.ones(2, 3, dtype=torch.bool),
            }
        ),
        _DOUBLE,
        texts=(("encoder_hidden_states_2", 0), ("encoder_hidden_states", 3)),
        mixes=True,
    ),
    "bria": Tiny(
        make(
            "BriaTransformer2DModel",
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=[4, 4, 8],
        ),
        lambda: (
            _TEXT
            | {
                "hidden_states": rand(2, 16, 16),
                "timestep": time(),
                "img_ids": ids(4, 4),
                "txt_ids": torch.zeros(TEXT, 3),
            }
        ),
        _DOUBLE,
        dims=(),
    ),
    "cogview3plus": Tiny(
        make(
            "CogView3PlusTransformer2DModel",
            **_SMALL,
            attention_head_dim=16,
            text_embed_dim=32,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        lambda: (
            _PICTURE
            | _TEXT
            | {
                "original_size": torch.full((2, 2), 8.0),
                "target_size": torch.full((2, 2), 8.0),
                "crop_coords": torch.zeros(2, 2),
            }
        ),
        _SELF,
    ),
    "krea2": Tiny(
        make(
            "Krea2Transformer2DModel",
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=32,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda: (
            _MASK
            | {
                "hidden_states": rand(2, 16, 16),
                "encoder_hidden_states": rand(2, TEXT, 2, 32, seed=1),
                "timestep": time(0.5),
                "position_ids": torch.cat([torch.zeros(TEXT, 3), ids(4, 4)]),
            }
        ),
        (("L1", "transformer_blocks.1.attn"),),
        dims=(),
        quiet="text_fusion.*refiner",
    ),
    "hunyuandit": Tiny(
        make(
            "HunyuanDiT2DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=32,
            num_layers=2,
            cross_attention_dim=32,
            cross_attention_dim_t5=24,
            pooled_projection_dim=16,
            text_len=TEXT,
            text_len_t5=3,
            use_style_cond_and_image_meta_size=False,
        ),
        lambda: (
            _PICTURE
            | _TEXT
            | {
                "text_embedding_mask": torch.ones(2, TEXT),
                "encoder_hidden_states_t5": rand(2, 3, 24, seed=3),
                "text_embedding_mask_t5": torch.ones(2, 3),
                "image_rotary_emb": (torch.ones(16, 16), torch.zeros(16, 16)),
            }
        ),
        (("L1", "blocks.1.attn1"),),
        texts=(("encoder_hidden_states", 0), ("encoder_hidden_states_t5", TEXT)),
    ),
    "prx": Tiny(
        make(
            "PRXTransformer2DModel",
            in_channels=4,
            patch_size=2,
            context_in_dim=32,
            hidden_size=32,
            num_heads=2,
            depth=2,
            axes_dim=[8, 8],
        ),
        lambda: _PICTURE | _TEXT | {"timestep": time(0.5), "attention_mask": torch.ones(2, TEXT)},
        (("L1", "blocks.1.attention"),),
    ),
    "ernie": Tiny(
        make(
            "ErnieImageTransformer2DModel",
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            text_in_dim=32,
            rope_axes_dim=(4, 4, 8),
        ),
        lambda: (
            _PICTURE
            | {"text_bth": rand(2, TEXT, 32, seed=1), "text_lens": torch.tensor([TEXT, TEXT])}
        ),
        (("L1", "layers.1.self_attention"),),
        texts=(("text_bth", 0),),
    ),
    "glm": Tiny(
        make(
            "GlmImageTransformer2DModel",
            **_SMALL,
            attention_head_dim=16,
            text_embed_dim=32,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=16,
        ),
        lambda: (
            _PICTURE
            | _TEXT
            | {
                "prior_token_id": torch.arange(16).repeat(2, 1),
                "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
                "target_size": torch.full((2, 2), 8.0),
                "crop_coords": torch.zeros(2, 2),
            }
        ),
        _SELF,
    ),
    "flux3": Tiny(
        make(
            "Flux3Transformer2DModel",
            in_channels=16,
            cond_in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            timestep_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        lambda: (
            _TEXT
            | {
                "hidden_states": rand(2, 16, 16),
                "timestep": time(0.5),
                "img_ids": ids(4, 4, 4),
                "txt_ids": torch.zeros(TEXT, 4),
            }
        ),
        (("L1", "mode_blocks.image.1.attn"), ("L2", "single_transformer_blocks.0.attn")),
        dims=(),
        quiet=".*mode_blocks",
        first=(0, 2),
    ),
    "hidream": Tiny(
        make(
            "HiDreamImageTransformer2DModel",
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[24, 32],
            text_emb_dim=16,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(8, 8),
            llama_layers=[0, 1],
            force_inference_output=True,
        ),
        lambda: {
            "hidden_states": rand(2, 4, 8, 8),
            "timesteps": time(),
            "encoder_hidden_states_t5": rand(2, 3, 24, seed=1),
            "encoder_hidden_states_llama3": rand(2, 2, TEXT, 32, seed=2),
            "pooled_embeds": rand(2, 16, seed=3),
        },
        (
            ("L0", "double_stream_blocks.0.block.attn1"),
            ("L1", "single_stream_blocks.0.block.attn1"),
        ),
        texts=(("encoder_hidden_states_t5", 0),),
    ),
}
