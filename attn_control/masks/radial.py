"""Radial Attention (arXiv 2506.19852): the farther apart two frames are, the closer in place a key
has to be to its query; very far frames are read now and then, the first frame always.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from attn_control.errors import AttnControlError
from attn_control.masks import radial_rules
from attn_control.masks.block import BlockMask
from attn_control.masks.grid import Grid
from attn_control.masks.radial_blocks import blocks_of
from attn_control.masks.radial_paper import paper_mask
from attn_control.masks.radial_rules import Rules, half_widths
from attn_control.masks.say import at_least


def radial_block_mask(
    num_frames: int,
    tokens_per_frame: int,
    *,
    block_size: int = 128,
    decay_factor: float = 1.0,
    model: str = "wan",
    revision: str = "repaired",
    text_tokens: int = 0,
    seq_len: int | None = None,
    sink: bool | None = None,
    target_density: float | None = None,
) -> BlockMask:
    """The mask of a video in raster order, then text, which reads and is read by all.

    Args:
        num_frames, tokens_per_frame: latent frames and tokens, as the denoiser sees them.
        block_size: tokens a block, of queries and keys.
        decay_factor: scales the bands from a distance of two frames on. They are never narrower
            than a block, so small factors make no difference.
        model: "wan" or "hunyuan": whether there is a sink, and how much adjacent frames see.
        revision: "r0", "r1", "r2" are the published generators, bit for bit: blocks are cut from
            the first token on, across the border of the text, and tokens past the video's last
            whole block read and are read by all. "repaired" is r2 with nothing dropped by accident
            and text in blocks of its own; where frames are whole blocks and 128 tokens or more, it
            is r2. "paper" is Eq. 4, a mask of tokens and hence with bit tiles; its blocks begin
            anew at each frame, and ``model`` makes no difference to it.
        text_tokens: after the video.
        seq_len: tokens in all, where others (padding) follow the text: they are as text. It is also
            what a published generator is told; left out, that is video and text up to a whole
            block.
        sink: whether every query reads the whole first frame. Left out, as the revision has it;
            Eq. 4 by itself has none.
        target_density: instead of ``decay_factor``: the largest whose mask is no denser than this.

    Raises:
        AttnControlError: values out of range; a sequence on which the published generator fails; a
            density below what any decay reaches.

    >>> mask = radial_block_mask(21, 3600, decay_factor=0.2)  # Wan, 81 frames of 720 x 1280
    >>> mask.q_blocks, mask.is_fully_block_sparse()
    (591, True)
    """
    radial_rules.check(num_frames, tokens_per_frame, decay_factor, model, revision)
    at_least("radial_block_mask", "block_size", block_size, 1)
    at_least("radial_block_mask", "text_tokens", text_tokens, 0)
    shortest = num_frames * tokens_per_frame + text_tokens
    if seq_len is not None:
        at_least("radial_block_mask", "seq_len", seq_len, shortest)
    length = shortest if seq_len is None else seq_len
    seen = length // block_size if seq_len else -(-length // block_size)
    shape = num_frames, tokens_per_frame, block_size
    rules = radial_rules.rules_of(revision, model, tokens_per_frame, sink)
    build = {"paper": paper_mask, "repaired": _repaired}.get(revision, _published)

    def make(decay: float) -> BlockMask:
        return build(*shape, length, seen, half_widths(*shape, decay, rules), rules)

    if target_density is None:
        return make(decay_factor)
    if decay_factor != 1.0:
        raise AttnControlError(
            f"radial_block_mask: give decay_factor={decay_factor!r} or target_density="
            f"{target_density!r}, not both"
        )
    return _densest(make, radial_rules.break_points(*shape, rules), target_density)


def _published(
    frames: int, tokens: int, block: int, length: int, seen: int, widths: np.ndarray, rules: Rules
) -> BlockMask:
    """The generator makes so many blocks as it has ``seen``; a rest that fills none is past the
    video, and on as all else there.
    """
    table = np.ones((-(-length // block),) * 2, bool)
    table[:seen, :seen] = blocks_of(
        frames, tokens, block, widths, sink=rules.sink, total=seen, repaired=False
    )
    return BlockMask.from_table(torch.from_numpy(table)[None], block_size=block, q_len=length)


def _repaired(
    frames: int, tokens: int, block: int, length: int, seen: int, widths: np.ndarray, rules: Rules
) -> BlockMask:
    grid = Grid((frames, tokens), block, after=length - frames * tokens, split=0)
    video = grid.spatial.stop
    table = np.ones((grid.blocks,) * 2, bool)
    table[:video, :video] = blocks_of(
        frames, tokens, block, widths, sink=rules.sink, total=video, repaired=True
    )
    return BlockMask.from_table(
        torch.from_numpy(table)[None], block_size=block, q_regions=grid.regions
    )


def _densest(make: Callable[[float], BlockMask], points: np.ndarray, target: float) -> BlockMask:
    """Density never falls as the decay rises, so the break-points are halved until one is left."""
    found = make(float(points[0]))
    if found.density() > target:
        raise AttnControlError(
            f"radial_block_mask: target_density={target} is out of reach: the lowest density here "
            f"is {found.density():.4f} (adjacent frames, sink and text are not scaled, and no band "
            "is narrower than a block)"
        )
    low, high = 0, len(points)  # points[low] is dense enough or less, points[high] would be more
    while high - low > 1:
        middle = (low + high) // 2
        mask = make(float(points[middle]))
        if mask.density() <= target:
            low, found = middle, mask
        else:
            high = middle
    return found


def main() -> None:
    from attn_control.masks.draw import command

    def make(grid: Grid) -> BlockMask:
        frames, tokens = grid.shape[0], grid.tokens // grid.shape[0]
        return radial_block_mask(frames, tokens, block_size=grid.block, text_tokens=grid.after)

    command(__doc__, make)


if __name__ == "__main__":
    main()
