"""MovingShapes: a shape that moves across the picture, perhaps behind or in front of a still one.

>>> parse_video("a red circle moves right behind a blue square").crossing
'behind'
>>> sample_video(3).caption == sample_video(3).caption
True
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from attn_control.errors import AttnControlError
from attn_control.zoo.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    SIZE,
    Scene,
    SceneObject,
    draw,
    jitter,
)

FRAMES = 17  # 9 latent frames of a video autoencoder that halves time
SHAPES = ("circle", "square", "triangle", "cross")  # a ring this small is too thin to judge
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
CROSSINGS = ("behind", "in front of")
PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES)
SEEN_PAIRS = tuple(p for p in PAIRS if p not in HELD_OUT)
HELD_OUT_PAIRS = tuple(p for p in PAIRS if p in HELD_OUT)

_GAP = 5.0  # least free space between two objects at both ends, and to the frame (pixels)

_OBJECT = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"^{_OBJECT} moves ({'|'.join(DIRECTIONS)})(?: ({'|'.join(CROSSINGS)}) {_OBJECT})?"
    rf"(?: on a ({'|'.join(BACKGROUNDS)}) background)?$"
)


@dataclass(frozen=True)
class VideoSpec:
    """What a caption asks for: the mover, its direction, perhaps what it crosses and how."""

    mover: tuple[str, str]  # (colour, shape)
    direction: str
    crossing: str | None = None  # "behind" | "in front of" | None
    still: tuple[str, str] | None = None
    background: str | None = None


@dataclass(frozen=True)
class Video:
    """A video to draw: one Scene a frame, what is in front last, with its caption."""

    scenes: tuple[Scene, ...]
    caption: str


def parse_video(text: str) -> VideoSpec:
    """Read a caption; case and runs of spaces do not matter. Raises AttnControlError outside it."""
    if not isinstance(text, str):
        raise AttnControlError(f"a caption is a string, got {type(text).__name__}")
    match = _CAPTION.match(" ".join(text.lower().split()).rstrip("."))
    c1, s1, direction, crossing, c2, s2, ground = match.groups() if match else (None,) * 7
    if match is None or c1 == c2:
        raise AttnControlError(
            f"caption {text!r} is outside MovingShapes' grammar: "
            "'a COLOUR SHAPE moves DIRECTION [behind|in front of a COLOUR SHAPE] "
            "[on a BACKGROUND background]', the two in different colours, with "
            f"colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; "
            f"directions {', '.join(DIRECTIONS)}; backgrounds {', '.join(BACKGROUNDS)}"
        )
    still = None if c2 is None else (c2, s2)
    return VideoSpec((c1, s1), direction, crossing, still, ground)


def video_caption(spec: VideoSpec) -> str:
    """The caption that `parse_video` reads back into the same spec."""
    text = f"a {' '.join(spec.mover)} moves {spec.direction}"
    if spec.still is not None:
        text += f" {spec.crossing} a {' '.join(spec.still)}"
    return text + (f" on a {spec.background} background" if spec.background else "")


def draw_video(video: Video) -> np.ndarray:
    """Draw every frame: uint8 (frames, 128, 128, 3) RGB."""
    return np.stack([draw(scene) for scene in video.scenes])


def place_video(
    spec: VideoSpec, rng: np.random.Generator, background: str | None = None, frames: int = FRAMES
) -> Video:
    """Lay out what a caption asks for: path, sizes and slight colour jitter from `rng`.

    The mover goes straight and evenly over at least 55 % of the side. Where it crosses something,
    that lies on its path, clear of it in the first and in the last frame.
    """
    ground = background or spec.background or str(rng.choice(list(BACKGROUNDS)))
    along = np.array(DIRECTIONS[spec.direction], float)
    across = np.abs(along[::-1])
    while True:
        size, other = rng.uniform(28, 40, 2) if spec.still is None else rng.uniform(26, 36, 2)
        low, high = size / 2 + _GAP, SIZE - size / 2 - _GAP
        start, end = rng.uniform(low, low + 14), rng.uniform(high - 14, high)
        lane = rng.uniform(low, high)
        if end - start < 0.55 * SIZE:
            continue
        if spec.still is None:
            break
        middle = rng.uniform(start, end)
        off = lane + rng.uniform(-0.25, 0.25) * other
        clear = (size + other) / 2 + _GAP
        inside = other / 2 + _GAP <= off <= SIZE - other / 2 - _GAP
        if inside and middle - start >= clear and end - middle >= clear:
            break

    # `start` to `end` runs along the direction: turned round for left and up.
    def at(way: float, side: float) -> np.ndarray:
        forward = way if along.sum() > 0 else SIZE - way
        return forward * np.abs(along) + side * across

    def thing(pair: tuple[str, str], extent: float, rgb: tuple, xy: np.ndarray) -> SceneObject:
        return SceneObject(*pair, float(xy[0]), float(xy[1]), float(extent), rgb)

    rgb = jitter(COLOURS[spec.mover[0]], rng)
    still = []
    if spec.still is not None:
        still = [thing(spec.still, other, jitter(COLOURS[spec.still[0]], rng), at(middle, off))]
    ground_rgb = jitter(BACKGROUNDS[ground], rng, 5)
    caption, scenes = video_caption(spec), []
    for i in range(frames):
        way = start + (end - start) * i / (frames - 1)
        mover = thing(spec.mover, size, rgb, at(way, lane))
        order = [mover, *still] if spec.crossing == "behind" else [*still, mover]
        scenes.append(Scene(tuple(order), ground, ground_rgb, caption))
    return Video(tuple(scenes), caption)


def sample_video(
    seed: int,
    pairs: tuple[tuple[str, str], ...] = SEEN_PAIRS,
    crossing: bool | None = None,
    frames: int = FRAMES,
) -> Video:
    """A random video, the same for the same seed; with a crossing in 60 % unless `crossing` says.

    pairs: the (colour, shape) pairs it may use; the default leaves the held-out ones out. frames:
    over how many the same way is spread.
    """
    rng = np.random.default_rng([seed, 20261125])
    if crossing is None:
        crossing = bool(rng.random() < 0.6)
    mover = pairs[int(rng.integers(len(pairs)))]
    others = [p for p in pairs if p[0] != mover[0]]
    still = others[int(rng.integers(len(others)))] if crossing else None
    how = str(rng.choice(CROSSINGS)) if crossing else None
    direction, ground = str(rng.choice(list(DIRECTIONS))), str(rng.choice(list(BACKGROUNDS)))
    said = None if rng.random() < 0.15 else ground
    return place_video(VideoSpec(mover, direction, how, still, said), rng, ground, frames)
