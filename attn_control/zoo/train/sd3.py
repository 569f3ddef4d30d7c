"""shapes-sd3: a joint text-image transformer with two text encoders, trained by flow matching.

Most steps go through the coarse door (64 tokens, large batches), every `fine_every`-th at the
shipped resolution (256 tokens), and the last part only there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import nn

from attn_control.zoo.train import flow, loop, quick
from attn_control.zoo.train import sd3_model as door
from attn_control.zoo.train.autoencoder import load_vae
from attn_control.zoo.train.latents import Latents, chances, pick
from attn_control.zoo.train.text import (
    build_encoder,
    build_silent_t5,
    build_tokenizer,
    encode,
    tokenize,
)

SHIFT = 2.0  # of the sampler's times


@dataclass(frozen=True, kw_only=True)
class Settings(flow.Settings):
    """Everything that shapes a run."""

    coarse_batch: int = 64
    fine_batch: int = 16
    fine_every: int = 5
    fine_from: float = 0.8  # share of the steps after which all are fine
    zeros: float = 0.12  # last part: share of steps with 256 (2 of 3) or no zero tokens, not one
    single: float = 1.0  # how much likelier than one of two objects a one-object scene is drawn
    hard: float = 1.0  # the same for scenes with a ring or a cross: the shapes learnt last
    width: int = 128
    layers: int = 6


class Trainee(nn.Module):
    """All that is trained: denoiser, its coarse door and the text encoders."""

    def __init__(self, s: Settings):
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.denoiser = door.build(s.width, s.layers)
        self.coarse = door.Coarse(s.width)
        self.encoders = nn.ModuleList([build_encoder(self.tokenizer) for _ in range(2)])


def _losses(
    trainee: Trainee,
    fine: bool,
    x: torch.Tensor,
    t: torch.Tensor,
    states: torch.Tensor,
    pooled: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    coarse = None if fine else trainee.coarse
    out = door.velocity(trainee.denoiser, x, t * 1000, states, pooled, coarse)
    return F.mse_loss(out.float(), target)


class Lesson(flow.Lesson):
    """Plain scenes, by flow matching."""

    def __init__(self, s: Settings, data: Latents):
        torch.manual_seed(s.seed)
        self.settings, self.data = s, data
        self.trainee = Trainee(s)
        tokenizer = self.trainee.tokenizer
        self.ids = tokenize(tokenizer, data.captions)
        self.empty = tokenize(tokenizer, [""])[0]
        self.chance = chances(data.captions, s.single, s.hard)
        self.losses = quick.compiled(_losses) if s.compile else _losses

    def blocks(self) -> Iterable[nn.Module]:
        """Where Muon works."""
        return [self.trainee.denoiser.transformer_blocks]

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The examples, times and noise of one step."""
        s, g, size = self.settings, self.generator(step), self.size(step)
        at = pick(self.chance, size, g)
        words = self.ids[at].clone()
        words[self.dropped(size, g)] = self.empty
        out = self.noisy(self.data.targets[at].float(), g)
        # Zero tokens where T5's would be: one by default, as in the model's own call.
        zeros, toss = 1, float(torch.rand((), generator=g))
        if step >= s.fine_from * s.steps and toss < s.zeros:
            zeros = 256 if toss < s.zeros * 2 / 3 else 0
        return {**out, "ids": words, "zeros": torch.tensor(zeros)}

    def loss(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Mean squared error of the velocity; the kinds of steps are logged apart."""
        b, fine = self.batch(step), self.is_fine(step)
        x, target = self.mixed(b)
        zeros = int(b["zeros"])
        with torch.autocast("cpu", torch.bfloat16):
            states, pooled = encode(self.trainee.encoders, b["ids"])
            states = F.pad(states, (0, 0, 0, zeros))
            # Other counts than one are too rare to be worth compiled graphs of their own.
            run = self.losses if zeros == 1 else _losses
            loss = run(self.trainee, fine, x, b["t"], states, pooled, target)
        kind = f"zeros{zeros}" if zeros != 1 else "fine" if fine else "coarse"
        return {kind: loss}, loss


def pipeline(work: Path, data: Path) -> StableDiffusion3Pipeline:
    """The pipeline with the averaged weights of `work/denoiser.pt`, float32."""
    trainee = loop.averaged(work, Settings, Trainee)
    t5, t5_tokenizer = build_silent_t5()
    return StableDiffusion3Pipeline(
        transformer=trainee.denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=load_vae(data),
        text_encoder=trainee.encoders[0],
        tokenizer=trainee.tokenizer,
        text_encoder_2=trainee.encoders[1],
        tokenizer_2=trainee.tokenizer,
        text_encoder_3=t5.eval(),
        tokenizer_3=t5_tokenizer,
    )
