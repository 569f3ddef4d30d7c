"""Tiny models of families whose token order is not known to us, or whose processors make several
softmaxes a call.
"""

from __future__ import annotations

import torch
from tiny_wide import TEXT, Tiny, make, rand, time

_TEXT = {"encoder_hidden_states": rand(2, TEXT, 32, seed=1)}
_VIDEO = {"hidden_states": rand(2, 4, 3, 4, 4), "timestep": time()}
_SMALL = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "num_layers": 2}

ATTACH_ONLY = {
    "latte": Tiny(
        make(
            "LatteTransformer3DModel",
            **_SMALL,
            attention_head_dim=16,
            cross_attention_dim=32,
            sample_size=4,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=32,
            video_length=3,
        ),
        lambda: _VIDEO | _TEXT,
        (("L1", "transformer_blocks.1.attn1"), ("L2", "temporal_transformer_blocks.0.attn1")),
    ),
    "framepack": Tiny(
        make(
            "HunyuanVideoFramepackTransformer3DModel",
            **_SMALL,
            attention_head_dim=16,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            text_embed_dim=32,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 4, 8),
            has_image_proj=True,
            image_proj_dim=16,
            has_clean_x_embedder=True,
        ),
        lambda: (
            _VIDEO
            | _TEXT
            | {
                "encoder_attention_mask": torch.ones(2, TEXT, dtype=torch.bool),
                "pooled_projections": rand(2, 16, seed=2),
                "guidance": time(1000.0),
                "image_embeds": rand(2, 3, 16, seed=3),
                "indices_latents": torch.arange(3),
                "latents_clean": rand(2, 4, 2, 4, 4, seed=4),
                "indices_latents_clean": torch.arange(2),
                "latents_history_2x": rand(2, 4, 2, 4, 4, seed=5),
                "indices_latents_history_2x": torch.arange(2),
                "latents_history_4x": rand(2, 4, 4, 8, 8, seed=6),
                "indices_latents_history_4x": torch.arange(4),
            }
        ),
        (("L1", "transformer_blocks.1.attn"), ("L2", "single_transformer_blocks.0.attn")),
    ),
    "helios": Tiny(
        make(
            "HeliosTransformer3DModel",
            **_SMALL,
            attention_head_dim=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            rope_dim=(4, 4, 8),
        ),
        lambda: _VIDEO | _TEXT,
        (("L1", "blocks.1.attn1"),),
    ),
}

QWEN = Tiny(
    make(
        "QwenImage21Transformer2DModel",
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=32,
        axes_dims_rope=(4, 4, 8),
    ),
    lambda: {
        "hidden_states": rand(2, 16, 16),
        "encoder_hidden_states": rand(2, 5, 32, seed=1),
        "timestep": torch.full((2,), 0.5),
        "img_shapes": [[(1, 4, 4)]] * 2,
        "img_mask": torch.tensor([[False] * 5 + [True] * 4] * 2),
    },
    (),
)

MOCHI = Tiny(
    make(
        "MochiTransformer3DModel",
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=TEXT,
    ),
    lambda: (
        _VIDEO
        | _TEXT
        | {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()}
    ),
    (("L0", "transformer_blocks.0.attn1"),),
)

SEVERAL = {"mochi": MOCHI, "qwen21": QWEN}
