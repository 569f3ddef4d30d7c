"""The scorer's own error: `python -m attn_control.zoo.scorer_error [--vae FOLDER]`.

Right pictures must score right (with and without an autoencoder's round trip); pictures that are
blank, swapped, reversed, of another shape, short of or beyond what the caption says must not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from attn_control.zoo.scenes import (
    BACKGROUNDS,
    COLOURS,
    PAIRS,
    SHAPES,
    SIZE,
    CaptionSpec,
    Scene,
    draw,
    parse_caption,
    place,
    sample_scene,
)  # fmt: skip
from attn_control.zoo.scorer import score

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_CORNERS = {"diamond": 4, "pentagon": 5, "hexagon": 6, "star": 10, "flipped triangle": 3}
_SEEDS = 9_000_000  # far from the training seeds


def _other(value: str, options: Any, rng: np.random.Generator) -> str:
    return str(rng.choice([o for o in options if o != value]))


def _blank(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    return draw(dataclasses.replace(scene, objects=()))


def _missing(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    return draw(dataclasses.replace(scene, objects=scene.objects[1:]))


def _edit(change: Callable[[CaptionSpec, np.random.Generator], CaptionSpec | None]) -> Callable:
    """Draw another caption's picture: `change` returns the spec to draw, None where it cannot."""

    def make(scene: Scene, rng: np.random.Generator) -> np.ndarray | None:
        spec = change(parse_caption(scene.caption), rng)
        return None if spec is None else draw(place(spec, rng, spec.background or scene.background))

    return make


def _swap(spec: CaptionSpec, rng: np.random.Generator) -> CaptionSpec | None:
    if len(spec.objects) < 2 or len({c for c, _ in spec.objects}) < 2:
        return None
    (c1, s1), (c2, s2) = spec.objects
    # With one shape on both sides, swapped colours only show through the relation.
    if s1 == s2 and spec.relation is None:
        return None
    return dataclasses.replace(spec, objects=((c2, s1), (c1, s2)))


def _reverse(spec: CaptionSpec, rng: np.random.Generator) -> CaptionSpec | None:
    if spec.relation is None:
        return None
    return dataclasses.replace(spec, relation=_OPPOSITE[spec.relation])


def _wrong(i: int, options: Any) -> Callable:
    def change(spec: CaptionSpec, rng: np.random.Generator) -> CaptionSpec:
        pair = list(spec.objects[0])
        pair[i] = _other(pair[i], options, rng)
        rest = tuple(o for o in spec.objects[1:] if o != tuple(pair))
        rest = rest or tuple(((c, s)) for c, s in spec.objects[1:])
        return dataclasses.replace(spec, objects=(tuple(pair), *rest))

    return change


def _ground(spec: CaptionSpec, rng: np.random.Generator) -> CaptionSpec | None:
    if spec.background is None:
        return None
    return dataclasses.replace(spec, background=_other(spec.background, list(BACKGROUNDS), rng))


def _extra(spec: CaptionSpec, rng: np.random.Generator) -> CaptionSpec | None:
    if len(spec.objects) > 1:
        return None
    more = PAIRS[int(rng.integers(len(PAIRS)))]
    return dataclasses.replace(spec, objects=(*spec.objects, more))


def _alien(name: str) -> Callable:
    """Every object's place filled with a shape that no caption knows."""

    def make(scene: Scene, rng: np.random.Generator) -> np.ndarray:
        import cv2

        image = draw(dataclasses.replace(scene, objects=()))
        for o in scene.objects:
            at, half = np.array([o.x, o.y]), o.size / 2
            if name == "ellipse":
                centre, axes = (round(o.x), round(o.y)), (round(half), round(half / 2))
                cv2.ellipse(image, centre, axes, 0, 0, 360, o.rgb, -1, cv2.LINE_AA)
                continue
            points = _CORNERS[name]
            turn = np.pi / 2 if name == "flipped triangle" else -np.pi / 2
            angle = turn + 2 * np.pi * np.arange(points) / points
            radius = np.where(np.arange(points) % 2, 0.45, 1.0) if name == "star" else 1.0
            spokes = np.stack([np.cos(angle), np.sin(angle)], -1)
            xy = at + half * spokes * np.reshape(radius, (-1, 1))
            cv2.fillPoly(image, [np.round(xy * 16).astype(np.int32)], o.rgb, cv2.LINE_AA, 4)
        return image

    return make


WRONG: dict[str, Callable] = {
    "blank": _blank,
    "one object missing": _missing,
    "colours swapped": _edit(_swap),
    "relation reversed": _edit(_reverse),
    "another shape": _edit(_wrong(1, SHAPES)),
    "another colour": _edit(_wrong(0, list(COLOURS))),
    "another background": _edit(_ground),
    "one object too many": _edit(_extra),
    "alien: diamond": _alien("diamond"),
    "alien: star": _alien("star"),
    "alien: ellipse 2:1": _alien("ellipse"),
    "alien: flipped triangle": _alien("flipped triangle"),
    "alien: pentagon": _alien("pentagon"),
    "alien: hexagon": _alien("hexagon"),
}


def measure(
    count: int = 2000,
    sizes: tuple[int, ...] = (64, 128, 256),
    vae: Any = None,
    trip_only: bool = False,
) -> dict:
    """{picture kind: [number called right, number scored]}; all (colour, shape) pairs take part.

    trip_only: only what goes through the autoencoder.
    """
    import cv2

    rows: dict[str, list[int]] = {}

    def add(kind: str, image: np.ndarray, caption: str) -> None:
        row = rows.setdefault(kind, [0, 0])
        row[0] += score(image, caption).right
        row[1] += 1

    scenes = [sample_scene(_SEEDS + i, PAIRS) for i in range(count)]
    for i, scene in enumerate([] if trip_only else scenes):
        image, rng = draw(scene), np.random.default_rng([_SEEDS, i])
        for side in sizes:
            way = cv2.INTER_AREA if side < SIZE else cv2.INTER_CUBIC
            resized = cv2.resize(image, (side, side), interpolation=way)
            add(f"right, {side} px", resized, scene.caption)
        for kind, make in WRONG.items():
            wrong = make(scene, rng)
            if wrong is not None:
                add(f"wrong: {kind}", wrong, scene.caption)
    if vae is not None:
        for i in range(0, count, 50):
            batch = scenes[i : i + 50]
            for scene, image in zip(batch, round_trip(vae, [draw(s) for s in batch]), strict=True):
                add("right, 128 px after the autoencoder", image, scene.caption)
    return rows


def round_trip(vae: Any, images: list[np.ndarray]) -> np.ndarray:
    """Pictures uint8 (count, H, W, 3) after encoding and decoding."""
    import torch

    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latents).sample
    return ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def command(
    description: str | None,
    module: str,
    measure: Callable[..., dict[str, list[int]]],
    count: tuple[int, str],
    autoencoder: str = "AutoencoderTiny",
    argv: list[str] | None = None,
) -> None:
    """The command line of a scorer's error: measures, prints, and keeps the counts if asked.

    measure: takes `count`, `vae` and `trip_only`; count: its default, and what is counted;
    autoencoder: the diffusers class of the round trip's.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m attn_control.zoo.{module}", description=description
    )
    number, things = count
    parser.add_argument("--count", type=int, default=number, help=f"{things} (default {number})")
    parser.add_argument("--vae", type=Path, help="folder of an autoencoder for the round trip")
    parser.add_argument("--trip-only", action="store_true", help="leave out what needs no --vae")
    parser.add_argument("--json", type=Path, help="also write the counts here")
    args = parser.parse_args(argv)
    if args.trip_only and not args.vae:
        parser.error("--trip-only needs --vae")
    vae = None
    if args.vae:
        import diffusers

        vae = getattr(diffusers, autoencoder).from_pretrained(args.vae).float().eval()
    rows = measure(args.count, vae=vae, trip_only=args.trip_only)
    for kind, (hits, total) in sorted(rows.items()):
        print(f"{kind:45s} called right {hits:5d} of {total:5d}  {100 * hits / total:6.2f} %")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command(__doc__, "scorer_error", measure, (2000, "scenes"), argv=argv)


if __name__ == "__main__":
    main()
