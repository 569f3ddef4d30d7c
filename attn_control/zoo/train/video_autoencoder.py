"""The autoencoder of shapes-wan: a small AutoencoderKLWan, 4 times down in space, twice in time.

17 frames of 128 px become latents (4, 9, 32, 32). It is trained on crops of 9 frames of 64 px: the
class works through a video in pieces of one frame, then four at a time, and 9 frames are three of
them. Only the means of its latents are used; their variance is held small.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import nn
from tqdm import tqdm

from attn_control.zoo.train import loop
from attn_control.zoo.train.common import generator
from attn_control.zoo.train.latents import Source

STAGES = ("autoencoder", "latents", "denoiser", "export")
SCENES, WIDTH = 6000, 8  # videos kept as latents; channels at full resolution
_STD = 0.9  # of the raw latents


def build(width: int = WIDTH) -> AutoencoderKLWan:
    """An untrained autoencoder with 4 latent channels."""
    return AutoencoderKLWan(
        base_dim=width, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        scale_factor_temporal=2, scale_factor_spatial=4,
    )  # fmt: skip


class Lesson:
    """Crops of videos, there and back through noisy latents."""

    def __init__(
        self, videos: np.ndarray, steps: int, width: int = WIDTH, batch: int = 4,
        crop: tuple[int, int] = (9, 64), init: Path | None = None,
    ):  # fmt: skip
        torch.manual_seed(1)
        self.settings = loop.Settings(steps=steps, peak=2e-3, warmup=50, decay=0.995)
        self.trainee = build(width) if init is None else load_vae(init).train()
        self.videos, self.batch, self.crop = videos, batch, crop

    def blocks(self) -> Iterable[nn.Module]:
        """Where Muon works: every kernel inside, not the first and last layers."""
        net = self.trainee
        return [net.encoder.down_blocks, net.encoder.mid_block,
                net.decoder.mid_block, net.decoder.up_blocks]  # fmt: skip

    def clips(self, step: int) -> torch.Tensor:
        """Crops float (batch, 3, frames, side, side) in [-1, 1]."""
        g = generator(self.settings.seed, step)
        (frames, side), (_, all_frames, height, width, _) = self.crop, self.videos.shape

        def below(count: int) -> int:
            return int(torch.randint(count, (), generator=g))

        rows = []
        for _ in range(self.batch):
            t, y, x = (below(n + 1) for n in (all_frames - frames, height - side, width - side))
            video = self.videos[below(len(self.videos))]
            rows.append(video[t : t + frames, y : y + side, x : x + side])
        x = torch.from_numpy(np.stack(rows)).permute(0, 4, 1, 2, 3)
        return x.float() / 127.5 - 1

    def loss(self, step: int) -> tuple[str, torch.Tensor]:
        """L1 + MSE + edge loss of the round trip; pulls latents to std 0.9, their variance down."""
        x, g = self.clips(step), generator(self.settings.seed + 1, step)
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.trainee.encode(x).latent_dist
            z = latents.mean
            strength = 0.2 * torch.rand(len(x), 1, 1, 1, 1, generator=g)
            y = self.trainee.decode(z + strength * torch.randn(z.shape, generator=g)).sample.float()
        z = z.float()
        off = y - x
        loss = off.abs().mean() + off.square().mean()
        for axis in (-1, -2, -3):
            loss = loss + 0.5 * off.diff(dim=axis).abs().mean()
        mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
        loss = loss + 0.05 * (mean.square().mean() + (std - _STD).square().mean())
        return "loss", loss + 0.1 * F.relu(z.abs() - 2.5).square().mean() + 1e-3 * (
            latents.logvar.float() + 6
        ).square().mean()


def videos(source: Source, count: int) -> np.ndarray:
    """Training videos from seed 0 on, uint8 (count, frames, 128, 128, 3)."""
    return np.stack([source(seed)[1][0] for seed in range(count)])


def train(
    folder: Path, steps: int, source: Source, *, width: int = WIDTH, count: int = 300,
    resume: bool = False, save_every: int = 100, init: Path | None = None,
) -> AutoencoderKLWan:  # fmt: skip
    """Train, keep `folder/autoencoder.pt` resumable, save the averaged weights to `folder/vae`."""
    rows = videos(source, min(count, 300))
    lesson = Lesson(rows, steps, width, init=init)
    loop.train(folder, lesson, name="autoencoder", resume=resume, save_every=save_every)
    vae = lesson.trainee
    loop.load_average(vae, loop.load(folder / "autoencoder.pt"))
    measure(vae.eval(), rows[:16])
    vae.save_pretrained(folder / "vae")
    return vae


@torch.no_grad()
def measure(vae: AutoencoderKLWan, rows: np.ndarray) -> None:
    """Write each latent channel's mean and standard deviation into the configuration."""
    z = torch.cat([_means(vae, row[None]) for row in tqdm(rows, desc="measure")])
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in mean.tolist()],
        latents_std=[round(v, 5) for v in std.tolist()],
    )


def _means(vae: AutoencoderKLWan, rows: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(rows).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    return vae.encode(x).latent_dist.mode()


def load_vae(folder: Path) -> AutoencoderKLWan:
    """The trained autoencoder of a data folder."""
    return AutoencoderKLWan.from_pretrained(folder / "vae").eval()


@torch.no_grad()
def encode(vae: AutoencoderKLWan, rows: np.ndarray) -> np.ndarray:
    """Videos uint8 (count, frames, 128, 128, 3) to latents float16, mean 0 and std 1 a channel."""
    mean, std = (
        torch.tensor(vae.config[f"latents_{k}"]).view(1, -1, 1, 1, 1) for k in ("mean", "std")
    )
    with torch.autocast("cpu", torch.bfloat16):
        z = torch.cat([_means(vae, row[None]).float() for row in rows])
    return ((z - mean) / std).half().numpy()
