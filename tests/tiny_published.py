"""Models with the layers and heads of published checkpoints, and next to no width.

Numbers read off the checkpoints' config.json on the hub, each beside its model id.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from tiny import _spread, inputs
from tiny_attach_only import MOCHI
from tiny_more import more_inputs
from tiny_videos import VIDEOS
from tiny_wide import TEXT, rand, time


def _unet(**config: Any) -> Any:
    shared = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2}
    return diffusers.UNet2DConditionModel(**shared, cross_attention_dim=32, **config)


def _sd15() -> Any:
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    return _unet(
        attention_head_dim=8,  # diffusers' name for the number of heads
        block_out_channels=(16,) * 4,
        norm_num_groups=4,
        down_block_types=down,
        up_block_types=up,
    )


def _sdxl() -> Any:
    return _unet(
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        block_out_channels=(20,) * 3,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        use_linear_projection=True,
    )


def _sd3(layers: int, heads: int, dual: int = 0, qk_norm: str | None = "rms_norm") -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=4,
        joint_attention_dim=32,
        caption_projection_dim=4 * heads,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
        dual_attention_layers=tuple(range(dual)),
        qk_norm=qk_norm,
    )


def _flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=19,
        num_single_layers=38,
        num_attention_heads=24,
        attention_head_dim=6,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 2),
    )


def _wan() -> Any:
    return diffusers.WanTransformer3DModel(
        num_layers=40,
        num_attention_heads=40,
        attention_head_dim=6,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def _pixart() -> Any:
    return diffusers.PixArtTransformer2DModel(
        num_layers=28,
        num_attention_heads=16,
        attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        cross_attention_dim=64,
        caption_channels=32,
        sample_size=8,
        use_additional_conditions=False,
    )


def _ltx() -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        num_layers=28,
        num_attention_heads=32,
        attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=128,
        caption_channels=32,
    )


def _hunyuanvideo() -> Any:
    return diffusers.HunyuanVideoTransformer3DModel(
        num_layers=20,
        num_single_layers=40,
        num_refiner_layers=1,
        num_attention_heads=24,
        attention_head_dim=6,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=32,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 2, 2),
    )


def _cogvideox_2b() -> Any:
    return diffusers.CogVideoXTransformer3DModel(
        num_layers=30,
        num_attention_heads=30,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=32,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )


def _mochi() -> Any:
    return diffusers.MochiTransformer3DModel(
        num_layers=48,
        num_attention_heads=24,
        attention_head_dim=4,
        patch_size=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=TEXT,
    )


def _picture() -> dict[str, Any]:
    return {
        "hidden_states": rand(2, 4, 8, 8),
        "encoder_hidden_states": rand(2, TEXT, 32, seed=1),
        "encoder_attention_mask": torch.ones(2, TEXT),
        "timestep": time(),
    }


def _video() -> dict[str, Any]:
    return _picture() | {
        "hidden_states": rand(2, 12, 4),
        "num_frames": 3,
        "height": 2,
        "width": 2,
    }


_SD3_MEDIUM = (lambda: _sd3(24, 24, qk_norm=None), lambda: inputs("sd3"))
_SDXL = (_sdxl, lambda: inputs("sdxl") | {"sample": rand(2, 4, 8, 8)})
_WAN_14B = (_wan, lambda: inputs("wan"))
_FLUX = (_flux, lambda: inputs("flux"))

_MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        _sd15,
        lambda: inputs("unet") | {"sample": rand(2, 4, 32, 32)},  # a middle block of 4 x 4
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
    "stabilityai/stable-diffusion-3-medium-diffusers": _SD3_MEDIUM,
    "stabilityai/stable-diffusion-3.5-medium": (lambda: _sd3(24, 24, 13), lambda: inputs("sd3")),
    "stabilityai/stable-diffusion-3.5-large-turbo": (lambda: _sd3(38, 38), lambda: inputs("sd3")),
    "black-forest-labs/FLUX.1-schnell": _FLUX,
    "black-forest-labs/FLUX.1-dev": _FLUX,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _WAN_14B,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _WAN_14B,
    "THUDM/CogVideoX-2b": (_cogvideox_2b, VIDEOS["cogvideox"].call),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": (_pixart, _picture),
    "Lightricks/LTX-Video": (_ltx, _video),
    "hunyuanvideo-community/HunyuanVideo": (_hunyuanvideo, lambda: more_inputs("hunyuanvideo")),
    "genmo/mochi-1-preview": (_mochi, MOCHI.call),
    "shapes-sd3": (lambda: _sd3(6, 4), lambda: inputs("sd3")),
}
PUBLISHED = tuple(_MODELS)


def published(name: str) -> tuple[Any, dict[str, Any]]:
    """A model of the proportions of a checkpoint, and a call of it."""
    make, call = _MODELS[name]
    torch.manual_seed(0)
    return _spread(make()), call()
