"""Textures on the shapes: their patterns, captions that name one or point to a reference picture.

>>> parse_textured("a striped red circle above a blue ring").textures
('striped', 'plain')
>>> parse_textured("a red circle with the texture of the reference").textures
(None,)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from attn_control.errors import AttnControlError
from attn_control.zoo.patterns import PERIOD, TEXTURES
from attn_control.zoo.scenes import (
    BACKGROUNDS,
    COLOURS,
    PAIRS,
    RELATIONS,
    SEEN_PAIRS,
    SHAPES,
    CaptionSpec,
    Scene,
    caption_of,
    parse_caption,
    place,
)

REFERENCE = " with the texture of the reference"
_WORDS = re.compile(rf"\ba ({'|'.join(TEXTURES[1:])}) (?=(?:{'|'.join(COLOURS)}) )")


@dataclass(frozen=True)
class TexturedSpec:
    """What a caption asks for; `textures` one an object, None where the reference decides."""

    plain: CaptionSpec  # colours, shapes, relation, background
    textures: tuple[str | None, ...]

    @property
    def by_reference(self) -> bool:
        """Whether the caption points to a reference picture."""
        return None in self.textures


def parse_textured(text: str) -> TexturedSpec:
    """Read a caption of ShapeScenes with textures. Raises AttnControlError outside the grammar."""
    if not isinstance(text, str):
        raise AttnControlError(f"a caption is a string, got {type(text).__name__}")
    words = " ".join(text.lower().split()).rstrip(".")
    bare = words.replace(REFERENCE, "", 1)
    try:
        plain = parse_caption(_WORDS.sub("a ", bare))
    except AttnControlError as error:
        raise _outside(text) from error
    if bare != words:
        spec = TexturedSpec(plain, (None,) * len(plain.objects))
    else:
        found = re.findall(rf"\ba (?:({'|'.join(TEXTURES[1:])}) )?(?:{'|'.join(COLOURS)}) ", bare)
        spec = TexturedSpec(plain, tuple(texture or "plain" for texture in found))
    if textured_caption(spec) != words:  # the phrase in another place, or besides texture words
        raise _outside(text)
    return spec


def textured_caption(spec: TexturedSpec) -> str:
    """The caption that `parse_textured` reads back into the same spec."""
    text, ground = caption_of(replace(spec.plain, background=None)), spec.plain.background
    if spec.by_reference:
        text += REFERENCE
    else:
        parts = text.split("a ")[1:]  # no word of the grammar ends in "a"
        words = ("" if t == "plain" else f"{t} " for t in spec.textures)
        text = "".join(f"a {word}{part}" for word, part in zip(words, parts, strict=True))
    return text + (f" on a {ground} background" if ground else "")


def place_textured(
    spec: TexturedSpec, rng: np.random.Generator, texture: str | None = None
) -> Scene:
    """Lay out what a caption asks for; `texture` stands in where the reference decides."""
    scene = place(spec.plain, rng)
    objects = []
    for o, own in zip(scene.objects, spec.textures, strict=True):
        phase = rng.uniform(0, PERIOD, 2)
        name = own or texture
        if name is None:
            raise AttnControlError("this caption needs the reference's texture to be drawn")
        objects.append(replace(o, texture=name, phase=(float(phase[0]), float(phase[1]))))
    return replace(scene, objects=tuple(objects), caption=textured_caption(spec))


def reference_scene(texture: str, seed: int) -> Scene:
    """The picture that a caption points to: one object of any colour and shape, of that texture."""
    rng = np.random.default_rng([seed, 20261123])
    pair = PAIRS[int(rng.integers(len(PAIRS)))]
    return place_textured(TexturedSpec(CaptionSpec((pair,), None, None), (texture,)), rng)


def sample_textured(
    seed: int,
    by_reference: bool | None = None,
    pairs: tuple[tuple[str, str], ...] = SEEN_PAIRS,
) -> tuple[Scene, Scene]:
    """A random target and its reference, the same for the same seed; two objects in 40 %.

    by_reference: whether the caption points to the reference; None: in 2 of 3 seeds. Where it names
    the textures itself (plain in 30 %), the reference is a picture that it says nothing about.
    """
    rng = np.random.default_rng([seed, 20261124])
    if by_reference is None:
        by_reference = seed % 3 < 2
    chosen = rng.permutation(len(pairs))[: 2 if rng.random() < 0.4 else 1]
    related = len(chosen) == 2 and rng.random() < 0.8
    relation = str(rng.choice(RELATIONS)) if related else None
    ground = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.85 else None
    plain = CaptionSpec(tuple(pairs[i] for i in chosen), relation, ground)
    texture = str(rng.choice(TEXTURES))
    names: list[str | None] = [None] * len(chosen)
    if not by_reference:
        named = list(TEXTURES[1:])
        names = ["plain" if rng.random() < 0.3 else str(rng.choice(named)) for _ in chosen]
    target = place_textured(TexturedSpec(plain, tuple(names)), rng, texture)
    return target, reference_scene(texture, seed)


def _outside(text: str) -> AttnControlError:
    return AttnControlError(
        f"caption {text!r} is outside the grammar of shapes-flux: "
        "'a [TEXTURE] COLOUR SHAPE [RELATION a [TEXTURE] COLOUR SHAPE] [on a BACKGROUND "
        "background]', or without TEXTURE words and with 'with the texture of the reference' "
        f"before the background; textures {', '.join(TEXTURES[1:])}; colours {', '.join(COLOURS)}; "
        f"shapes {', '.join(SHAPES)}; relations {', '.join(RELATIONS)}, and; "
        f"backgrounds {', '.join(BACKGROUNDS)}"
    )
