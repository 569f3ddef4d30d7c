"""The denoiser of shapes-wan, and a second, coarse door to it that only training uses.

2,304 tokens are much for a CPU. So most steps show the blocks latent patches of 4 x 4 (576 tokens)
through layers of their own; a coarse token stands where the first of its four fine ones does, and
rotary positions are relative, so that the blocks see the same distances. Other steps show only a
few of the frames as well, each at its own place in time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from attn_control.zoo.train.nearness import mass
from attn_control.zoo.train.text import WIDTH

CHANNELS = 4  # of the latents
FRAMES = 9  # of a training video's latents


def build(width: int = 128, layers: int = 8) -> WanTransformer3DModel:
    """An untrained denoiser with heads of 32 channels."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=width // 32, attention_head_dim=32,
        in_channels=CHANNELS, out_channels=CHANNELS, text_dim=WIDTH, freq_dim=128,
        ffn_dim=4 * width, num_layers=layers, cross_attn_norm=True, rope_max_seq_len=256,
    )  # fmt: skip
    # Every block starts as the identity, as with adaLN-zero.
    zero = [model.condition_embedder.time_proj, model.proj_out]
    for block in model.blocks:
        zero.append(block.attn2.to_out[0])
        block.scale_shift_table.data[:, [2, 5]] = 0  # the gates
    for layer in zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


class Coarse(nn.Module):
    """The coarse door: patches of 4 in and out."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.patch_embedding = nn.Conv3d(CHANNELS, width, (1, 4, 4), (1, 4, 4))
        self.proj_out = nn.Linear(width, 16 * CHANNELS)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)


@dataclass
class Looks:
    """Whose attention is looked at, as `nearness.mass` has it, and what was found."""

    queries: torch.Tensor
    inside: torch.Tensor
    masses: list[torch.Tensor] = field(default_factory=list)


def velocity(
    model: WanTransformer3DModel,
    x: torch.Tensor,
    t: torch.Tensor,
    states: torch.Tensor,
    coarse: Coarse | None = None,
    times: torch.Tensor | None = None,
    tap: list[torch.Tensor] | None = None,
    looks: Looks | None = None,
) -> torch.Tensor:
    """What `model(...)` computes, or the same blocks behind the coarse door.

    x float (batch, 4, frames, side, side); t float (batch,) in [0, 1000]; states (batch, tokens,
    64); times int64 (frames,): which frames of a video of `FRAMES` x holds, None for its own.
    Returns the velocity, shaped like x. tap: takes the tokens (batch, tokens, width) as they are
    after five of eight of the blocks. looks: takes how near the heads look, block by block.
    """
    batch, channels, frames, side, _ = x.shape
    patch, door = (4, coarse) if coarse is not None else (2, model)
    cells = side // patch
    whole = x if times is None else x.new_empty(1, channels, FRAMES, side, side)
    rotary = model.rope(whole)
    if coarse is not None or times is not None:
        stride, shown = patch // 2, slice(None) if times is None else times
        rotary = tuple(
            table.view(whole.shape[2], side // 2, side // 2, -1)[shown, ::stride, ::stride].reshape(
                1, frames * cells * cells, 1, -1
            )
            for table in rotary
        )
    h = door.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
    temb, gates, context, _ = model.condition_embedder(t, states, None)
    gates = gates.unflatten(1, (6, -1))
    for depth, block in enumerate(model.blocks):
        if looks is not None:
            looks.masses.append(mass(block, h, gates, rotary, looks.queries, looks.inside))
        h = block(h, context, gates, rotary)
        if tap is not None and depth == len(model.blocks) * 5 // 8 - 1:
            tap.append(h)
    shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
    h = (model.norm_out(h.float()) * (1 + scale) + shift).type_as(h)
    h = door.proj_out(h).view(batch, frames, cells, cells, patch, patch, channels)
    return h.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape)
