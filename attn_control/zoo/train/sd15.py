"""shapes-sd15: a UNet with cross-attention at 16 and 8 cells a side, trained by v-prediction.

Zero terminal SNR (arXiv 2305.08891): the first step of sampling sees pure noise, as in training,
so that black and white backgrounds come out as they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextModel

from attn_control.zoo.train import loop
from attn_control.zoo.train.autoencoder import load_vae
from attn_control.zoo.train.common import generator
from attn_control.zoo.train.latents import Latents, chances, pick
from attn_control.zoo.train.text import WIDTH, build_encoder, build_tokenizer, tokenize


@dataclass(frozen=True, kw_only=True)
class Settings(loop.Settings):
    """Everything that shapes a run."""

    batch: int = 32
    drop: float = 0.1  # captions emptied, for classifier-free guidance
    single: float = 1.5  # how much likelier than one of two objects a one-object scene is drawn
    hard: float = 1.4  # the same for scenes with a ring or a cross: the shapes learnt last
    lean: float = 1.0  # times are 1 - (1 - u)^lean: above 1 more noise, where the layout is decided
    widths: tuple[int, ...] = (32, 96, 128)


def scheduler() -> DDIMScheduler:
    """The noise schedule of training and sampling."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )  # fmt: skip


def build(widths: tuple[int, ...] = (32, 96, 128)) -> UNet2DConditionModel:
    """An untrained UNet for (batch, 4, 32, 32): heads of 32 channels, none at the first level."""
    levels = len(widths) - 1
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=widths,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * levels),
        up_block_types=(*["CrossAttnUpBlock2D"] * levels, "UpBlock2D"),
        layers_per_block=1, norm_num_groups=16, cross_attention_dim=WIDTH,
        attention_head_dim=tuple(max(w // 32, 1) for w in widths),  # diffusers: heads, not dims
    )  # fmt: skip
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


class Trainee(nn.Module):
    """All that is trained: the UNet and its text encoder."""

    def __init__(self, s: Settings):
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.denoiser = build(tuple(s.widths))
        # On a CPU the flash kernel's backward takes twice as long as the plain formula.
        self.denoiser.set_attn_processor(AttnProcessor())
        self.encoder = build_encoder(self.tokenizer, CLIPTextModel)


class Lesson:
    """Plain scenes, by v-prediction."""

    def __init__(self, s: Settings, data: Latents):
        torch.manual_seed(s.seed)
        self.settings, self.data = s, data
        self.trainee = Trainee(s)
        tokenizer = self.trainee.tokenizer
        self.ids = tokenize(tokenizer, data.captions)
        self.empty = tokenize(tokenizer, [""])[0]
        self.chance = chances(data.captions, s.single, s.hard)
        self.scheduler = scheduler()

    def blocks(self) -> Iterable[nn.Module]:
        """Where Muon works."""
        net = self.trainee.denoiser
        return [net.down_blocks, net.mid_block, net.up_blocks]

    def begin(self) -> None:
        """Nothing comes before the first step."""

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The examples, times and noise of one step."""
        s, g = self.settings, generator(self.settings.seed, step)
        at = pick(self.chance, s.batch, g)
        words = self.ids[at].clone()
        words[torch.rand(s.batch, generator=g) < s.drop] = self.empty
        x0 = self.data.targets[at].float()
        # Stratified: one time from each of `batch` equal slices.
        u = (torch.arange(s.batch) + torch.rand(s.batch, generator=g)) / s.batch
        times = self.scheduler.config.num_train_timesteps
        return {
            "x0": x0,
            "ids": words,
            # Leaning, u near 1 rounds to 1: there is no time after the last.
            "t": ((1 - (1 - u) ** s.lean) * times).long().clamp(max=times - 1),
            "noise": torch.randn(x0.shape, generator=g),
        }

    def loss(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Mean squared error of the velocity."""
        b = self.batch(step)
        x = self.scheduler.add_noise(b["x0"], b["noise"], b["t"])
        target = self.scheduler.get_velocity(b["x0"], b["noise"], b["t"])
        with torch.autocast("cpu", torch.bfloat16):
            states = self.trainee.encoder(b["ids"])[0]
            out = self.trainee.denoiser(x, b["t"], states, return_dict=False)[0]
        loss = F.mse_loss(out.float(), target)
        return {"loss": loss}, loss


def pipeline(work: Path, data: Path) -> StableDiffusionPipeline:
    """The pipeline with the averaged weights of `work/denoiser.pt`, float32."""
    trainee = loop.averaged(work, Settings, Trainee)
    return StableDiffusionPipeline(
        vae=load_vae(data),
        text_encoder=trainee.encoder,
        tokenizer=trainee.tokenizer,
        unet=trainee.denoiser,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
