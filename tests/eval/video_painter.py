"""A video pipeline that paints by the zoo's own brush, right or wrong by the seed.

In a module of its own: what a pipeline makes is read off the output classes beside it.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from PIL import Image

from attn_control import zoo


@dataclass
class Frames(BaseOutput):
    """Makes `VideoPainter` a video pipeline."""

    frames: Any


class VideoPainter:
    """Answers a prompt of shapes-wan rightly, or blank from some frame on, or backwards."""

    scheduler = types.SimpleNamespace()

    def set_progress_bar_config(self, **_):
        pass

    def __call__(
        self, prompt=None, height=128, width=128, num_frames=17, num_inference_steps=2,
        guidance_scale=1.0, negative_prompt=None, generator=None, output_type="pil",
        max_sequence_length=24,
    ):  # fmt: skip
        seed = generator.initial_seed()
        frames = [Image.fromarray(f) for f in zoo.draw_truth("shapes-wan", prompt, seed)]
        if backwards(seed):
            frames = frames[::-1]
        none = empty(seed, prompt)
        frames[:none] = [Image.new("RGB", (128, 128), (9, 9, 9))] * none
        return Frames(frames=[frames])


def backwards(seed):
    return seed // 10 % 3 != 1


def empty(seed, prompt):
    """Frames without anything, at the start: the way that remains is long enough."""
    return 3 if seed // 10 % 2 and "behind" not in prompt and "in front" not in prompt else 0
