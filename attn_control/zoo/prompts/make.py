"""How `shapes-sd3.jsonl` was drawn: `python -m attn_control.zoo.prompts.make > FILE`.

Kept for the record and for new models' prompts; the committed file is the truth and never changes.
"""

from __future__ import annotations

import json

import numpy as np

from attn_control.zoo.scenes import (
    BACKGROUNDS,
    HELD_OUT,
    RELATIONS,
    SEEN_PAIRS,
    CaptionSpec,
    caption_of,
)  # fmt: skip


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


if __name__ == "__main__":
    for row in make():
        print(json.dumps(row))
