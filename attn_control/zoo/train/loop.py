"""The one training loop: optimisers, averaged weights, checkpoints, resuming. A lesson says what.

A run's randomness depends on the step alone, so that a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from attn_control.zoo.train.common import Average, Log, learning_rate, load, save
from attn_control.zoo.train.keep import load_kept
from attn_control.zoo.train.muon import Muon

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every run has; a lesson's own settings add to it. Kept in the checkpoint."""

    steps: int = 8000
    peak: float = 1e-3
    warmup: int = 200
    decay: float = 0.999  # of the averaged weights
    seed: int = 1
    muon: bool = True
    muon_rate: float = 1.0  # its learning rate, as a multiple of AdamW's
    compile: bool = False


class Lesson(Protocol):
    """One model to train: all that is trained, and the loss of one step."""

    settings: Any  # a Settings
    trainee: nn.Module

    def blocks(self) -> Iterable[nn.Module]:
        """The modules whose matrices Muon takes; AdamW takes everything else."""

    def begin(self) -> None:
        """What comes before the first step of a run that starts from nothing."""

    def loss(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """One step's figures by the names that the log keeps them under; the loss to descend."""


def optimizers(lesson: Lesson) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices and convolutions, norms' projections apart; AdamW otherwise."""
    s: Settings = lesson.settings
    named = [pair for block in lesson.blocks() for pair in block.named_parameters()]
    inner = [p for name, p in named if s.muon and p.ndim in (2, 4, 5) and "norm" not in name]
    taken = {id(p) for p in inner}
    rest = [p for p in lesson.trainee.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=s.peak, betas=(0.9, 0.98), fused=True)
    return [adam, Muon(inner, lr=s.peak)] if inner else [adam]


def load_average(trainee: nn.Module, state: dict[str, Any]) -> None:
    """Put the averaged weights of a checkpoint into a trainee."""
    trainee.load_state_dict(state["model"])
    for value, p in zip(state["average"]["values"], trainee.parameters(), strict=True):
        p.data.copy_(value)


def averaged(work: Path, settings: Callable[..., Any], trainee: Callable[[Any], Net]) -> Net:
    """The trainee of `work/denoiser.pt` with its averaged weights, ready to sample from."""
    state = load(work / "denoiser.pt")
    net = trainee(settings(**state["settings"]))
    load_average(net, state)
    return net.eval()


def train(
    work: Path,
    lesson: Lesson,
    *,
    name: str = "denoiser",
    resume: bool = False,
    init_from: Path | None = None,
    save_every: int = 250,
    stop_at: int | None = None,
) -> nn.Module:
    """Train; keeps `work/NAME.pt`, resumable. Returns the trainee with its current weights.

    init_from: a checkpoint whose averaged weights to start from, or what `keep` wrote. stop_at:
    leave after that step, as an interruption would.
    """
    s: Settings = lesson.settings
    work.mkdir(parents=True, exist_ok=True)
    trainee, file, first = lesson.trainee, work / f"{name}.pt", 0
    opts = optimizers(lesson)
    average = Average(trainee, s.decay)
    if resume and file.is_file():
        state = load(file)
        trainee.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        average.load(state["average"])
        first = state["step"]
    elif init_from is not None:
        if init_from.suffix == ".safetensors":
            load_kept(trainee, init_from)
        else:
            load_average(trainee, load(init_from))
        average = Average(trainee, s.decay)
    else:
        lesson.begin()
        average = Average(trainee, s.decay)
    log = Log(work / f"{name}.jsonl", 50)
    last = min(s.steps, stop_at or s.steps)
    bar = tqdm(range(first, last), initial=first, total=s.steps, desc=work.name, mininterval=5)
    for step in bar:
        rate = learning_rate(step, s.steps, s.peak, s.warmup)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate * (s.muon_rate if isinstance(opt, Muon) else 1)
        figures, loss = lesson.loss(step)
        trainee.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0, foreach=True)
        for opt in opts:
            opt.step()
        average.update()
        if line := log.add(step, **{kind: figure.item() for kind, figure in figures.items()}):
            bar.set_postfix({kind: line[kind] for kind in figures})
        if (step + 1) % save_every == 0 or step + 1 == last:
            moments = [opt.state_dict() for opt in opts]
            state = {"model": trainee.state_dict(), "optimizers": moments}
            state = {**state, "average": average.state(), "settings": asdict(s), "step": step + 1}
            save(state, file)
    return trainee
