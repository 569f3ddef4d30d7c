"""The exact scorer of textured scenes: colour, shape and place as ever, and which texture it is.

An object's pixels are brought to one number each, 0 for the colour and 1 for its darker tone, and
held against every texture at every phase and three periods, by weighted correlation. The numbers
below were frozen before any model was trained; `texture_error.py` measures their error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np

from attn_control.errors import AttnControlError
from attn_control.zoo.patterns import DARK, PERIOD, TEXTURES, dark
from attn_control.zoo.scenes import COLOURS, SIZE
from attn_control.zoo.scorer import WORK, FoundObject, nearest, pieces, related, shape_of
from attn_control.zoo.textures import parse_textured

_COLOUR = 60.0  # largest RGB distance to a palette colour; half the least distance between two
_PURE = 0.8  # least share of an object's brighter interior that has its colour
_MIN_IOU = 0.85  # least overlap with the ideal shape
_PLAIN = 0.06  # an object with a smaller share of dark pixels is plain
_TONE = 50.0  # largest median RGB distance of the dark pixels from the darker tone
_MIN_FIT = 0.6  # least correlation with the ideal texture
_WINDOW = 64  # pixels at 128 px in which textures are compared; objects are at most 56


@dataclass(frozen=True)
class TexturedObject(FoundObject):
    """One object with its texture (None where unknown) and its fit to it (1 for plain)."""

    texture: str | None
    fit: float


@dataclass(frozen=True)
class TexturedScore:
    """How a picture answers a caption.

    present, bound, relation, background: as in `Score`. texture: every object has the texture that
    the caption names, or, where the reference decides, everything found has the reference's.
    right: all of it, and nothing else.
    """

    present: bool
    bound: bool
    relation: bool
    background: bool
    texture: bool
    right: bool
    found: tuple[TexturedObject, ...]


def score_textured(image: Any, caption: str, reference: Any = None) -> TexturedScore:
    """Score a picture (PIL or uint8 (H, W, 3), at least 64 px) of shapes-flux against a caption.

    reference: where the caption points to one, a texture's name or the reference picture itself.
    Raises AttnControlError for captions outside the grammar, and where the reference is missing,
    not asked for, or shows no known texture.
    """
    spec = parse_textured(caption)
    if spec.by_reference != (reference is not None):
        state = "points to a reference" if spec.by_reference else "names its textures itself"
        raise AttnControlError(f"caption {caption!r} {state}, but got reference={reference!r:.80}")
    wanted = reference_texture(reference) if spec.by_reference else None
    background, found = find_textured(image)
    pairs = spec.plain.objects
    present = all(
        [getattr(o, key) for o in found].count(pair[i]) >= [p[i] for p in pairs].count(pair[i])
        for i, key in enumerate(("colour", "shape"))
        for pair in pairs
    )
    orders = [
        order
        for order in permutations(found, len(pairs))
        if all((o.colour, o.shape) == pair for o, pair in zip(order, pairs, strict=True))
    ]
    textures = [texture or wanted for texture in spec.textures]
    # Two objects of one colour and shape may stand for each other: take the order that does best.
    ranked = sorted(
        (
            spec.plain.relation is None or related(spec.plain.relation, *order),
            [o.texture for o in order] == textures,
        )
        for order in orders
    )
    relation, named = ranked[-1] if ranked else (spec.plain.relation is None, False)
    texture = named
    if spec.by_reference:
        texture = bool(found) and all(o.texture == wanted for o in found)
    on = spec.plain.background is None or spec.plain.background == background
    right = bool(orders) and relation and texture and on and len(found) == len(pairs)
    return TexturedScore(present, bool(orders), relation, on, texture, right, found)


def reference_texture(reference: Any) -> str:
    """The texture of a reference: its name, or what the picture's largest object shows."""
    if isinstance(reference, str):
        if reference not in TEXTURES:
            raise AttnControlError(f"unknown texture {reference!r}; known: {', '.join(TEXTURES)}")
        return reference
    _, found = find_textured(reference)
    if not found or found[0].texture is None:
        raise AttnControlError("the reference picture shows no object of a known texture")
    return found[0].texture


def find_textured(image: Any) -> tuple[str | None, tuple[TexturedObject, ...]]:
    """The background's name (None if it is none of the palette) and all objects, largest first."""
    rgb, back, background, masks = pieces(image)
    found = [_describe(rgb, back, mask) for mask in masks]
    return background, tuple(sorted(found, key=lambda o: -o.area))


def _describe(rgb: np.ndarray, back: np.ndarray, piece: np.ndarray) -> TexturedObject:
    import cv2

    piece8 = piece.astype(np.uint8)
    core = cv2.erode(piece8, np.ones((5, 5), np.uint8), borderValue=0).astype(bool)
    if core.sum() < 30:
        core = piece
    inner = rgb[core]
    power = np.linalg.norm(inner, axis=-1)
    tone_rgb = np.median(inner[power >= np.quantile(power, 0.7)], 0)  # the brighter tone
    colour, distance = nearest(tone_rgb, COLOURS)
    # 0 for the object's colour, 1 for its darker tone.
    level = (1 - rgb @ tone_rgb / max(float(tone_rgb @ tone_rgb), 1.0)) / (1 - DARK)
    bright = inner[level[core] < 0.5]
    palette = np.asarray(list(COLOURS.values()), np.float32)
    votes = np.linalg.norm(bright[:, None] - palette, axis=-1).argmin(1)
    pure = float((votes == list(COLOURS).index(colour)).mean()) if len(bright) else 0.0
    # A pixel belongs to the object where it is nearer to its two tones, or a blend of them, than
    # to the background: the edge lies where it was drawn, whatever the antialiasing.
    blend = np.clip(1 - (1 - DARK) * level, DARK, 1.0)[..., None] * tone_rgb
    off = np.linalg.norm(rgb - blend, axis=-1)
    near = cv2.dilate(piece8, np.ones((5, 5), np.uint8)).astype(bool)
    mask = near & (off < np.linalg.norm(rgb - back, axis=-1))
    ys, xs = np.nonzero(mask if mask.any() else piece)
    box = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
    shape, iou = shape_of(mask[box])
    texture, fit = _texture_of(np.clip(level, 0, 1)[box], core[box])
    second = core & (level > 0.5)
    if texture not in (None, "plain") and np.median(
        np.linalg.norm(rgb[second] - DARK * tone_rgb, axis=-1)
    ) > _TONE:  # fmt: skip
        texture = None
    return TexturedObject(
        colour if distance <= _COLOUR and pure >= _PURE else None,
        shape if iou >= _MIN_IOU else None,
        float(xs.min() + xs.max() + 1) / 2 / WORK,
        float(ys.min() + ys.max() + 1) / 2 / WORK,
        float(mask.sum()) / WORK**2,
        iou,
        texture,
        fit,
    )


def _texture_of(level: np.ndarray, core: np.ndarray) -> tuple[str | None, float]:
    """The best of the textures for tones (0-1) and interior of one box, and its correlation."""
    import cv2

    if (level[core] > 0.5).mean() < _PLAIN:
        return "plain", 1.0
    scale = SIZE / WORK
    size = [min(max(round(n * scale), 1), _WINDOW) for n in level.shape]
    weight = cv2.resize(core.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
    tone = cv2.resize(level.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
    w, d = np.zeros((2, _WINDOW, _WINDOW), np.float32)
    w[: size[0], : size[1]], d[: size[0], : size[1]] = weight, tone
    w /= max(float(w.sum()), 1e-6)
    d -= (w * d).sum()
    names, patterns = _patterns()
    mean = patterns @ w.ravel()
    spread = np.sqrt(np.maximum((patterns * patterns) @ w.ravel() - mean * mean, 1e-6))
    fit = patterns @ (w * d).ravel() / (spread * max(float(np.sqrt((w * d * d).sum())), 1e-6))
    # A pattern that shows next to one tone only inside this mask explains nothing.
    fit[(mean < 0.1) | (mean > 0.9)] = 0
    best = int(fit.argmax())
    return (names[best] if fit[best] >= _MIN_FIT else None), float(fit[best])


@lru_cache(maxsize=1)
def _patterns() -> tuple[tuple[str, ...], np.ndarray]:
    """Ideal textures float32 (patterns, window pixels) at all phases and three periods."""
    grid = (np.arange(_WINDOW * 2) + 0.5) / 2
    names, rows = [], []
    for stretch in (0.9, 1.0, 1.1):
        shifts = np.arange(12) * PERIOD / 12
        for texture in TEXTURES[1:]:
            for dx in shifts if texture != "striped" else [0.0]:
                for dy in shifts if texture != "barred" else [0.0]:
                    x, y = grid / stretch + dx, grid / stretch + dy
                    fine = dark(texture, x[None, :], y[:, None]).astype(np.float32)
                    cells = fine.reshape(_WINDOW, 2, _WINDOW, 2).mean((1, 3))
                    names.append(texture)
                    rows.append(cells.ravel())
    return tuple(names), np.stack(rows)
