"""The texture scorer's own error: `python -m attn_control.zoo.texture_error [--vae FOLDER]`.

Right pictures must score right and references be read as what they are, both also after an
autoencoder's round trip (a model sees a reference through nothing else); other textures,
blank pictures and confused ones must not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from attn_control.zoo.patterns import TEXTURES
from attn_control.zoo.scenes import COLOURS, PAIRS, SIZE, Scene, draw
from attn_control.zoo.scorer_error import command, round_trip
from attn_control.zoo.texture_scorer import find_textured, score_textured
from attn_control.zoo.textures import parse_textured, sample_textured

_SEEDS = 9_000_000  # far from the training seeds


def _retextured(scene: Scene, pick: Callable[[str], str]) -> np.ndarray:
    objects = (dataclasses.replace(o, texture=pick(o.texture)) for o in scene.objects)
    return draw(dataclasses.replace(scene, objects=tuple(objects)))


def _other(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    return _retextured(scene, lambda own: str(rng.choice([t for t in TEXTURES if t != own])))


def _stripped(scene: Scene, rng: np.random.Generator) -> np.ndarray | None:
    if all(o.texture == "plain" for o in scene.objects):
        return None
    return _retextured(scene, lambda own: "plain")


def _blank(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    return draw(dataclasses.replace(scene, objects=()))


def _recoloured(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    colour = str(rng.choice([c for c in COLOURS if c != scene.objects[0].colour]))
    rgb = tuple(float(v) for v in COLOURS[colour])
    first = dataclasses.replace(scene.objects[0], colour=colour, rgb=rgb)
    return draw(dataclasses.replace(scene, objects=(first, *scene.objects[1:])))


def _noisy(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Speckles in the darker tone, rather than a texture."""
    image = _retextured(scene, lambda own: "plain").astype(np.float32)
    coarse = rng.random((SIZE // 4, SIZE // 4)).repeat(4, 0).repeat(4, 1) < 0.4
    off = np.linalg.norm(image - np.asarray(scene.background_rgb), axis=-1) > 60
    image[coarse & off] *= 0.5
    return image.astype(np.uint8)


WRONG: dict[str, Callable] = {
    "another texture": _other,
    "texture left out": _stripped,
    "blank": _blank,
    "another colour": _recoloured,
    "speckles": _noisy,
}


def measure(
    count: int = 400,
    sizes: tuple[int, ...] = (64, 128, 256),
    vae: Any = None,
    trip_only: bool = False,
) -> dict:
    """{picture kind: [number called right, number scored]}; all (colour, shape) pairs take part.

    trip_only: only what goes through the autoencoder.
    """
    import cv2

    rows: dict[str, list[int]] = {}

    def add(kind: str, right: bool) -> None:
        row = rows.setdefault(kind, [0, 0])
        row[0] += bool(right)
        row[1] += 1

    def judge(kind: str, image: np.ndarray, caption: str, texture: str) -> None:
        by_reference = parse_textured(caption).by_reference
        add(kind, score_textured(image, caption, texture if by_reference else None).right)

    pairs = [sample_textured(_SEEDS + i, pairs=PAIRS) for i in range(count)]
    for i, (scene, reference) in enumerate([] if trip_only else pairs):
        image, rng = draw(scene), np.random.default_rng([_SEEDS, i])
        texture = reference.objects[0].texture
        for side in sizes:
            way = cv2.INTER_AREA if side < SIZE else cv2.INTER_CUBIC
            resized = cv2.resize(image, (side, side), interpolation=way)
            judge(f"right, {side} px", resized, scene.caption, texture)
        for kind, make in WRONG.items():
            wrong = make(scene, rng)
            if wrong is not None:
                judge(f"wrong: {kind}", wrong, scene.caption, texture)
        add(
            "reference read right",
            [o.texture for o in find_textured(draw(reference))[1]] == [texture],
        )
    for i in range(0, count if vae is not None else 0, 50):
        batch = pairs[i : i + 50]
        targets, references = (round_trip(vae, [draw(p[n]) for p in batch]) for n in (0, 1))
        for (scene, reference), image, shown in zip(batch, targets, references, strict=True):
            texture = reference.objects[0].texture
            by_reference = parse_textured(scene.caption).by_reference
            score = score_textured(image, scene.caption, texture if by_reference else None)
            add("right, 128 px after the autoencoder", score.right)
            add("right, its textures after the autoencoder", score.texture)
            read = [o.texture for o in find_textured(shown)[1]]
            add("reference read right after the autoencoder", read == [texture])
    return rows


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command(__doc__, "texture_error", measure, (400, "scenes"), argv=argv)


if __name__ == "__main__":
    main()
