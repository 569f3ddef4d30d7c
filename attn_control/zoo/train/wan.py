"""shapes-wan: a video transformer with cross-attention to a UMT5's words, trained by flow matching.

Most steps go through the coarse door (576 tokens), many of these with a few of the frames only (192
tokens, so three times the videos), the last part at the shipped size (2,304), where single frames
(256 tokens) may teach shapes cheaply.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from attn_control.zoo.scenes import BACKGROUNDS, COLOURS
from attn_control.zoo.train import (
    flow,
    loop,
    nearness,
    quick,
    reading,
    seeing,
    video_autoencoder,
)
from attn_control.zoo.train import wan_model as door
from attn_control.zoo.train.latents import Latents, chances, pick
from attn_control.zoo.train.text import WIDTH, build_t5_tokenizer, tokenize
from attn_control.zoo.videos import (
    CROSSINGS,
    DIRECTIONS,
    SHAPES,
    draw_video,
    parse_video,
    sample_video,
)

LENGTH = 24  # tokens; the longest caption takes 16 with its mark
SHIFT = 3.0  # of the sampler's times
AUTOENCODER = video_autoencoder


def SOURCE(seed: int) -> tuple[str, list[np.ndarray]]:
    """A moving scene: caption and frames uint8 (17, 128, 128, 3)."""
    video = sample_video(seed)
    return video.caption, [draw_video(video)]


def LABELS(seed: int) -> dict[str, np.ndarray]:
    """What the cells of each latent's last frame show: (9, 32, 32), and things (9, 3, 3)."""
    video = sample_video(seed)
    spec, scenes = parse_video(video.caption), video.scenes[::2]
    motions = [2 + list(DIRECTIONS).index(spec.direction)] + [1] * (spec.still is not None)
    if spec.crossing == "in front of":  # what is in front is drawn last
        motions.reverse()
    things = np.stack([seeing.things(scene, motions) for scene in scenes])
    return {"cells": np.stack([seeing.cells(scene) for scene in scenes]), "things": things}


@dataclass(frozen=True, kw_only=True)
class Settings(flow.TellingSettings):
    """Everything that shapes a run."""

    coarse_batch: int = 8
    fine_batch: int = 2
    fine_every: int = 8
    fine_from: float = 0.85  # share of the steps after which all are fine
    few: float = 0.7  # share of the coarse steps that show a few frames only
    few_frames: int = 3
    few_batch: int = 24
    fine_few: float = 0.0  # share of the fine steps that show a few frames only
    fine_few_frames: int = 1
    fine_few_batch: int = 16
    time_mean: float = 0.8
    near: float = 0.0  # weight of how near half the heads look, see nearness.py; whole fine steps
    near_queries: int = 48
    single: float = 1.0  # how much likelier a video without a crossing is drawn
    hard: float = 1.2  # the same for those with a cross
    width: int = 128
    layers: int = 8


def vocabulary() -> list[str]:
    """Every word that a caption of this model can hold."""
    phrases = [*COLOURS, *SHAPES, *BACKGROUNDS, *DIRECTIONS, *CROSSINGS, "a moves on background"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def build_umt5(count: int) -> UMT5EncoderModel:
    """An untrained two-layer UMT5 encoder of width 64 for `count` words."""
    config = UMT5Config(
        vocab_size=count, d_model=WIDTH, d_kv=16, num_heads=4, d_ff=4 * WIDTH, num_layers=2,
        relative_attention_num_buckets=16, relative_attention_max_distance=32, dropout_rate=0.0,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def encode(encoder: UMT5EncoderModel, ids: torch.Tensor) -> torch.Tensor:
    """States (batch, tokens, 64) as WanPipeline makes them: zeros after a caption's end mark."""
    mask = (ids != 0).long()
    return encoder(ids, mask).last_hidden_state * mask[..., None]


class Trainee(nn.Module):
    """All that is trained: denoiser, its coarse door, the text encoder, and what asks them."""

    def __init__(self, s: Settings):
        super().__init__()
        self.tokenizer: PreTrainedTokenizerFast = build_t5_tokenizer(vocabulary(), LENGTH)
        self.denoiser = door.build(s.width, s.layers)
        self.coarse = door.Coarse(s.width)
        self.encoder = build_umt5(len(self.tokenizer))
        self.reader = reading.Reader(reading.MOVING, WIDTH)
        self.seer = seeing.Seer(seeing.MOVING, s.width)


def _losses(
    trainee: Trainee,
    fine: bool,
    x: torch.Tensor,
    t: torch.Tensor,
    states: torch.Tensor,
    target: torch.Tensor,
    times: torch.Tensor | None,
    seen: torch.Tensor | None,
    queries: torch.Tensor | None,
    inside: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    coarse = None if fine else trainee.coarse
    tap: list[torch.Tensor] = []
    looks = None if queries is None or inside is None else door.Looks(queries, inside)
    out = door.velocity(trainee.denoiser, x, t * 1000, states, coarse, times, tap, looks)
    loss = F.mse_loss(out.float(), target)
    see = None if seen is None else trainee.seer.loss(tap[0], seen)
    return loss, see, None if looks is None else nearness.shortfall(looks.masses)


class Lesson(flow.Lesson):
    """Moving scenes, by flow matching."""

    def __init__(self, s: Settings, data: Latents, seen: seeing.Seen | None = None):
        torch.manual_seed(s.seed)
        self.settings, self.data, self.seen = s, data, seen
        self.trainee = Trainee(s)
        self.reading = reading.read(data.captions, reading.moving_facts, reading.MOVING, LENGTH)
        self.ids = tokenize(self.trainee.tokenizer, data.captions)
        self.empty = tokenize(self.trainee.tokenizer, [""])[0]
        self.chance = chances(data.captions, s.single, s.hard)
        self.losses = quick.compiled(_losses) if s.compile else _losses

    def blocks(self) -> Iterable[nn.Module]:
        """Where Muon works."""
        return [self.trainee.denoiser.blocks]

    def begin(self) -> None:
        """The text encoder learns to read before the first picture."""
        encoder = self.trainee.encoder
        right = reading.learn(
            lambda ids: encode(encoder, ids), self.trainee.reader, list(encoder.parameters()),
            self.ids, self.reading, steps=self.settings.read_first,
        )  # fmt: skip
        print(f"words told right: {right:.1%}")

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The examples, times and noise of one step; "times" where it shows a few frames only."""
        s, g, size = self.settings, self.generator(step), self.size(step)
        frames = self.data.targets.shape[2]
        fine, toss = self.is_fine(step), float(torch.rand((), generator=g))
        few = toss < (s.fine_few if fine else s.few)
        shown = torch.arange(frames)
        if few:
            size = s.fine_few_batch if fine else s.few_batch
            count = s.fine_few_frames if fine else s.few_frames
            shown = torch.randperm(frames, generator=g)[:count].sort()[0]
        at = pick(self.chance, size, g)
        words = self.ids[at].clone()
        dropped = self.dropped(size, g)
        words[dropped] = self.empty
        out = {**self.noisy(self.data.targets[at][:, :, shown].float(), g), "ids": words}
        out["read"] = torch.where(dropped[:, None, None], -1, self.reading.classes[at])
        if self.seen is not None:
            out["seen"] = self.seen.classes(at, 2 if fine else 4, shown)
        if few:
            return {**out, "times": shown}
        if fine and s.near:
            side = out["x0"].shape[-1] // 2  # in tokens
            queries = torch.randperm(frames * side * side, generator=g)[: s.near_queries]
            inside = nearness.boxes((frames, side, side))[queries]
            return {**out, "queries": queries, "inside": inside}
        return out

    def loss(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Mean squared error of the velocity; the kinds of steps are logged apart."""
        b, fine = self.batch(step), self.is_fine(step)
        x, target = self.mixed(b)
        times = b.get("times")
        with torch.autocast("cpu", torch.bfloat16):
            states = encode(self.trainee.encoder, b["ids"])
            loss, see, far = self.losses(
                self.trainee, fine, x, b["t"], states, target, times, b.get("seen"),
                b.get("queries"), b.get("inside"),
            )  # fmt: skip
            read = self.trainee.reader.loss(states, b["read"])
        kind = "fine" if fine else "coarse"
        if times is not None:
            kind = "fine_few" if fine else "few"
        figures, total = self.told(kind, loss, see, read)
        if far is None:
            return figures, total
        return {**figures, "far": far}, total + self.settings.near * far


def pipeline(work: Path, data: Path) -> WanPipeline:
    """The pipeline with the averaged weights of `work/denoiser.pt`, float32."""
    trainee = loop.averaged(work, Settings, Trainee)
    return WanPipeline(
        tokenizer=trainee.tokenizer,
        text_encoder=trainee.encoder,
        vae=video_autoencoder.load_vae(data),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=trainee.denoiser,
    )
