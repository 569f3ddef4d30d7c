"""The denoiser of shapes-flux, and a second, coarse door to it that only training uses.

As for shapes-sd3: the blocks never see the size of a patch, so most steps show them latent patches
of 4 x 4 (64 tokens a picture) through layers of their own, rather than the shipped 2 x 2 (256).
"""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from attn_control.zoo.train.text import WIDTH

CHANNELS = 4  # of the latents


def build(width: int = 128, layers: tuple[int, int] = (2, 6)) -> FluxTransformer2DModel:
    """An untrained denoiser with heads of 32 channels; layers: double blocks, single blocks."""
    model = FluxTransformer2DModel(
        in_channels=4 * CHANNELS, num_layers=layers[0], num_single_layers=layers[1],
        attention_head_dim=32, num_attention_heads=width // 32, joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH, axes_dims_rope=(8, 12, 12), guidance_embeds=False,
    )  # fmt: skip
    gates = [block.norm1 for block in model.transformer_blocks]
    gates += [block.norm1_context for block in model.transformer_blocks]
    gates += [block.norm for block in model.single_transformer_blocks]
    for norm in gates:  # adaLN-zero: every block starts as the identity
        nn.init.zeros_(norm.linear.weight)
        nn.init.zeros_(norm.linear.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


class Coarse(nn.Module):
    """The coarse door: patches of 4 in and out."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.x_embedder = nn.Linear(16 * CHANNELS, width)
        self.proj_out = nn.Linear(width, 16 * CHANNELS)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)


def pack(x: torch.Tensor, patch: int = 2) -> torch.Tensor:
    """Latents (batch, 4, side, side) to tokens, in FluxPipeline's order for patches of 2."""
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: torch.Tensor, patch: int = 2) -> torch.Tensor:
    """The inverse of `pack`, for square latents."""
    cells = int(tokens.shape[1] ** 0.5)
    x = tokens.view(-1, cells, cells, CHANNELS, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, CHANNELS, cells * patch, cells * patch)


def places(cells: int, first: float = 0.0, coarse: bool = False) -> torch.Tensor:
    """Position ids (cells^2, 3); first: 0 for the target, 1 for a reference (Kontext's order).

    A coarse token stands at the middle of the four fine ones that it covers.
    """
    at = torch.arange(cells) * 2 + 0.5 if coarse else torch.arange(cells).float()
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([torch.full_like(y, first), y, x], -1).view(-1, 3)


def velocity(
    model: FluxTransformer2DModel,
    x: torch.Tensor,
    t: torch.Tensor,
    states: torch.Tensor,
    pooled: torch.Tensor,
    reference: torch.Tensor | None = None,
    coarse: Coarse | None = None,
    tap: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """What `model(...)` computes, or the same blocks behind the coarse door.

    x, reference float (batch, 4, side, side); t float (batch,) in [0, 1]; states (batch, tokens,
    64); pooled (batch, 64). Returns the velocity, shaped like x. tap: takes the tokens (batch,
    tokens, width) of picture and reference as they are after five of eight of the blocks.
    """
    patch, door = (4, coarse) if coarse is not None else (2, model)
    tokens = pack(x, patch)
    length = tokens.shape[1]
    ids = [states.new_zeros(states.shape[1], 3), places(x.shape[-1] // patch, 0, patch == 4)]
    if reference is not None:
        tokens = torch.cat([tokens, pack(reference, patch)], 1)
        ids.append(places(x.shape[-1] // patch, 1, patch == 4))
    rotary = model.pos_embed(torch.cat(ids).float())
    h = door.x_embedder(tokens)
    temb = model.time_text_embed(t * 1000, pooled)
    context = model.context_embedder(states)
    parts = {"temb": temb, "image_rotary_emb": rotary}
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    for depth, block in enumerate(blocks):
        context, h = block(hidden_states=h, encoder_hidden_states=context, **parts)
        if tap is not None and depth == len(blocks) * 5 // 8 - 1:
            tap.append(h)
    return unpack(door.proj_out(model.norm_out(h[:, :length], temb)), patch)
