"""The positive control of a measurement: an effect of known size, planted in its own pictures.

A share of one variant's pictures is replaced by true drawings of their captions. The same scorer
and the same intervals then have to find it. The mirror of it: the untouched pictures, read back
from disk and scored anew, must differ from what was recorded by exactly nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from attn_control import zoo
from attn_control.eval.suite import Planted
from attn_control.render.summary import interval_over_prompts

Row = dict[str, Any]


def planted_control(
    rows: dict[tuple[str, int], Row], planted: Planted, model: str, images: Path
) -> dict[str, Any]:
    """What was planted, what was found, and whether that passes.

    It passes when the found difference leaves zero out from below and its interval holds what was
    planted (the replaced pictures that had been wrong, as a share of all), and no picture's verdict
    changes when it is read back.
    """
    from PIL import Image

    rng = np.random.default_rng(planted.seed)
    keys = list(rows)
    count = max(1, round(planted.share * len(keys)))
    chosen = {keys[i] for i in rng.permutation(len(keys))[:count]}
    gains, changed, expected = [], 0, 0.0
    for prompt, seed in keys:
        was = bool(rows[prompt, seed]["score"]["right"])
        with Image.open(images / rows[prompt, seed]["file"]) as picture:
            again = zoo.score(model, picture.convert("RGB"), prompt).right
        changed += again != was
        if (prompt, seed) in chosen:
            expected += 1 - was
            now = zoo.score(model, zoo.draw_truth(model, prompt, seed), prompt).right
        else:
            now = again
        gains.append(float(now) - float(was))
    found = interval_over_prompts(gains, [prompt for prompt, _ in keys], least=-1)
    size = expected / len(keys)
    return {
        "variant": planted.variant,
        "replaced": count,
        "planted": round(size, 6),
        "found": {key: round(getattr(found, key), 6) for key in ("mean", "low", "high")},
        "changed_when_read_back": changed,
        "passed": found.low > 0 and found.low <= size <= found.high and changed == 0,
    }
