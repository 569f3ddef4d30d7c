"""The patterns of textured shapes: where an object shows the second, darker tone of its colour."""

from __future__ import annotations

import numpy as np

from attn_control.errors import AttnControlError

TEXTURES = ("plain", "striped", "barred", "checked", "dotted")
PERIOD = 16.0  # pixels at 128 px from one stripe, square or dot to the next alike
DARK = 0.5  # the second tone, as a share of the object's RGB
_DOT = 5.2  # radius in pixels


def dark(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where a texture shows its second tone; x (right), y (down) in pixels at 128 px, broadcast."""
    half = PERIOD / 2
    if texture == "plain":
        return np.zeros(np.broadcast(x, y).shape, bool)
    if texture == "striped":  # lines that run from left to right
        return np.floor(y / half) % 2 + 0 * x > 0.5
    if texture == "barred":  # lines that run from top to bottom
        return np.floor(x / half) % 2 + 0 * y > 0.5
    if texture == "checked":
        return (np.floor(x / half) + np.floor(y / half)) % 2 > 0.5
    if texture == "dotted":
        u, v = x % PERIOD - half, y % PERIOD - half
        return u * u + v * v <= _DOT**2
    raise AttnControlError(f"unknown texture {texture!r}; known: {', '.join(TEXTURES)}")
