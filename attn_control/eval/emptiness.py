"""Videos that show nothing: far beyond its training's size a model may draw bare ground.

Whatever is computed there, bare ground comes out, so that likeness to such a video says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attn_control.errors import AttnControlError
from attn_control.render.media import read_media
from attn_control.render.prompts import Key

VISIBLE = 48  # levels of 255 in some channel
FEWEST = 0.001  # of a video's pixels; the smallest shape of the zoo covers a hundredth of a frame


def is_empty(frames: Sequence[Any]) -> bool:
    """Whether less than a thousandth of all pixels of a video differ visibly from its ground.

    frames: PIL pictures or uint8 arrays (H, W, 3). The ground is the median colour of them all.
    """
    pixels = np.stack([np.asarray(frame) for frame in frames]).astype(np.int16)
    ground = np.median(pixels, axis=(0, 1, 2))
    shown = (np.abs(pixels - ground) > VISIBLE).any(-1)
    return bool(shown.mean() < FEWEST)


def keys_that_show(
    rows: dict[tuple[Key, int], dict[str, Any]], images: Path
) -> list[tuple[Key, int]]:
    """Prompt and seed of the videos that show something.

    Raises:
        AttnControlError: none does.
    """
    found = [key for key, row in rows.items() if not is_empty(read_media(images / row["file"]))]
    if not found:
        raise AttnControlError(
            f"all {len(rows)} dense videos in {images} show bare ground: nothing to be like"
        )
    return found
