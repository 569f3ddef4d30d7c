"""ShapeScenes: coloured shapes on plain backgrounds, drawn from a seed, with a caption grammar.

A caption is one or two objects, a relation between two, and perhaps a background:

>>> parse_caption("a red circle left of a blue square on a white background").relation
'left of'
>>> sample_scene(7).caption == sample_scene(7).caption
True
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from attn_control.errors import AttnControlError
from attn_control.zoo.patterns import DARK, dark

SHAPES = ("circle", "square", "triangle", "cross", "ring")
# RGB, at least 110 apart from each other and from every background.
COLOURS = {
    "red": (225, 45, 40),
    "green": (40, 170, 70),
    "blue": (45, 75, 225),
    "yellow": (245, 215, 45),
    "purple": (165, 45, 205),
    "cyan": (45, 205, 215),
}
BACKGROUNDS = {"black": (16, 16, 16), "white": (242, 242, 242), "gray": (128, 128, 128)}
RELATIONS = ("left of", "right of", "above", "below")
# Never drawn for training: one pair of each shape, so that every shape and colour stays covered.
HELD_OUT = (
    ("red", "triangle"),
    ("green", "ring"),
    ("blue", "cross"),
    ("yellow", "circle"),
    ("purple", "square"),
)
PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES)
SEEN_PAIRS = tuple(p for p in PAIRS if p not in HELD_OUT)

SIZE = 128  # pixels a side
_GAP = 5.0  # least free space between two objects, and to the frame (pixels)
_SUPER = 4  # supersampling factor of the edges

_OBJECT = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"^{_OBJECT}(?: ({'|'.join(RELATIONS)}|and) {_OBJECT})?"
    rf"(?: on a ({'|'.join(BACKGROUNDS)}) background)?$"
)


@dataclass(frozen=True)
class CaptionSpec:
    """What a caption asks for. `relation` and `background` are None where it does not say."""

    objects: tuple[tuple[str, str], ...]  # (colour, shape), in the order of mention
    relation: str | None
    background: str | None


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: centre and size (its box's longer side) in pixels, RGB in 0-255.

    texture and its phase in pixels: see `patterns.py`; shapes-sd3 and shapes-sd15 know only plain.
    """

    colour: str
    shape: str
    x: float
    y: float
    size: float
    rgb: tuple[float, float, float]
    texture: str = "plain"
    phase: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """A picture to draw, with the caption that describes it."""

    objects: tuple[SceneObject, ...]
    background: str
    background_rgb: tuple[float, float, float]
    caption: str


def parse_caption(text: str) -> CaptionSpec:
    """Read a caption of the grammar; case and runs of spaces do not matter.

    Raises AttnControlError for text outside the grammar.
    """
    if not isinstance(text, str):
        raise AttnControlError(f"a caption is a string, got {type(text).__name__}")
    match = _CAPTION.match(" ".join(text.lower().split()).rstrip("."))
    if match is None:
        raise AttnControlError(
            f"caption {text!r} is outside ShapeScenes' grammar: "
            "'a COLOUR SHAPE [RELATION a COLOUR SHAPE] [on a BACKGROUND background]' with "
            f"colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; "
            f"relations {', '.join(RELATIONS)}, and; backgrounds {', '.join(BACKGROUNDS)}"
        )
    c1, s1, relation, c2, s2, background = match.groups()
    objects = ((c1, s1),) if c2 is None else ((c1, s1), (c2, s2))
    return CaptionSpec(objects, None if relation == "and" else relation, background)


def caption_of(spec: CaptionSpec) -> str:
    """The caption that `parse_caption` reads back into the same spec."""
    text = f" {spec.relation or 'and'} ".join(f"a {c} {s}" for c, s in spec.objects)
    return text + (f" on a {spec.background} background" if spec.background else "")


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points of the unit frame (u right, v down, both in [-1, 1]) a shape covers."""
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.92
    if shape == "triangle":
        return (v <= 0.9) & (np.abs(u) <= (v + 0.9) / 1.8)
    if shape == "cross":
        near, far = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
        return (near <= 0.36) & (far <= 1)
    if shape == "ring":
        r2 = u * u + v * v
        return (r2 <= 1) & (r2 >= 0.55**2)
    raise AttnControlError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def draw(scene: Scene) -> np.ndarray:
    """Draw a scene: uint8 (128, 128, 3) RGB, edges antialiased."""
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = scene.background_rgb
    for o in scene.objects:
        half = o.size / 2
        x0, x1 = max(int(o.x - half) - 1, 0), min(int(o.x + half) + 2, SIZE)
        y0, y1 = max(int(o.y - half) - 1, 0), min(int(o.y + half) + 2, SIZE)
        xs = x0 + (np.arange((x1 - x0) * _SUPER) + 0.5) / _SUPER
        ys = y0 + (np.arange((y1 - y0) * _SUPER) + 0.5) / _SUPER
        cover = inside(o.shape, ((xs - o.x) / half)[None, :], ((ys - o.y) / half)[:, None])
        patch = image[y0:y1, x0:x1]
        rgb = np.asarray(o.rgb, np.float32)
        if o.texture == "plain":
            patch += _mean(cover)[..., None] * (rgb - patch)
        else:
            second = dark(o.texture, (xs - o.phase[0])[None, :], (ys - o.phase[1])[:, None])
            shares = _mean(cover & ~second)[..., None], _mean(cover & second)[..., None]
            patch *= 1 - shares[0] - shares[1]
            patch += shares[0] * rgb + shares[1] * DARK * rgb
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _mean(fine: np.ndarray) -> np.ndarray:
    """The share of each pixel that a supersampled mask covers."""
    height, width = fine.shape
    cells = fine.reshape(height // _SUPER, _SUPER, width // _SUPER, _SUPER)
    return cells.mean((1, 3), dtype=np.float32)


def sample_scene(
    seed: int, pairs: tuple[tuple[str, str], ...] = SEEN_PAIRS, two: bool | None = None
) -> Scene:
    """A random scene, the same for the same seed.

    pairs: the (colour, shape) pairs it may use; the default leaves the held-out ones out.
    two: one object (False), two (True), or either (None; two objects in 65 % of scenes).
    """
    rng = np.random.default_rng([seed, 20261122])
    if two is None:
        two = rng.random() < 0.65
    chosen = rng.permutation(len(pairs))[: 2 if two else 1]
    relation = str(rng.choice(RELATIONS)) if two and rng.random() < 0.8 else None
    background = str(rng.choice(list(BACKGROUNDS)))
    spec = CaptionSpec(
        tuple(pairs[i] for i in chosen), relation, None if rng.random() < 0.15 else background
    )
    return place(spec, rng, background)


def place(spec: CaptionSpec, rng: np.random.Generator, background: str | None = None) -> Scene:
    """Lay out what a caption asks for: positions, sizes and slight colour jitter from `rng`."""
    background = background or spec.background or str(rng.choice(list(BACKGROUNDS)))
    while True:
        sizes = rng.uniform(34, 56, len(spec.objects))
        at = [rng.uniform(s / 2 + _GAP, SIZE - s / 2 - _GAP, 2) for s in sizes]
        if len(at) == 1 or _fits(at, sizes, spec.relation):
            break
    objects = tuple(
        SceneObject(c, s, float(p[0]), float(p[1]), float(d), jitter(COLOURS[c], rng))
        for (c, s), p, d in zip(spec.objects, at, sizes, strict=True)
    )
    return Scene(objects, background, jitter(BACKGROUNDS[background], rng, 5), caption_of(spec))


def _fits(at: list[np.ndarray], sizes: np.ndarray, relation: str | None) -> bool:
    dx, dy = at[1] - at[0]  # the second object as seen from the first
    if max(abs(dx), abs(dy)) < sizes.mean() + _GAP:
        return False
    side, other = {
        None: (max(abs(dx), abs(dy)), 0.0),
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    # 1.3: the relation is the picture's main direction, never a near diagonal.
    return side > 0 and side >= 1.3 * abs(other)


def jitter(
    rgb: tuple[int, int, int], rng: np.random.Generator, amount: float = 10
) -> tuple[float, float, float]:
    """A colour moved by up to `amount` a channel, within 0-255."""
    r, g, b = np.clip(np.asarray(rgb) + rng.uniform(-amount, amount, 3), 0, 255)
    return float(r), float(g), float(b)
