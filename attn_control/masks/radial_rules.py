"""How wide Radial Attention's band is at each distance between frames, in each of its revisions.

The published mask changed twice: r0 (2025-06-25) is that of the paper's experiments, r1
(2025-07-06) took the sink from HunyuanVideo, r2 (2025-11-11) made Wan's band between adjacent
frames full.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attn_control.errors import AttnControlError

REVISIONS = "repaired", "r2", "r1", "r0", "paper"
MODELS = "wan", "hunyuan"
DROP = 128
"""Tokens: where a band is narrower, whole frame pairs are dropped instead. A literal in r0 to r2,
whatever the block size and the decay."""


@dataclass(frozen=True)
class Rules:
    """What the revisions differ in; `radial_blocks` has what else `repaired` does.

    Attributes:
        revision: one of `REVISIONS`.
        sink: whether every query reads the first frame.
        half: whether the band between adjacent frames is half a frame instead of a whole one.
        drop: least band in tokens before frames are dropped. Repaired, frames of fewer than 128
            tokens are treated as those of 128: they keep the distances 1, 2, 4, 8, ... where the
            published rule keeps none.
    """

    revision: str
    sink: bool
    half: bool
    drop: float


def rules_of(revision: str, model: str, tokens: int, sink: bool | None) -> Rules:
    """Of a revision; ``sink`` overrules what it has. Eq. 4 has none by itself."""
    usual = revision == "r0" or (model == "wan" and revision != "paper")
    return Rules(
        revision=revision,
        sink=usual if sink is None else sink,
        half=model == "wan" and revision in ("r0", "r1"),
        drop=min(DROP, decay_length(tokens, 1)) if revision == "repaired" else DROP,
    )


def decay_length(tokens: int, distance: int) -> float:
    """Tokens: the power of two above a frame's, halved at each doubling of the distance."""
    return float(1 << tokens.bit_length()) / (1 << distance.bit_length())


def half_widths(frames: int, tokens: int, block: int, decay: float, rules: Rules) -> np.ndarray:
    """int64 (frames,): by distance between frames, how far apart in their frames a query and a key
    may be; -1 where the pair of frames is dropped.
    """
    found = np.full(frames, -1)
    for distance in range(frames):
        if rules.revision == "paper":
            # |k - l| + 1 <= width, of a full width; the diagonal stays on, at least now and then.
            thinning = 1 << (max(distance, 1).bit_length() - 1)
            if distance % -(-thinning // tokens) == 0:
                found[distance] = min(max(int(decay * tokens / thinning) - 1, 0), tokens - 1)
            continue
        length = decay_length(tokens, distance)
        if length < rules.drop and distance % int(rules.drop / length):
            continue
        if distance < 2:
            width: float = tokens // 2 if rules.half and distance else tokens
        else:
            width = max(decay * length, block)
        # The published band compares integers with a float, which torch does in float32.
        found[distance] = min(int(np.floor(np.float32(width))), tokens)
    return found


def break_points(frames: int, tokens: int, block: int, rules: Rules) -> np.ndarray:
    """Ascending float64: every decay at which some width, hence the mask, may change. Nothing does
    from the first down, nor from the last up.
    """
    distances = range(frames)
    if rules.revision == "paper":
        scales = {tokens / (1 << (max(d, 1).bit_length() - 1)) for d in distances}
        widths = np.arange(1, tokens + 1)
        # Below one token a width is the diagonal.
        scales = {scale for scale in scales if scale >= 1}
    else:
        kept = half_widths(frames, tokens, block, 1.0, rules)
        scales = {decay_length(tokens, d) for d in distances if d > 1 and kept[d] >= 0}
        widths = np.arange(min(block, tokens), tokens + 1)
    found = [widths / scale for scale in scales] or [np.ones(1)]
    return np.unique(np.concatenate(found))


def check(frames: int, tokens: int, decay: float, model: str, revision: str) -> None:
    """Arguments of `radial_block_mask` that can be wrong by themselves."""
    for name, value in (("num_frames", frames), ("tokens_per_frame", tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise AttnControlError(f"radial_block_mask: {name}={value!r} has to be a positive int")
    for name, word, known in (("model", model, MODELS), ("revision", revision, REVISIONS)):
        if word not in known:
            raise AttnControlError(
                f"radial_block_mask: {name}={word!r} is not one of {', '.join(known)}"
            )
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay < np.inf:
        raise AttnControlError(f"radial_block_mask: decay_factor={decay!r} has to be positive")
