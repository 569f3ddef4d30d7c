"""RadialAttention: the farther apart two frames are, the closer in place a key has to be to be read
(arXiv 2506.19852).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from attn_control.call import Site
from attn_control.kernels.pieces import Piece
from attn_control.kernels.sparse import Fixed, Pattern
from attn_control.masks.place import Place
from attn_control.masks.radial import radial_block_mask
from attn_control.masks.radial_rules import MODELS, REVISIONS
from attn_control.processors.control import number, one_of
from attn_control.processors.sparse import SparseControl, target, unmasked, video


@dataclass(frozen=True)
class RadialAttention(SparseControl):
    """Let a query read keys the nearer in place, the farther away their frame is. Videos only.

    Args:
        decay_factor: scales the bands from a distance of two frames on; see docs/masks.md for where
            that makes a difference.
        model: "wan" or "hunyuan": whether the first frame is a sink, how much adjacent frames see.
        revision: "repaired", one of the published masks "r0", "r1", "r2", or "paper" (Eq. 4).
        sink: whether every query reads the first frame; None: as the revision has it.
        target_density: instead of decay_factor: the densest mask of at most this share of pairs.

    Raises:
        AttnControlError: a value out of range, a picture.
    """

    decay_factor: float = 1.0
    model: str = field(default="wan", kw_only=True)
    revision: str = field(default="repaired", kw_only=True)
    sink: bool | None = field(default=None, kw_only=True)
    target_density: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self.owner, "decay_factor", self.decay_factor, 1e-6)
        one_of(self.owner, "model", self.model, MODELS)
        one_of(self.owner, "revision", self.revision, REVISIONS)
        one_of(self.owner, "sink", self.sink, (None, True, False))
        target(self.owner, self.target_density, "decay_factor", self.decay_factor, 1.0)

    def check_place(self, site: Site, place: Place) -> None:
        video(self, site, place)

    def pattern(self, place: Place, device: torch.device) -> Pattern:
        frames, height, width = place.shape
        mask = radial_block_mask(
            frames,
            height * width,
            block_size=place.block(self.block),
            decay_factor=self.decay_factor,
            model=self.model,
            revision=self.revision,
            text_tokens=place.before + place.after,
            sink=self.sink,
            target_density=self.target_density,
        )
        order = None
        if place.before:  # the mask is of a video with everything else behind it
            tokens = torch.arange(place.length, device=device)
            order = tokens.roll(-place.before)
        return Fixed((Piece(unmasked(mask).to(device), order),))
