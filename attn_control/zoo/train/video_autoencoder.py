"""The autoencoder of shapes-wan: a small AutoencoderKLWan, 4 times down in space, twice in time.

17 frames of 128 px become latents (4, 9, 32, 32). It learns in two parts. First single frames: many
different ones a step, without which it finds no use for colour. Then crops of all 17 frames, from
weights that treat every frame as the first part did: its layers look far back in time, and a
decoder that had seen shorter videos only would drift off later in one. Only the means of its
latents are used; their variance is held small. Its decoder alone is trained on afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample
from torch import nn
from tqdm import tqdm

from attn_control.zoo.train import loop
from attn_control.zoo.train.autoencoder import corner_weights
from attn_control.zoo.train.common import generator
from attn_control.zoo.train.latents import Source

STAGES = ("autoencoder", "latents", "denoiser", "decoder", "export")
SCENES, WIDTH = 6000, 8  # videos kept as latents; channels at full resolution
_STD = 0.9  # of the raw latents
TRIES = 4  # crops of which the one that shows most is taken: most of a video is background


def build(width: int = WIDTH) -> AutoencoderKLWan:
    """An untrained autoencoder with 4 latent channels."""
    return AutoencoderKLWan(
        base_dim=width, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        scale_factor_temporal=2, scale_factor_spatial=4,
    )  # fmt: skip


@torch.no_grad()
def inflate(vae: AutoencoderKLWan) -> None:
    """Make every layer treat each frame as it treats a single one: what it takes from frames before
    is nothing, and of the two frames that become one latent the second counts and is shown twice.
    """
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.weight.shape[2] > 1:
            module.weight[:, :, :-1] = 0
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            weight = module.time_conv.weight
            one = torch.eye(weight.shape[1]).repeat(len(weight) // weight.shape[1], 1)
            weight[:, :, -1, 0, 0] = one
            module.time_conv.bias.zero_()


class Lesson:
    """Crops of single frames, later of videos, there and back through noisy latents."""

    def __init__(
        self, videos: np.ndarray, steps: int, width: int = WIDTH, side: int = 48,
        batches: tuple[int, int] = (32, 4), init: Path | None = None,
    ):  # fmt: skip
        torch.manual_seed(1)
        self.settings = loop.Settings(steps=steps, peak=2e-3, warmup=50, decay=0.995)
        self.trainee = build(width) if init is None else load_vae(init).train()
        self.videos, self.batches, self.side = videos, batches, side
        self.singles = steps // 2 if init is None else -1  # steps of single frames, first

    def blocks(self) -> Iterable[nn.Module]:
        """Where Muon works: every kernel inside, not the first and last layers."""
        net = self.trainee
        return [net.encoder.down_blocks, net.encoder.mid_block,
                net.decoder.mid_block, net.decoder.up_blocks]  # fmt: skip

    def begin(self) -> None:
        """Nothing comes before the first step."""

    def clips(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops float (batch, 3, frames, side, side) in [-1, 1], and where they are no background,
        float (batch, 1, frames, side, side) of 0 and 1.
        """
        g, side = generator(self.settings.seed, step), self.side
        _, all_frames, height, width, _ = self.videos.shape
        frames, batch = (
            (1, self.batches[0]) if step < self.singles else (all_frames, self.batches[1])
        )

        def below(count: int) -> int:
            return int(torch.randint(count, (), generator=g))

        rows, shown = [], []
        for _ in range(batch):
            video = self.videos[below(len(self.videos))]
            other = (video != video[0, 0, 0]).any(-1)  # a corner is always background
            tries = []
            for _ in range(TRIES):
                t, y, x = (below(n + 1) for n in (all_frames - frames, height - side, width - side))
                tries.append((slice(t, t + frames), slice(y, y + side), slice(x, x + side)))
            best = max(tries, key=lambda at: int(other[at].sum()))
            rows.append(video[best])
            shown.append(other[best])
        x = torch.from_numpy(np.stack(rows)).permute(0, 4, 1, 2, 3)
        return x.float() / 127.5 - 1, torch.from_numpy(np.stack(shown)).float()[:, None]

    def loss(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """L1 + MSE + edge loss of the round trip, objects weighing as much as all background; pulls
        latents to std 0.9, their variance down.
        """
        if step == self.singles:
            inflate(self.trainee)
        (x, shown), g = self.clips(step), generator(self.settings.seed + 1, step)
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.trainee.encode(x).latent_dist
            z = latents.mean
            strength = 0.2 * torch.rand(len(x), 1, 1, 1, 1, generator=g)
            y = self.trainee.decode(z + strength * torch.randn(z.shape, generator=g)).sample.float()
        z = z.float()
        off = y - x
        weight = 0.5 + 0.5 * shown / shown.mean().clamp(min=0.02)
        loss = (weight * (off.abs() + off.square())).mean()
        for axis in (-1, -2, -3) if x.shape[2] > 1 else (-1, -2):
            loss = loss + 0.5 * off.diff(dim=axis).abs().mean()
        mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
        loss = loss + 0.05 * (mean.square().mean() + (std - _STD).square().mean())
        loss = loss + 0.1 * F.relu(z.abs() - 2.5).square().mean()
        loss = loss + 1e-3 * (latents.logvar.float() + 6).square().mean()
        return {"loss": loss}, loss


class DecoderLesson(Lesson):
    """The way back alone, the latents staying as they are: all frames, corners above all."""

    def __init__(self, videos: np.ndarray, steps: int, vae: Path, **options: Any):
        super().__init__(videos, steps, init=vae, **options)
        self.settings = replace(self.settings, seed=2, peak=1.5e-3, decay=0.998)
        for part in (self.trainee.encoder, self.trainee.quant_conv):
            part.requires_grad_(False)

    def blocks(self) -> Iterable[nn.Module]:
        """Where Muon works."""
        return [self.trainee.decoder.mid_block, self.trainee.decoder.up_blocks]

    def loss(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """L1 + MSE + edge loss; half of its weight lies on objects, and more on their corners."""
        (x, shown), g = self.clips(step), generator(self.settings.seed + 1, step)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = self.trainee.encode(x).latent_dist.mean
            strength = 0.15 * torch.rand(len(x), 1, 1, 1, 1, generator=g)
            y = self.trainee.decode(z + strength * torch.randn(z.shape, generator=g)).sample.float()
        off = y - x
        corners = corner_weights(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1))
        weight = 0.5 * corners.transpose(1, 2) + 0.5 * shown / shown.mean().clamp(min=0.02)
        loss = (weight * (off.abs() + 2 * off.square())).mean()
        for axis in (-1, -2, -3):
            loss = loss + 0.5 * off.diff(dim=axis).abs().mean()
        return {"loss": loss}, loss


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


def refine_decoder(
    folder: Path, steps: int, source: Source, *, count: int = 300, resume: bool = False,
    save_every: int = 100,
) -> None:  # fmt: skip
    """Train only the decoder on: `folder/vae` to `folder/vae-refined`; keeps `decoder.pt`."""
    lesson = DecoderLesson(videos(source, min(count, 300)), steps, folder)
    loop.train(folder, lesson, name="decoder", resume=resume, save_every=save_every)
    loop.load_average(lesson.trainee, loop.load(folder / "decoder.pt"))
    lesson.trainee.eval().save_pretrained(folder / "vae-refined")


def load_vae(folder: Path) -> AutoencoderKLWan:
    """The autoencoder of a data folder, with the decoder that was trained on where there is one."""
    refined = folder / "vae-refined"
    return AutoencoderKLWan.from_pretrained(refined if refined.is_dir() else folder / "vae").eval()


@torch.no_grad()
def encode(vae: AutoencoderKLWan, rows: np.ndarray) -> np.ndarray:
    """Videos uint8 (count, frames, 128, 128, 3) to latents float16, mean 0 and std 1 a channel."""
    mean, std = (
        torch.tensor(vae.config[f"latents_{k}"]).view(1, -1, 1, 1, 1) for k in ("mean", "std")
    )
    with torch.autocast("cpu", torch.bfloat16):
        z = torch.cat([_means(vae, row[None]).float() for row in rows])
    return ((z - mean) / std).half().numpy()
