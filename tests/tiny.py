"""Tiny, randomly initialised models and pipelines of real diffusers classes."""

from __future__ import annotations

from typing import Any

import diffusers
import torch


def sd3(layers: int = 3, dual: tuple[int, ...] = (), qk_norm: str | None = "rms_norm") -> Any:
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    )
    return _spread(model)


def flux(double: int = 2, single: int = 2, heads: int = 2, guidance: bool = False) -> Any:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    return _spread(model)


def wan(layers: int = 2) -> Any:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return _spread(model)


def unet(sdxl: bool = False) -> Any:
    torch.manual_seed(0)
    extra: dict[str, Any] = {}
    if sdxl:
        extra = {
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
            "use_linear_projection": True,
        }
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        **extra,
    )
    return _spread(model)


def _spread(model: Any) -> Any:
    """Give zero-initialised gates and outputs weight, so that a change inside shows outside."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def inputs(name: str, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of one denoiser call."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    if name.startswith("sd3"):
        return {
            "hidden_states": rand(batch, 4, 8, 8),
            "encoder_hidden_states": rand(batch, 5, 32),
            "pooled_projections": rand(batch, 16),
            "timestep": torch.full((batch,), 500.0),
        }
    if name == "flux":
        ids = torch.zeros(4, 4, 3)
        ids[..., 1] += torch.arange(4)[:, None]
        ids[..., 2] += torch.arange(4)[None]
        return {
            "hidden_states": rand(batch, 16, 16),
            "encoder_hidden_states": rand(batch, 5, 32),
            "pooled_projections": rand(batch, 16),
            "timestep": torch.full((batch,), 0.5),
            "img_ids": ids.reshape(16, 3),
            "txt_ids": torch.zeros(5, 3),
        }
    if name == "wan":
        return {
            "hidden_states": rand(batch, 4, 3, 4, 4),
            "encoder_hidden_states": rand(batch, 6, 16),
            "timestep": torch.full((batch,), 500),
        }
    call: dict[str, Any] = {
        "sample": rand(batch, 4, 16, 16),
        "encoder_hidden_states": rand(batch, 7, 32),
        "timestep": torch.tensor(500),
    }
    if name == "sdxl":
        call["added_cond_kwargs"] = {"text_embeds": rand(batch, 16), "time_ids": rand(batch, 6)}
    return call


MODELS = {
    "sd15": lambda: unet(),
    "sdxl": lambda: unet(sdxl=True),
    "sd3": lambda: sd3(),
    "sd35": lambda: sd3(dual=(0, 1)),
    "flux": lambda: flux(),
    "wan": lambda: wan(),
}


def family_inputs(name: str, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    return inputs({"sd15": "unet", "sd35": "sd3"}.get(name, name), batch, seed)
