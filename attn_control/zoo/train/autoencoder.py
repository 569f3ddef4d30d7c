"""The autoencoder of the picture models: 128 px to 32x32x4 latents and back, also noisy ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from tqdm import tqdm

from attn_control.zoo.train.common import Average, Log, generator, learning_rate, load, save
from attn_control.zoo.train.latents import Source, plain

STAGES = ("autoencoder", "latents", "denoiser", "decoder", "export")
SCENES, WIDTH = 120_000, 32  # scenes kept as latents; channels of every layer
_STD = 0.9  # of the raw latents: below the decoder's clamp at +-3


def build(width: int = 24) -> AutoencoderTiny:
    """An untrained autoencoder, 4 x down, 4 latent channels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * 3,
        decoder_block_out_channels=(width,) * 3,
        num_encoder_blocks=(0, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=4,
    )


def pictures(count: int, source: Source = plain) -> torch.Tensor:
    """Training targets from seed 0 on, uint8 (count, 3, 128, 128)."""
    images = [source(seed)[1][0] for seed in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def loss_of(vae: AutoencoderTiny, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """L1 + MSE + edge loss of a round trip through noisy latents; pulls latents to std 0.9.

    x float (batch, 3, height, width) in [-1, 1]; noise the same shape as the latents, or a scalar.
    """
    z = vae.encoder(x)
    y = vae.decoder(z + noise).float()
    z = z.float()
    off = y - x
    loss = off.abs().mean() + off.square().mean()
    for axis in (-1, -2):
        loss = loss + 0.5 * off.diff(dim=axis).abs().mean()
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    wide = F.relu(z.abs() - 2.2).square().mean()
    return loss + 0.05 * (mean.square().mean() + (std - _STD).square().mean()) + 0.1 * wide


def train(
    work: Path,
    steps: int,
    source: Source = plain,
    *,
    batch: int = 16,
    count: int = 8000,
    peak: float = 2e-3,
    seed: int = 1,
    resume: bool = False,
    width: int = WIDTH,
    init: Path | None = None,
) -> AutoencoderTiny:
    """Train, keep `work/autoencoder.pt` resumable, save the averaged weights to `work/vae`.

    init: a data folder whose autoencoder to start from.
    """
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    vae = build(width) if init is None else load_vae(init)
    vae = vae.to(memory_format=torch.channels_last)
    average = Average(vae, 0.995)
    opt = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-3)
    first, file = 0, work / "autoencoder.pt"
    if resume and file.is_file():
        state = load(file)
        vae.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        average.load(state["average"])
        first = state["step"]
    data = pictures(count, source)
    log = Log(work / "autoencoder.jsonl", 50)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="autoencoder")
    for step in bar:
        g = generator(seed, step)
        x = data[torch.randint(count, (batch,), generator=g)].float() / 127.5 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        side = x.shape[-1] // 4
        strength = 0.25 * torch.rand(batch, 1, 1, 1, generator=g)
        noise = strength * torch.randn(batch, 4, side, side, generator=g)
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, steps, peak, 100)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(vae, x, noise)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        average.update()
        if line := log.add(step, loss=loss.item()):
            bar.set_postfix(loss=line["loss"])
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {"model": vae.state_dict(), "optimizer": opt.state_dict()}
            save({**state, "average": average.state(), "step": step + 1}, file)
            average.swap()
            measure(vae, data[:256])
            vae.save_pretrained(work / "vae")
            average.swap()
    return vae


def corner_weights(x: torch.Tensor) -> torch.Tensor:
    """Pixel weights (batch, 1, height, width): high at corners, where a pixel is most unlike those
    around it, and relative to the contrast nearby."""
    around = F.avg_pool2d(x, 9, 1, 4, count_include_pad=False)
    unlike = (x - around).abs().amax(1, keepdim=True)
    most = F.max_pool2d(unlike[..., ::2, ::2], 17, 1, 8).repeat_interleave(2, -1)
    most = most.repeat_interleave(2, -2)
    return (1 + 10 * (unlike / (most + 0.05)) ** 3) / (most + 0.3)


def refine_decoder(
    work: Path,
    steps: int,
    source: Source = plain,
    *,
    batch: int = 16,
    count: int = 8000,
    peak: float = 1e-3,
    seed: int = 2,
    resume: bool = False,
) -> None:
    """Train only the decoder on, the latents staying as they are: `work/vae` to `work/vae-refined`.

    The loss stresses what the first training rounds off: the corners of triangles, crosses and
    squares, as much for purple on gray as for yellow on black.
    """
    file, out, first = work / "decoder.pt", work / "vae-refined", 0
    vae = AutoencoderTiny.from_pretrained(work / "vae").to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    average = Average(vae.decoder, 0.998)
    opt = torch.optim.AdamW(vae.decoder.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-3)
    if resume and file.is_file():
        state = load(file)
        vae.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        average.load(state["average"])
        first = state["step"]
    data = pictures(count, source)
    log = Log(work / "decoder.jsonl", 50)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="decoder", mininterval=5)
    for step in bar:
        g = generator(seed, step)
        x = data[torch.randint(count, (batch,), generator=g)].float() / 127.5 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, steps, peak, 100)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = vae.encoder(x)
            strength = 0.2 * torch.rand(batch, 1, 1, 1, generator=g)
            y = vae.decoder(z + strength * torch.randn(z.shape, generator=g)).float()
        w, off = corner_weights(x), y - x
        loss = (w * (off.abs() + 2 * off.square())).mean()
        for axis in (-1, -2):
            loss = loss + 0.5 * off.diff(dim=axis).abs().mean()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        opt.step()
        average.update()
        log.add(step, loss=loss.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"model": vae.state_dict(), "optimizer": opt.state_dict()}
            save({**state, "average": average.state(), "step": step + 1}, file)
            average.swap()
            vae.save_pretrained(out)
            average.swap()


def load_vae(folder: Path) -> AutoencoderTiny:
    """The autoencoder of a data folder, with the decoder that was trained on where there is one."""
    refined = folder / "vae-refined"
    return AutoencoderTiny.from_pretrained(refined if refined.is_dir() else folder / "vae").eval()


@torch.no_grad()
def encode(vae: AutoencoderTiny, pictures: np.ndarray) -> np.ndarray:
    """Pictures uint8 (count, 128, 128, 3) to latents float16 (count, 4, 32, 32), mean 0, std 1."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    z = (vae.encode(x).latents - vae.config.shift_factor) * vae.config.scaling_factor
    return z.half().numpy()


@torch.no_grad()
def measure(vae: AutoencoderTiny, data: torch.Tensor) -> None:
    """Set the scaling and shift factors so that (z - shift) * scale has mean 0 and std 1."""
    z = vae.encode(data.float() / 127.5 - 1).latents
    scale, shift = 1 / z.std().item(), z.mean().item()
    vae.register_to_config(scaling_factor=round(scale, 5), shift_factor=round(shift, 5))
