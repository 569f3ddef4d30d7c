"""Radial Attention's bands as whole blocks: the published rule in closed form, and repaired."""

from __future__ import annotations

import numpy as np

from attn_control.errors import AttnControlError


def blocks_of(
    frames: int,
    tokens: int,
    block: int,
    widths: np.ndarray,
    *,
    sink: bool,
    total: int,
    repaired: bool,
) -> np.ndarray:
    """bool (total, total) of blocks cut from the first token on.

    For each pair of frames, a block is on if more than 0.6 of its key columns that the band touches
    are on for more than a third of a block of queries. As published, a frame that begins inside a
    block loses what is beyond ``ceil(tokens / block)`` blocks from there, and a third is of a whole
    block even where few of its queries are of the frame; so tokens near the borders of frames miss
    keys. Repaired, frames are covered to their ends, a third is of the queries there are; so a
    query block always visits its own key block.

    Args:
        widths: by distance, from `radial_rules.half_widths`.
        sink: whether all of the first frame's keys are on.
        total: blocks a side. As published, those past the video's last whole block are on.

    Raises:
        AttnControlError: as published, the last frame reaches past the last block.
    """
    starts = np.arange(frames) * tokens
    home = starts // block
    phases, kind = np.unique(starts % block, return_inverse=True)
    reach = tokens + (int(phases.max()) if repaired else 0)
    count = -(-reach // block)  # blocks that a frame is cut into, at most
    if not repaired and home[-1] + count > total:
        raise AttnControlError(
            f"radial_block_mask: the last of {frames} frames of {tokens} tokens needs "
            f"{home[-1] + count} blocks of {block}, the sequence has {total}, and the published "
            "generator fails there; pass a longer seq_len, or revision='repaired'"
        )
    edges = np.arange(count) * block - phases[:, None]  # (phases, count), in tokens of the frame
    begin, end = np.clip(edges, 0, tokens), np.clip(edges + block, 0, tokens)
    patches = {
        width: _patch(begin, end, block, width, repaired)
        for width in {*widths.tolist(), tokens} - {-1}
    }
    table = np.zeros((total + count, total + count), bool)  # with a margin, cut off at the end
    for i in range(frames):
        rows = table[home[i] : home[i] + count]
        for j in range(frames):
            width = tokens if sink and j == 0 else int(widths[abs(i - j)])
            if width >= 0:
                rows[:, home[j] : home[j] + count] |= patches[width][kind[i], :, kind[j]]
    table = table[:total, :total]
    if not repaired:
        border = frames * tokens // block
        table[border:] = True
        table[:, border:] = True
    return table


def _patch(
    begin: np.ndarray, end: np.ndarray, block: int, width: int, repaired: bool
) -> np.ndarray:
    """bool (phases, count, phases, count): of a pair of frames, query blocks [begin, end) against
    key blocks of the same bounds, all in tokens of their frames.

    As a key column goes up, the number of a block's queries within ``width`` of it rises, stays,
    falls: the columns that see at least one are an interval, and those that see ``enough`` too.
    """
    first, last = begin[:, :, None, None], end[:, :, None, None]
    rows = last - first
    enough = (rows if repaired else block) // 3 + 1
    touched = _overlap(first - width, last + width, begin, end) * (rows > 0)
    high = _overlap(first - width + enough - 1, last + width - enough + 1, begin, end)
    high *= (rows >= enough) & (2 * width + 1 >= enough)
    return 5 * high > 3 * touched


def _overlap(low: np.ndarray, high: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    return np.maximum(np.minimum(high, end) - np.maximum(low, begin), 0)
