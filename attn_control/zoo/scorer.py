"""The exact scorer of ShapeScenes: finds the objects of a picture and holds them against a caption.

Foreground is what differs from the frame's colour; each connected piece gets its colour from its
interior, its mask at half contrast, and its shape from the best overlap with ideal shapes stretched
to its bounding box. Pictures are brought to 256 px first: one set of numbers serves all sizes.
The numbers below were frozen before any model was trained; `scorer_error.py` measures their error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from attn_control.errors import AttnControlError
from attn_control.zoo.scenes import BACKGROUNDS, COLOURS, SHAPES, parse_caption

WORK = 256  # pixels a side while scoring
_FOREGROUND = 45.0  # RGB distance from the background that makes a pixel foreground
_COLOUR = 60.0  # largest RGB distance to a palette colour; half the least distance between two
_PURE = 0.8  # least share of an object's interior that has its colour
_MIN_AREA = 0.003  # smaller pieces (share of the picture) are specks, not objects
_MIN_IOU = 0.85  # least overlap with the ideal shape; a circle and its square overlap by 0.785
_ASPECT = 1.35  # longest side over shortest of a known shape
_APART = 0.12  # a relation holds from this distance on (share of the picture's side)


@dataclass(frozen=True)
class FoundObject:
    """One object. Unknown colour or shape is None; x, y, area are shares of the picture."""

    colour: str | None
    shape: str | None
    x: float
    y: float
    area: float
    iou: float


@dataclass(frozen=True)
class Score:
    """How a picture answers a caption.

    present: every colour and every shape asked for is there; bound: on the right objects, too;
    relation, background: true where the caption says nothing; right: all of it, and nothing else.
    """

    present: bool
    bound: bool
    relation: bool
    background: bool
    right: bool
    found: tuple[FoundObject, ...]


def score(image: Any, caption: str) -> Score:
    """Score a PIL image or uint8 (H, W, 3) RGB array of at least 64 px against a caption.

    Raises AttnControlError for captions outside the grammar and for other kinds of arrays.
    """
    spec = parse_caption(caption)
    background, found = find_objects(image)
    present = all(
        _holds([getattr(o, key) for o in found], [pair[i] for pair in spec.objects])
        for i, key in enumerate(("colour", "shape"))
    )
    matched = match(spec.objects, found)
    bound = matched is not None
    relation = spec.relation is None or (bound and related(spec.relation, *matched))
    on = spec.background is None or spec.background == background
    right = bound and relation and on and len(found) == len(spec.objects)
    return Score(present, bound, relation, on, right, found)


def find_objects(image: Any) -> tuple[str | None, tuple[FoundObject, ...]]:
    """The background's name (None if it is none of the palette) and all objects, largest first."""
    rgb, back, background, masks = pieces(image)
    found = [_describe(rgb, back, mask) for mask in masks]
    return background, tuple(sorted(found, key=lambda o: -o.area))


def pieces(image: Any) -> tuple[np.ndarray, np.ndarray, str | None, list[np.ndarray]]:
    """What stands before the background.

    Returns the picture as float32 (256, 256, 3), the background's RGB and its name (None if it is
    none of the palette), and a bool mask (256, 256) of each connected piece that is no speck.
    """
    import cv2

    rgb = cv2.resize(as_array(image), (WORK, WORK), interpolation=cv2.INTER_LINEAR)
    rgb = rgb.astype(np.float32)
    edge = np.concatenate([rgb[:8].reshape(-1, 3), rgb[-8:].reshape(-1, 3),
                           rgb[:, :8].reshape(-1, 3), rgb[:, -8:].reshape(-1, 3)])  # fmt: skip
    back = np.median(edge, 0)
    name, distance = nearest(back, {**BACKGROUNDS, **COLOURS})
    background = name if name in BACKGROUNDS and distance <= _COLOUR else None
    differs = (np.linalg.norm(rgb - back, axis=-1) > _FOREGROUND).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(differs, connectivity=4)
    least = _MIN_AREA * WORK * WORK
    kept = [i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= least]
    return rgb, back, background, [labels == i for i in kept]


def _describe(rgb: np.ndarray, back: np.ndarray, piece: np.ndarray) -> FoundObject:
    import cv2

    piece8 = piece.astype(np.uint8)
    core = cv2.erode(piece8, np.ones((5, 5), np.uint8), borderValue=0).astype(bool)
    inner = rgb[core if core.sum() >= 30 else piece]
    colour_rgb = np.median(inner, 0)
    colour, distance = nearest(colour_rgb, COLOURS)
    palette = np.asarray(list(COLOURS.values()), np.float32)
    votes = np.linalg.norm(inner[:, None] - palette, axis=-1).argmin(1)
    pure = float((votes == list(COLOURS).index(colour)).mean())
    # At half contrast between background and object the edge lies where it was drawn, whatever
    # the antialiasing or blur.
    axis = colour_rgb - back
    alpha = (rgb - back) @ axis / max(float(axis @ axis), 1.0)
    near = cv2.dilate(piece8, np.ones((5, 5), np.uint8)).astype(bool)
    mask = near & (alpha > 0.5)
    ys, xs = np.nonzero(mask if mask.any() else piece)
    box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    shape, iou = shape_of(box)
    return FoundObject(
        colour if distance <= _COLOUR and pure >= _PURE else None,
        shape if iou >= _MIN_IOU else None,
        float(xs.min() + xs.max() + 1) / 2 / WORK,
        float(ys.min() + ys.max() + 1) / 2 / WORK,
        float(mask.sum()) / WORK**2,
        iou,
    )


def shape_of(box: np.ndarray) -> tuple[str | None, float]:
    """The best of the ideal shapes for a mask cut to its bounding box, and its overlap (IoU)."""
    import cv2

    height, width = box.shape
    if max(height, width) > _ASPECT * min(height, width):
        return None, 0.0
    mask = cv2.resize(box.astype(np.float32), (64, 64), interpolation=cv2.INTER_AREA)
    best = (None, 0.0)
    for shape, ideal in _ideals():
        iou = float(np.minimum(mask, ideal).sum() / np.maximum(mask, ideal).sum())
        if iou > best[1]:
            best = (shape, iou)
    return best


@lru_cache(maxsize=1)
def _ideals() -> tuple[tuple[str, np.ndarray], ...]:
    """Ideal masks float (64, 64) that fill their box; crosses and rings in several thicknesses."""
    grid = (np.arange(256) + 0.5) / 128 - 1
    u, v = np.abs(grid)[None, :], grid[:, None]
    r2 = u * u + v * v
    masks = [("circle", r2 <= 1), ("square", np.ones((256, 256), bool))]
    masks += [("triangle", 2 * u <= v + 1)]
    masks += [("cross", np.minimum(u, abs(v)) <= arm) for arm in (0.3, 0.36, 0.42)]
    masks += [("ring", (r2 <= 1) & (r2 >= hole * hole)) for hole in (0.47, 0.55, 0.63)]
    assert {name for name, _ in masks} == set(SHAPES)
    return tuple(
        (name, m.reshape(64, 4, 64, 4).mean((1, 3)).astype(np.float32)) for name, m in masks
    )


def as_array(image: Any) -> np.ndarray:
    if hasattr(image, "convert"):  # PIL, without importing it
        image = np.asarray(image.convert("RGB"))
    ok = isinstance(image, np.ndarray) and image.dtype == np.uint8
    if not ok or image.ndim != 3 or image.shape[2] != 3:
        got = type(image).__name__
        if isinstance(image, np.ndarray):
            got = f"{image.dtype} {image.shape}"
        raise AttnControlError(f"score wants a PIL image or a uint8 (H, W, 3) array, got {got}")
    if min(image.shape[:2]) < 64:
        raise AttnControlError(f"score wants at least 64 px a side, got {image.shape[:2]}")
    return np.ascontiguousarray(image)


def nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    names = list(palette)
    distances = [float(np.linalg.norm(rgb - np.asarray(palette[n], np.float32))) for n in names]
    i = int(np.argmin(distances))
    return names[i], distances[i]


def _holds(have: list[str | None], want: list[str]) -> bool:
    return all(have.count(w) >= want.count(w) for w in want)


def match(
    wanted: tuple[tuple[str, str], ...], found: tuple[FoundObject, ...]
) -> list[FoundObject] | None:
    left, out = list(found), []
    for pair in wanted:
        hit = next((o for o in left if (o.colour, o.shape) == pair), None)
        if hit is None:
            return None
        left.remove(hit)
        out.append(hit)
    return out


def related(relation: str, a: FoundObject, b: FoundObject) -> bool:
    dx, dy = b.x - a.x, b.y - a.y
    side, other = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return side >= _APART and side >= 0.8 * abs(other)
