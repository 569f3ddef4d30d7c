"""The positive control of a measurement: an effect of known size, planted in its own pictures.

A share of one variant's pictures is replaced by true drawings of their captions. The same scorer
and the same intervals then have to find it. The mirror of it: the untouched pictures, read back
from disk and scored anew, must differ from what was recorded by exactly nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.eval.suite import Planted
from attn_control.render.judge import judge
from attn_control.render.media import Made, read_media
from attn_control.render.prepare import Prepared
from attn_control.render.prompts import Key, Prompt
from attn_control.render.summary import interval_over_prompts

Row = dict[str, Any]


def planted_control(
    rows: dict[tuple[Key, int], Row],
    planted: Planted,
    prepared: Prepared,
    images: Path,
    units: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """What was planted, what was found, and whether that passes.

    units: what is redrawn for the interval, one a row; None: whole prompts.

    It passes when the found difference leaves zero out from below and its interval holds what was
    planted (the replaced pictures that had been wrong, as a share of all), and no picture's verdict
    changes when it is read back.
    """
    rng = np.random.default_rng(planted.seed)
    prompts = {prompt.key: prompt for prompt in prepared.prompts}
    keys = list(rows)
    count = max(1, round(planted.share * len(keys)))
    chosen = {keys[i] for i in rng.permutation(len(keys))[:count]}
    gains, changed, expected = [], 0, 0.0
    for key, seed in keys:
        row, prompt = rows[key, seed], prompts[key]
        was = bool(row["score"]["right"])
        frames = tuple(read_media(images / row["file"]))
        again = _is_right(prepared, Made(frames, "frames" in row), prompt)
        changed += again != was
        now = again
        if (key, seed) in chosen:
            expected += 1 - was
            now = _is_right(prepared, _truth(prepared.choice.name, prompt, seed), prompt)
        gains.append(float(now) - float(was))
    found = interval_over_prompts(gains, units or [key for key, _ in keys], least=-1)
    size = expected / len(keys)
    return {
        "variant": planted.variant,
        "replaced": count,
        "planted": round(size, 6),
        "found": {key: round(getattr(found, key), 6) for key in ("mean", "low", "high")},
        "changed_when_read_back": changed,
        "passed": found.low > 0 and found.low <= size <= found.high and changed == 0,
    }


def _is_right(prepared: Prepared, made: Made, prompt: Prompt) -> bool:
    score = judge(prepared.choice, made, prompt)
    if score is None:
        raise AttnControlError(f"the scorer cannot judge what was made of {prompt}")
    return bool(score["right"])


def _truth(model: str, prompt: Prompt, seed: int) -> Made:
    """A true drawing, or a true video, of a prompt; with the texture of its reference."""
    from PIL import Image

    texture = None if prompt.image is None else prompt.image.name
    drawn = zoo.draw_truth(model, prompt.text, seed, texture)
    is_video = drawn.ndim == 4
    frames = (Image.fromarray(frame) for frame in (drawn if is_video else [drawn]))
    return Made(tuple(frames), is_video)
