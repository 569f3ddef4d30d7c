"""Scenes as latents on disk, unit std, and how often a step draws which of them.

`latents-I.npy` float16 (count, 4, 32, 32), for videos (count, 4, 9, 32, 32); for models that look
at a reference picture also `references-I.npy`, alike; `captions-I.json`. Captions lie there as
text, never as a tokenizer's numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from attn_control.errors import AttnControlError
from attn_control.zoo.scenes import SHAPES, draw, sample_scene

# From a seed to a caption and its pictures uint8 (128, 128, 3), or videos uint8 (17, 128, 128, 3):
# the target, perhaps a reference.
Source = Callable[[int], tuple[str, list[np.ndarray]]]


@dataclass(frozen=True)
class Latents:
    """Examples: latents float16, references None for models without, and captions."""

    targets: torch.Tensor
    captions: list[str]
    references: torch.Tensor | None = None


def plain(seed: int) -> tuple[str, list[np.ndarray]]:
    """A scene of ShapeScenes: caption and picture."""
    scene = sample_scene(seed)
    return scene.caption, [draw(scene)]


def encode_part(
    folder: Path,
    source: Source,
    encode: Callable[[np.ndarray], np.ndarray],
    count: int,
    part: int,
    parts: int,
    batch: int = 50,
) -> None:
    """Write the part-th of `parts` equal runs of scenes; parts may run as separate processes.

    encode: an autoencoder's way from stacked pictures (or videos) uint8 to latents float16.
    """
    first, last = count * part // parts, count * (part + 1) // parts
    latents: dict[int, list[np.ndarray]] = {}
    captions = []
    for i in tqdm(range(first, last, batch), desc=f"latents {part + 1}/{parts}"):
        # Seeds 0 .. count: the autoencoder saw the first few thousand of them too.
        rows = [source(seed) for seed in range(i, min(i + batch, last))]
        captions += [caption for caption, _ in rows]
        for kind in range(len(rows[0][1])):
            pictures = np.stack([pictures[kind] for _, pictures in rows])
            latents.setdefault(kind, []).append(encode(pictures))
    for kind, rows_of_kind in latents.items():
        name = ("latents", "references")[kind]
        np.save(folder / f"{name}-{part}.npy", np.concatenate(rows_of_kind))
    (folder / f"captions-{part}.json").write_text(json.dumps(captions))


def load_latents(folder: Path) -> Latents:
    """All parts on disk, in order. Raises AttnControlError where there are none."""
    parts = sorted(folder.glob("latents-*.npy"), key=lambda p: int(p.stem.split("-")[1]))
    if not parts:
        raise AttnControlError(f"no latents in {folder}: run the stage 'latents', or name --data")

    def both(name: str) -> list[Path]:
        return [part.with_name(part.name.replace("latents", name)) for part in parts]

    captions: list[str] = []
    for file in both("captions"):
        captions += json.loads(file.with_suffix(".json").read_text())
    targets = torch.from_numpy(np.concatenate([np.load(p) for p in parts]))
    references = None
    if both("references")[0].is_file():
        arrays = [np.load(p) for p in both("references")]
        references = torch.from_numpy(np.concatenate(arrays))
    if len(captions) != len(targets):
        raise AttnControlError(f"{folder} holds {len(targets)} latents, {len(captions)} captions")
    return Latents(targets, captions, references)


def chances(
    captions: list[str],
    single: float = 1.0,
    hard: float = 1.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cumulative chance of each scene, float64 (count,), last value 1; all equal by default.

    single: how much likelier a one-object scene is than one of two; hard: one with a ring or cross;
    weights: of each scene besides, (count,).
    """
    weights = torch.ones(len(captions)) if weights is None else weights
    weights = weights.double().clone()
    for i, caption in enumerate(captions):
        words = caption.split()
        if sum(word in SHAPES for word in words) == 1:
            weights[i] *= single
        if "ring" in words or "cross" in words:
            weights[i] *= hard
    total = weights.cumsum(0)
    return total / total[-1]


def pick(chance: torch.Tensor, size: int, g: torch.Generator) -> torch.Tensor:
    """Indices int64 (size,) of the scenes of one step, drawn by `chances`."""
    at = torch.rand(size, generator=g, dtype=torch.float64)
    return torch.searchsorted(chance, at).clamp_(max=len(chance) - 1)
