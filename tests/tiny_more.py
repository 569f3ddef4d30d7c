"""Tiny models of further families, with the arguments of one call."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny import _spread

TEXT = 5


def _rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ids(height: int, width: int, columns: int = 3, first: float = 0.0) -> torch.Tensor:
    ids = torch.zeros(height, width, columns)
    ids[..., 0] = first
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return ids.reshape(height * width, columns)


def _make(cls: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return _spread(getattr(diffusers, cls)(**config))


_PACKED = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}

MORE = {
    "flux2": lambda: _make(
        "Flux2Transformer2DModel",
        **_PACKED | {"axes_dims_rope": (4, 4, 4, 4)},
        timestep_guidance_channels=16,
    ),
    "chroma": lambda: _make(
        "ChromaTransformer2DModel",
        **_PACKED,
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    ),
    "ovis": lambda: _make("OvisImageTransformer2DModel", **_PACKED, out_channels=16),
    "longcat": lambda: _make("LongCatImageTransformer2DModel", **_PACKED, pooled_projection_dim=32),
    "qwen": lambda: _make(
        "QwenImageTransformer2DModel",
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    ),
    "cogview4": lambda: _make(
        "CogView4Transformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        rope_axes_dim=(16, 16),
        sample_size=8,
    ),
    "vace": lambda: _make(
        "WanVACETransformer3DModel", **_WAN, vace_layers=[0, 1], vace_in_channels=8
    ),
    "skyreels": lambda: _make("SkyReelsV2Transformer3DModel", **_WAN),
    "chronoedit": lambda: _make("ChronoEditTransformer3DModel", **_WAN),
    "hunyuanvideo": lambda: _make(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=32,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 4, 8),
    ),
    "ltx": lambda: _make(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    ),
}


def more_inputs(name: str, batch: int = 2) -> dict[str, Any]:
    """Keyword arguments of one call; pictures are 4 x 4 tokens, videos 3 x 2 x 2."""
    text = _rand(batch, TEXT, 32, seed=1)
    time = torch.full((batch,), 0.5)
    packed = {
        "hidden_states": _rand(batch, 16, 16),
        "encoder_hidden_states": text,
        "timestep": time,
        "img_ids": _ids(4, 4),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    video = {
        "hidden_states": _rand(batch, 4, 3, 4, 4),
        "encoder_hidden_states": _rand(batch, TEXT, 16, seed=1),
        "timestep": torch.full((batch,), 500),
    }
    return {
        "flux2": lambda: (
            packed
            | {
                "img_ids": _ids(4, 4, 4)[None].expand(batch, -1, -1),
                "txt_ids": torch.zeros(batch, TEXT, 4),
                "guidance": torch.ones(batch),
            }
        ),
        "chroma": lambda: packed,
        "ovis": lambda: packed,
        "longcat": lambda: packed,
        "qwen": lambda: {
            "hidden_states": _rand(batch, 16, 16),
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": torch.ones(batch, TEXT, dtype=torch.bool),
            "timestep": time,
            "img_shapes": [[(1, 4, 4)]] * batch,
        },
        "cogview4": lambda: {
            "hidden_states": _rand(batch, 4, 8, 8),
            "encoder_hidden_states": text,
            "timestep": torch.full((batch,), 500.0),
            "original_size": torch.full((batch, 2), 8.0),
            "target_size": torch.full((batch, 2), 8.0),
            "crop_coords": torch.zeros(batch, 2),
        },
        "vace": lambda: video | {"control_hidden_states": _rand(batch, 8, 3, 4, 4, seed=2)},
        "skyreels": lambda: video,
        "chronoedit": lambda: video,
        "hunyuanvideo": lambda: {
            "hidden_states": _rand(batch, 4, 3, 4, 4),
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.bool),
            "pooled_projections": _rand(batch, 16, seed=2),
            "guidance": torch.full((batch,), 1000.0),
            "timestep": torch.full((batch,), 500),
        },
        "ltx": lambda: {
            "hidden_states": _rand(batch, 12, 8),
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(batch, TEXT),
            "timestep": torch.full((batch,), 500),
            "num_frames": 3,
            "height": 2,
            "width": 2,
        },
    }[name]()
