"""shapes-flux: double and single blocks with RoPE, trained by flow matching, often with a reference
picture's tokens after the target's (Kontext's order), whose texture the target is to show.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from attn_control.zoo.patterns import TEXTURES
from attn_control.zoo.scenes import draw
from attn_control.zoo.textures import REFERENCE, sample_textured
from attn_control.zoo.train import flow, loop, quick, reading, seeing
from attn_control.zoo.train import flux_model as door
from attn_control.zoo.train.autoencoder import load_vae
from attn_control.zoo.train.latents import Latents, chances, pick
from attn_control.zoo.train.text import (
    WIDTH,
    build_encoder,
    build_t5_tokenizer,
    build_tokenizer,
    tokenize,
    words,
)

LENGTH = 24  # tokens of both tokenizers; the longest caption takes 22 with CLIP's two marks
SHIFT = 2.0  # of the sampler's times
PATCH = 2  # cells a side of a token at the shipped size
CHECKED = 1 + TEXTURES.index("checked")  # as `LABELS` has it
NEAR = 4.0  # what a neighbour's score begins with, so that it takes most of a head's attention


def SOURCE(seed: int) -> tuple[str, list[np.ndarray]]:
    """A textured scene: caption, target and reference."""
    target, reference = sample_textured(seed)
    return target.caption, [draw(target), draw(reference)]


def LABELS(seed: int) -> dict[str, np.ndarray]:
    """What the cells of a scene and of its reference show: (2, 32, 32), and things (2, 3, 3)."""
    both = sample_textured(seed)
    textures = [[1 + TEXTURES.index(o.texture) for o in scene.objects] for scene in both]
    things = [seeing.things(*pair) for pair in zip(both, textures, strict=True)]
    return {
        "cells": np.stack([seeing.cells(scene) for scene in both]),
        "things": np.stack(things),
        "tones": np.stack([seeing.tones(scene) for scene in both]),
    }


@dataclass(frozen=True, kw_only=True)
class Settings(flow.TellingSettings):
    """Everything that shapes a run."""

    coarse_batch: int = 48
    fine_batch: int = 12
    fine_every: int = 5
    fine_from: float = 0.75  # share of the steps after which all are fine
    reference: float = 0.7  # share of steps whose captions point to a reference
    single: float = 1.5  # how much likelier than one of two objects a one-object scene is drawn
    hard: float = 1.4  # the same for scenes with a ring or a cross: the shapes learnt last
    checked: float = 1.0  # the same for scenes with checks, the texture learnt last
    width: int = 128
    layers: tuple[int, ...] = (2, 6)  # double blocks, single blocks


def vocabulary() -> list[str]:
    """Every word that a caption of this model can hold."""
    return sorted({*words(), *TEXTURES[1:], *REFERENCE.split()})


def build_t5(count: int) -> T5EncoderModel:
    """An untrained two-layer T5 encoder of width 64 for `count` words."""
    config = T5Config(
        vocab_size=count, d_model=WIDTH, d_kv=16, num_heads=4, d_ff=4 * WIDTH, num_layers=2,
        relative_attention_num_buckets=16, relative_attention_max_distance=32, dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    encoder = T5EncoderModel(config)
    look_around(encoder)
    return encoder


@torch.no_grad()
def look_around(encoder: T5EncoderModel) -> None:
    """Let heads begin by reading the words around: the one before, the one behind, the two further
    before. Left to itself an encoder this small stays a bag of words for 12,000 steps: it paints
    "left of" as "right of", and one object's texture on the other.
    """
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    behind = bias.shape[0] // 2  # buckets of words behind; one each for the nearest
    bias.zero_()
    for head, buckets in enumerate(((1,), (behind + 1,), (2, 3))):
        bias[list(buckets), head] = NEAR


class Trainee(nn.Module):
    """All that is trained: denoiser, its coarse door, the text encoders, and what asks them."""

    def __init__(self, s: Settings):
        super().__init__()
        self.tokenizer = build_tokenizer(vocabulary(), LENGTH)
        self.t5_tokenizer = build_t5_tokenizer(vocabulary(), LENGTH)
        self.denoiser = door.build(s.width, tuple(s.layers))
        self.coarse = door.Coarse(s.width)
        self.encoder = build_encoder(self.tokenizer, CLIPTextModel)
        self.t5 = build_t5(len(self.t5_tokenizer))
        self.reader = reading.Reader(reading.TEXTURED, WIDTH)
        self.seer = seeing.Seer(seeing.TEXTURED, s.width, toned=PATCH**2)


def _losses(
    trainee: Trainee,
    fine: bool,
    x: torch.Tensor,
    t: torch.Tensor,
    states: torch.Tensor,
    pooled: torch.Tensor,
    reference: torch.Tensor | None,
    target: torch.Tensor,
    seen: torch.Tensor | None,
    shares: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    coarse = None if fine else trainee.coarse
    tap: list[torch.Tensor] = []
    out = door.velocity(trainee.denoiser, x, t, states, pooled, reference, coarse, tap)
    loss = F.mse_loss(out.float(), target)
    if seen is None:
        return loss, None
    see = trainee.seer.loss(tap[0], seen)
    if shares is not None:
        see = see + trainee.seer.tone_loss(tap[0], shares)
    return loss, see


class Lesson(flow.Lesson):
    """Textured scenes; a step is with references or without, and at one size of patches."""

    def __init__(self, s: Settings, data: Latents, seen: seeing.Seen | None = None):
        torch.manual_seed(s.seed)
        self.settings, self.data, self.seen = s, data, seen
        self.trainee = Trainee(s)
        self.reading = reading.read(data.captions, reading.textured_facts, reading.TEXTURED, LENGTH)
        self.tokenizers = self.trainee.tokenizer, self.trainee.t5_tokenizer
        self.ids = [tokenize(t, data.captions) for t in self.tokenizers]
        self.empty = [tokenize(t, [""])[0] for t in self.tokenizers]
        # Which scenes point to their reference, and the chance of each within its kind.
        pointing = torch.tensor([REFERENCE in caption for caption in data.captions])
        self.kinds = [(~pointing).nonzero()[:, 0], pointing.nonzero()[:, 0]]
        weights = torch.ones(len(data.captions))
        if seen is not None:
            weights[(seen.things[:, 0, 1:, 2] == CHECKED).any(-1)] = s.checked
        self.chances = [
            chances([data.captions[i] for i in kind.tolist()], s.single, s.hard, weights[kind])
            for kind in self.kinds
        ]
        self.losses = quick.compiled(_losses) if s.compile else _losses

    def blocks(self) -> Iterable[nn.Module]:
        """Where Muon works."""
        net = self.trainee.denoiser
        return [net.transformer_blocks, net.single_transformer_blocks]

    def begin(self) -> None:
        """The T5 learns to read before the first picture."""
        t5, steps = self.trainee.t5, self.settings.read_first
        right = reading.learn(
            lambda ids: t5(ids)[0], self.trainee.reader, list(t5.parameters()), self.ids[1],
            self.reading, steps=steps,
        )  # fmt: skip
        print(f"words told right: {right:.1%}")

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The examples, times and noise of one step; "reference" only where captions point."""
        g, size = self.generator(step), self.size(step)
        pointing = int(torch.rand((), generator=g) < self.settings.reference)
        at = self.kinds[pointing][pick(self.chances[pointing], size, g)]
        dropped = self.dropped(size, g)
        out = self.noisy(self.data.targets[at].float(), g)
        for name, ids, empty in zip(("ids", "t5_ids"), self.ids, self.empty, strict=True):
            out[name] = torch.where(dropped[:, None], empty, ids[at])
        if pointing and self.data.references is not None:
            out["reference"] = self.data.references[at].float()
        out["read"] = torch.where(dropped[:, None, None], -1, self.reading.classes[at])
        if self.seen is not None:
            fine = self.is_fine(step)
            shown = torch.arange(1 + ("reference" in out))  # the target, perhaps the reference
            out["seen"] = self.seen.classes(at, PATCH if fine else 2 * PATCH, shown)
            if fine:  # a coarse token is as wide as a pattern's period
                out["shares"] = self.seen.dark_shares(at, PATCH, shown)
        return out

    def loss(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Mean squared error of the velocity; the kinds of steps are logged apart."""
        b, fine = self.batch(step), self.is_fine(step)
        x, target = self.mixed(b)
        reference = b.get("reference")
        with torch.autocast("cpu", torch.bfloat16):
            pooled = self.trainee.encoder(b["ids"]).pooler_output
            states = self.trainee.t5(b["t5_ids"])[0]
            loss, see = self.losses(
                self.trainee, fine, x, b["t"], states, pooled, reference, target, b.get("seen"),
                b.get("shares"),
            )  # fmt: skip
            read = self.trainee.reader.loss(states, b["read"])
        name = "fine" if fine else "coarse"
        name = name if reference is None else f"{name}_reference"
        return self.told(name, loss, see, read)


def pipeline(work: Path, data: Path) -> FluxPipeline:
    """The pipeline with the averaged weights of `work/denoiser.pt`, float32."""
    trainee = loop.averaged(work, Settings, Trainee)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=load_vae(data),
        text_encoder=trainee.encoder,
        tokenizer=trainee.tokenizer,
        text_encoder_2=trainee.t5,
        tokenizer_2=trainee.t5_tokenizer,
        transformer=trainee.denoiser,
    )
