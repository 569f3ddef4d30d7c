"""How the prompt files were drawn: `python -m attn_control.zoo.prompts.make NAME > FILE`.

Kept for the record and for new models' prompts; the committed files are the truth and never change.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from attn_control.zoo import videos
from attn_control.zoo.scenes import (
    BACKGROUNDS,
    HELD_OUT,
    RELATIONS,
    SEEN_PAIRS,
    CaptionSpec,
    caption_of,
)  # fmt: skip
from attn_control.zoo.textures import TEXTURES, TexturedSpec, textured_caption


def make(seed: int = 2026) -> list[dict]:
    """100 one-object and 100 two-object prompts; 20 of each ask for a held-out pair."""
    rng = np.random.default_rng(seed)
    rows: list[dict] = []
    for objects in (1, 2):
        for split, count in (("seen", 80), ("heldout", 20)):
            known: set[str] = set()
            while len(known) < count:
                pairs = HELD_OUT if split == "heldout" else SEEN_PAIRS
                chosen = [pairs[len(known) % len(pairs)]]  # in turn: every pair takes part
                if objects == 2:
                    others = [p for p in SEEN_PAIRS if p != chosen[0]]
                    chosen.append(others[int(rng.integers(len(others)))])
                    rng.shuffle(chosen)
                related = objects == 2 and rng.random() < 0.85
                relation = str(rng.choice(RELATIONS)) if related else None
                ground = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.85 else None
                prompt = caption_of(CaptionSpec(tuple(map(tuple, chosen)), relation, ground))
                if prompt not in known:
                    known.add(prompt)
                    row = {"prompt": prompt, "objects": objects, "split": split}
                    rows.append({**row, "seed": 1000 + len(rows)})
    return rows


def make_flux(seed: int = 2027) -> list[dict]:
    """120 prompts that point to a reference (20 with two objects), 80 that name their textures.

    reference: None, or the texture and seed that `textures.reference_scene` draws it from. One in
    five prompts asks for a held-out pair; every texture takes part equally often.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict] = []
    for by_reference, objects, count in (
        (True, 1, 100),
        (True, 2, 20),
        (False, 1, 40),
        (False, 2, 40),
    ):
        known: set[tuple[str, str]] = set()
        while len(known) < count:
            i = len(known)
            held = i % 5 == 4
            pairs = HELD_OUT if held else SEEN_PAIRS
            chosen = [pairs[int(rng.integers(len(pairs)))]]
            if objects == 2:
                others = [p for p in SEEN_PAIRS if p != chosen[0]]
                chosen.append(others[int(rng.integers(len(others)))])
                rng.shuffle(chosen)
            related = objects == 2 and rng.random() < 0.85
            relation = str(rng.choice(RELATIONS)) if related else None
            ground = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.85 else None
            plain = CaptionSpec(tuple(map(tuple, chosen)), relation, ground)
            # Shifted by the turn of held-out pairs, so that these meet every texture too.
            texture = TEXTURES[(i + i // 5) % len(TEXTURES)]
            names: tuple[str | None, ...] = (None,) * objects
            if not by_reference:
                names = (texture, *(str(rng.choice(TEXTURES)) for _ in chosen[1:]))
            prompt = textured_caption(TexturedSpec(plain, names))
            if (prompt, texture) in known:
                continue
            known.add((prompt, texture))
            n = len(rows)
            reference = {"texture": texture, "seed": 5_000_000 + n} if by_reference else None
            row = {"prompt": prompt, "objects": objects, "split": "heldout" if held else "seen"}
            rows.append({**row, "seed": 1000 + n, "reference": reference})
    return rows


def make_wan(seed: int = 2028) -> list[dict]:
    """48 prompts with one moving object, 72 with a crossing; every direction equally often.

    One in five prompts asks for a held-out pair, as the mover.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict] = []
    for objects, count in ((1, 48), (2, 72)):
        known: set[str] = set()
        while len(known) < count:
            i = len(known)
            held = i % 5 == 4
            pairs = videos.HELD_OUT_PAIRS if held else videos.SEEN_PAIRS
            mover = pairs[int(rng.integers(len(pairs)))]
            others = [p for p in videos.SEEN_PAIRS if p[0] != mover[0]]
            still = others[int(rng.integers(len(others)))] if objects == 2 else None
            # Shifted by the turn of held-out pairs, so that these meet every direction too.
            direction = list(videos.DIRECTIONS)[(i + i // 20) % len(videos.DIRECTIONS)]
            how = videos.CROSSINGS[i // 4 % 2] if objects == 2 else None
            ground = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.85 else None
            spec = videos.VideoSpec(mover, direction, how, still, ground)
            prompt = videos.video_caption(spec)
            if prompt not in known:
                known.add(prompt)
                row = {"prompt": prompt, "objects": objects, "split": "heldout" if held else "seen"}
                rows.append({**row, "seed": 1000 + len(rows)})
    return rows


MAKERS = {"shapes-sd3": make, "shapes-flux": make_flux, "shapes-wan": make_wan}

if __name__ == "__main__":
    for row in MAKERS[sys.argv[1]]():
        print(json.dumps(row))
