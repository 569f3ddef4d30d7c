"""Scenes as latents on disk: `latents.npy` float16 (count, 4, 32, 32), unit std, and `ids.npy`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from tqdm import tqdm

from attn_control.zoo.scenes import draw, sample_scene
from attn_control.zoo.train.text import LENGTH, build_tokenizer, tokenize


@torch.no_grad()
def encode_part(work: Path, count: int, part: int, parts: int, batch: int = 50) -> None:
    """Write the part-th of `parts` equal runs of scenes; parts may run as separate processes."""
    vae = AutoencoderTiny.from_pretrained(work / "vae").eval()
    tokenizer = build_tokenizer()
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    first, last = count * part // parts, count * (part + 1) // parts
    latents = np.empty((last - first, 4, 32, 32), np.float16)
    ids = np.empty((last - first, LENGTH), np.int16)
    for i in tqdm(range(first, last, batch), desc=f"latents {part + 1}/{parts}"):
        # Seeds 0 .. count: the autoencoder saw the first few thousand of them too.
        scenes = [sample_scene(seed) for seed in range(i, min(i + batch, last))]
        x = torch.from_numpy(np.stack([draw(s) for s in scenes])).permute(0, 3, 1, 2)
        z = (vae.encode(x.float() / 127.5 - 1).latents - shift) * scale
        here = slice(i - first, i - first + len(scenes))
        latents[here] = z.numpy()
        ids[here] = tokenize(tokenizer, [s.caption for s in scenes]).numpy()
    np.save(work / f"latents-{part}.npy", latents)
    np.save(work / f"ids-{part}.npy", ids)


def load_latents(work: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All parts on disk: latents float16 (count, 4, 32, 32), ids int64 (count, 16)."""
    parts = sorted(work.glob("latents-*.npy"), key=lambda p: int(p.stem.split("-")[1]))
    if not parts:
        raise FileNotFoundError(f"no latents in {work}; run the stage 'latents' first")
    latents = np.concatenate([np.load(p) for p in parts])
    ids = np.concatenate([np.load(p.with_name(p.name.replace("latents", "ids"))) for p in parts])
    return torch.from_numpy(latents), torch.from_numpy(ids).long()
