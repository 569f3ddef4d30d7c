"""What each latent cell shows, as classes: a denoiser learns to tell them from its own tokens.

A mean squared error hardly notices whether a shape of 40 pixels is a circle or a square. Telling
half-way through the blocks, for every token of a noisy picture, which object will stand there asks
for it outright: binding and outlines are learnt in a fraction of the steps. So it is with patterns:
where their darker tone lies is asked cell by cell, or checks are drawn out of step. It is the idea
of REPA (arXiv 2410.06940), with the scenes' own truth in place of another network's features. The
heads are thrown away when the pipeline is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from attn_control.zoo.patterns import TEXTURES, dark
from attn_control.zoo.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE, Scene, inside
from attn_control.zoo.videos import DIRECTIONS

SIDE = 32  # cells a side: one a latent
_MOST, _FEW = 0.6, 0.2  # shares of a token's cells: above, it shows the object; below, none

# Classes of a cell: its colour (of ground or object), then its shape, then by model its texture or
# motion; of these two 0 is background.
COLOUR = (*BACKGROUNDS, *COLOURS)
TEXTURED = (len(COLOUR), 1 + len(SHAPES), 1 + len(TEXTURES))
MOVING = (len(COLOUR), 1 + len(SHAPES), 2 + len(DIRECTIONS))  # 1: stands still


def cells(scene: Scene, side: int = SIDE) -> np.ndarray:
    """uint8 (side, side): 0 where a cell's middle is background, else 1 + the object's number."""
    at = (np.arange(side) + 0.5) * SIZE / side
    shown = np.zeros((side, side), np.uint8)
    for number, o in enumerate(scene.objects):
        u, v = (at - o.x) / (o.size / 2), (at - o.y) / (o.size / 2)
        within = (np.abs(u)[None, :] <= 1) & (np.abs(v)[:, None] <= 1)
        shown[within & inside(o.shape, u[None, :], v[:, None])] = 1 + number
    return shown


def tones(scene: Scene, side: int = SIDE) -> np.ndarray:
    """uint8 (side, side): which share of a cell, of 255, shows its object's darker tone; 0 where
    its middle is background.
    """
    shown, pixels = cells(scene, side), np.arange(SIZE) + 0.5
    shares = np.zeros((side, side))
    for number, o in enumerate(scene.objects):
        second = dark(o.texture, (pixels - o.phase[0])[None, :], (pixels - o.phase[1])[:, None])
        share = second.reshape(side, SIZE // side, side, SIZE // side).mean((1, 3))
        shares = np.where(shown == 1 + number, share, shares)
    return np.round(255 * shares).astype(np.uint8)


def things(scene: Scene, third: Sequence[int]) -> np.ndarray:
    """int8 (3, 3): the classes of the background, the first and the second object, -1 for none.

    third: every object's class of the third kind.
    """
    rows = np.full((3, 3), -1, np.int8)
    rows[0] = (COLOUR.index(scene.background), 0, 0)
    for number, (o, last) in enumerate(zip(scene.objects, third, strict=True)):
        rows[1 + number] = (COLOUR.index(o.colour), 1 + SHAPES.index(o.shape), last)
    return rows


@dataclass(frozen=True)
class Seen:
    """Cells uint8 (count, pictures, 32, 32) and things int8 (count, pictures, 3, 3) of every
    example: its pictures are a target and its reference, or the frames of a video. Tones, where
    objects have textures, are as cells are.
    """

    cells: torch.Tensor
    things: torch.Tensor
    tones: torch.Tensor | None = None

    def classes(self, at: torch.Tensor, patch: int, pictures: torch.Tensor) -> torch.Tensor:
        """Classes int64 (batch, tokens, kinds) for tokens of patch x patch cells in raster order,
        picture after picture; -1 where an edge runs through a token.

        at: which examples; pictures: which of their pictures.
        """
        shown = self.cells[at][:, pictures]
        side = shown.shape[-1] // patch
        shown = shown.view(*shown.shape[:2], side, patch, side, patch)
        shares = torch.stack([(shown == k).float().mean((3, 5)) for k in range(3)], -1)
        shares = shares.flatten(2, 3)  # (batch, pictures, tokens of a picture, 3)
        ground = 1 - shares[..., 0] < _FEW
        share, best = shares[..., 1:].max(-1)
        best = torch.where(ground, 0, 1 + best)
        things = self.things[at][:, pictures].long()
        found = things.gather(2, best[..., None].expand(-1, -1, -1, things.shape[-1]))
        sure = ground | (share >= _MOST)
        return torch.where(sure[..., None], found, -1).flatten(1, 2)

    def dark_shares(self, at: torch.Tensor, patch: int, pictures: torch.Tensor) -> torch.Tensor:
        """Shares float32 (batch, tokens, patch * patch) of the darker tone in each cell of a token,
        both in raster order; -1 where a cell shows background. As `classes` otherwise.
        """
        assert self.tones is not None
        chosen = [part[at][:, pictures] for part in (self.tones, self.cells)]
        shares = torch.where(chosen[1] > 0, chosen[0] / 255, -1.0)
        side = shares.shape[-1] // patch
        shares = shares.view(*shares.shape[:2], side, patch, side, patch).transpose(3, 4)
        return shares.flatten(4).flatten(1, 3)


def gather(label: Callable[[int], dict[str, np.ndarray]], count: int, file: Path) -> Seen:
    """What the scenes of seeds 0 to count show; kept in `file`, an .npz, for the next start.

    label: from a seed to its part of every field of `Seen`, by name.
    """
    if file.is_file():
        kept = dict(np.load(file))
        if len(kept["cells"]) == count and kept.keys() == label(0).keys():
            return Seen(**{name: torch.from_numpy(part) for name, part in kept.items()})
    rows = [label(seed) for seed in tqdm(range(count), desc=file.stem, mininterval=5)]
    kept = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    np.savez(file, **kept)
    return Seen(**{name: torch.from_numpy(part) for name, part in kept.items()})


class Seer(nn.Module):
    """Scores of every class, read off the tokens inside the denoiser.

    toned: cells of a token whose tones are told too; 0 for none.
    """

    def __init__(self, sizes: Sequence[int], width: int, toned: int = 0):
        super().__init__()
        self.sizes = list(sizes)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, sum(self.sizes))
        self.tone_head = nn.Linear(width, toned) if toned else None

    def tone_loss(self, tokens: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of the darker tone's shares (batch, tokens, toned), -1 left out."""
        assert self.tone_head is not None
        scores = self.tone_head(self.norm(tokens)).float()
        known = (shares >= 0).float()
        each = F.binary_cross_entropy_with_logits(scores, shares.clamp(min=0), reduction="none")
        return (each * known).sum() / known.sum().clamp(min=1)

    def loss(self, tokens: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy over kinds; objects weigh as much as all background.

        tokens (batch, tokens, width); classes int64 (batch, tokens, kinds), -1 left out; of the
        second kind, the shape, 0 is background.
        """
        scores = self.head(self.norm(tokens)).float().split(self.sizes, -1)
        known = classes[..., 1] >= 0
        thing = known & (classes[..., 1] > 0)
        ground = (known & ~thing).float()
        weight = thing / thing.sum().clamp(min=1) + ground / ground.sum().clamp(min=1)
        each = [
            F.cross_entropy(s.flatten(0, 1), classes[..., i].flatten(), ignore_index=-1,
                            reduction="none")
            for i, s in enumerate(scores)
        ]  # fmt: skip
        return 0.5 * (torch.stack(each).mean(0) * weight.flatten()).sum()
