"""The video scorer's own error: `python -m attn_control.zoo.video_error [--vae FOLDER]`.

Right videos must score right, also after a video autoencoder's round trip; videos that run
backwards, stand still, show another object or turn front and back round must not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from attn_control.zoo.scenes import BACKGROUNDS, COLOURS
from attn_control.zoo.scorer_error import command
from attn_control.zoo.video_scorer import score_video
from attn_control.zoo.videos import (
    DIRECTIONS,
    PAIRS,
    SHAPES,
    Video,
    VideoSpec,
    draw_video,
    parse_video,
    place_video,
    sample_video,
)

_SEEDS = 9_000_000  # far from the training seeds


def _other(value: str | None, options: Any, rng: np.random.Generator) -> str:
    return str(rng.choice([o for o in options if o != value]))


def _edit(change: Callable[[VideoSpec, np.random.Generator], VideoSpec | None]) -> Callable:
    """Draw another caption's video: `change` returns the spec to draw, None where it cannot."""

    def make(video: Video, rng: np.random.Generator) -> np.ndarray | None:
        spec = change(parse_video(video.caption), rng)
        ground = video.scenes[0].background
        return (
            None if spec is None else draw_video(place_video(spec, rng, spec.background or ground))
        )

    return make


def _turned(spec: VideoSpec, rng: np.random.Generator) -> VideoSpec:
    return dataclasses.replace(spec, direction=_other(spec.direction, list(DIRECTIONS), rng))


def _recoloured(spec: VideoSpec, rng: np.random.Generator) -> VideoSpec:
    used = (spec.mover[0], spec.still[0] if spec.still else None)
    colour = str(rng.choice([c for c in COLOURS if c not in used]))
    return dataclasses.replace(spec, mover=(colour, spec.mover[1]))


def _reshaped(spec: VideoSpec, rng: np.random.Generator) -> VideoSpec:
    return dataclasses.replace(spec, mover=(spec.mover[0], _other(spec.mover[1], SHAPES, rng)))


def _ground(spec: VideoSpec, rng: np.random.Generator) -> VideoSpec | None:
    if spec.background is None:
        return None
    return dataclasses.replace(spec, background=_other(spec.background, list(BACKGROUNDS), rng))


def _inside_out(spec: VideoSpec, rng: np.random.Generator) -> VideoSpec | None:
    if spec.crossing is None:
        return None
    return dataclasses.replace(
        spec, crossing="in front of" if spec.crossing == "behind" else "behind"
    )


def _roles(spec: VideoSpec, rng: np.random.Generator) -> VideoSpec | None:
    if spec.still is None:
        return None
    return dataclasses.replace(spec, mover=spec.still, still=spec.mover)


def _alone(spec: VideoSpec, rng: np.random.Generator) -> VideoSpec | None:
    return None if spec.still is None else dataclasses.replace(spec, still=None, crossing=None)


def _half(video: Video) -> np.ndarray | None:
    """A crossing that only begins: the mover has not passed when the video ends."""
    if parse_video(video.caption).still is None:
        return None
    return draw_video(video)[np.arange(len(video.scenes)) * 2 // 5]


WRONG: dict[str, Callable] = {
    "backwards": lambda video, rng: draw_video(video)[::-1],
    "standing still": lambda video, rng: draw_video(video)[[0] * len(video.scenes)],
    "frames shuffled": lambda video, rng: draw_video(video)[rng.permutation(len(video.scenes))],
    "stops in the middle": lambda video, rng: _half(video),
    "blank": lambda video, rng: np.full_like(draw_video(video), video.scenes[0].background_rgb[0]),
    "another direction": _edit(_turned),
    "another colour": _edit(_recoloured),
    "another shape": _edit(_reshaped),
    "another background": _edit(_ground),
    "front and back exchanged": _edit(_inside_out),
    "the still one moves instead": _edit(_roles),
    "the still one missing": _edit(_alone),
}


def measure(count: int = 200, vae: Any = None, trip_only: bool = False) -> dict[str, list[int]]:
    """{video kind: [number called right, number scored]}; all (colour, shape) pairs take part.

    Of right videos after the round trip also each part of the score by itself, since the model is
    held to them apart; of frames, all frames are counted. trip_only: only these.
    """
    rows: dict[str, list[int]] = {}

    def count_in(kind: str, hits: int, total: int = 1) -> None:
        row = rows.setdefault(kind, [0, 0])
        row[0] += hits
        row[1] += total

    def add(kind: str, frames: np.ndarray, caption: str) -> None:
        count_in(kind, score_video(frames, caption).right)

    def add_parts(kind: str, frames: np.ndarray, caption: str) -> None:
        score = score_video(frames, caption)
        count_in(kind, score.right)
        count_in(f"{kind}: frames", round(score.frames * len(frames)), len(frames))
        count_in(f"{kind}: direction", score.direction)
        if parse_video(caption).crossing is not None:
            count_in(f"{kind}: crossing", score.crossing)

    for i in range(count):
        video, rng = sample_video(_SEEDS + i, PAIRS), np.random.default_rng([_SEEDS, i])
        frames = draw_video(video)
        if vae is not None:
            add_parts("right, after the autoencoder", round_trip(vae, frames), video.caption)
        if trip_only:
            continue
        add("right", frames, video.caption)
        for kind, make in WRONG.items():
            wrong = make(video, rng)
            if wrong is not None:
                add(f"wrong: {kind}", wrong, video.caption)
    return rows


def round_trip(vae: Any, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 (frames, H, W, 3) after encoding and decoding."""
    import torch

    x = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample[0]
    return ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command(__doc__, "video_error", measure, (200, "videos"), "AutoencoderKLWan", argv=argv)


if __name__ == "__main__":
    main()
