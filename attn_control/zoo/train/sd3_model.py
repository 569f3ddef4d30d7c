"""The denoiser of shapes-sd3, with a second, coarser door for cheap training steps.

The blocks are those of the shipped `SD3Transformer2DModel` (patch 2, 256 tokens at 128 px). The
coarse door reads and writes patches of 4 (64 tokens) through layers of its own, thrown away later.
"""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
from torch import nn

from attn_control.zoo.train.text import WIDTH

CHANNELS, SIDE, GRID = 4, 32, 16  # latent channels, latent side, tokens a side at 128 px


def build(
    width: int = 128, layers: int = 6, heads: int = 4, table: int = 32
) -> SD3Transformer2DModel:
    """An untrained denoiser; `table` is the largest number of tokens a side (32: up to 256 px)."""
    model = SD3Transformer2DModel(
        sample_size=SIDE, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS,
        num_layers=layers, num_attention_heads=heads, attention_head_dim=width // heads,
        joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH,
        caption_projection_dim=width, pos_embed_max_size=table, qk_norm="rms_norm",
    )  # fmt: skip
    # The pipeline crops the table's middle. Cells one apart, from 0 at 128 px.
    at = torch.arange(table, dtype=torch.float64) - (table - GRID) // 2
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"))
    grid = grid.reshape(2, 1, table, table)
    places = get_2d_sincos_pos_embed_from_grid(width, grid, output_type="pt")
    model.pos_embed.pos_embed.copy_(places.float().unsqueeze(0))
    for block in model.transformer_blocks:  # adaLN-zero: every block starts as the identity
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


class Coarse(nn.Module):
    """The coarse door: patches of 4 in and out."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.proj = nn.Conv2d(CHANNELS, width, 4, 4)
        self.proj_out = nn.Linear(width, 16 * CHANNELS)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)


def velocity(
    model: SD3Transformer2DModel,
    x: torch.Tensor,
    t: torch.Tensor,
    states: torch.Tensor,
    pooled: torch.Tensor,
    coarse: Coarse | None = None,
) -> torch.Tensor:
    """What `model(...)` computes, or the same blocks behind the coarse door.

    x float (batch, 4, side, side); t float (batch,) in [0, 1000]; states (batch, tokens, 128);
    pooled (batch, 128). Returns the velocity, shaped like x.
    """
    places = model.pos_embed.cropped_pos_embed(x.shape[-2], x.shape[-1])
    patch, door = (4, coarse) if coarse is not None else (2, model)
    cells = x.shape[-1] // patch
    if coarse is None:
        h = model.pos_embed.proj(x).flatten(2).transpose(1, 2) + places
    else:
        places = places.view(1, cells, 2, cells, 2, -1).mean((2, 4)).flatten(1, 2)
        h = coarse.proj(x).flatten(2).transpose(1, 2) + places
    temb = model.time_text_embed(t, pooled)
    context = model.context_embedder(states)
    for block in model.transformer_blocks:
        context, h = block(hidden_states=h, encoder_hidden_states=context, temb=temb)
    h = door.proj_out(model.norm_out(h, temb))
    h = h.view(-1, cells, cells, patch, patch, CHANNELS)
    return h.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
