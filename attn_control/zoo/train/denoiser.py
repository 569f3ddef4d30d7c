"""Training the denoiser of shapes-sd3 together with its two text encoders, by flow matching.

Most steps go through the coarse door (64 tokens, large batches), every `fine_every`-th at the
shipped resolution (256 tokens), and the last part only there. A run's randomness depends on the
step alone, so that a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from attn_control.zoo.scenes import SHAPES
from attn_control.zoo.train import model as door
from attn_control.zoo.train.common import Average, Log, generator, learning_rate, load, save
from attn_control.zoo.train.muon import Muon
from attn_control.zoo.train.text import build_encoder, build_tokenizer, encode, tokenize


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a run; kept in its checkpoint."""

    steps: int = 8000
    coarse_batch: int = 64
    fine_batch: int = 16
    fine_every: int = 5
    fine_from: float = 0.8  # share of the steps after which all are fine
    peak: float = 1e-3
    warmup: int = 200
    decay: float = 0.999
    time_mean: float = 0.6  # of the logit of t: a little above 0, where the layout is decided
    time_std: float = 1.1
    drop: float = 0.1  # captions emptied, for classifier-free guidance
    zeros: float = 0.12  # last part: share of steps with 256 (2 of 3) or no zero tokens, not one
    single: float = 1.0  # how much likelier than one of two objects a one-object scene is drawn
    hard: float = 1.0  # the same for scenes with a ring or a cross: the shapes learnt last
    seed: int = 1
    width: int = 128
    layers: int = 6
    muon: bool = True
    muon_rate: float = 1.0  # its learning rate, as a multiple of AdamW's
    compile: bool = True


class Trainee(nn.Module):
    """All that is trained: denoiser, its coarse door and the text encoders."""

    def __init__(self, s: Settings):
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.denoiser = door.build(s.width, s.layers)
        self.coarse = door.Coarse(s.width)
        self.encoders = nn.ModuleList([build_encoder(self.tokenizer) for _ in range(2)])


def is_fine(step: int, s: Settings) -> bool:
    """Whether a step runs at the shipped resolution."""
    return step >= s.fine_from * s.steps or step % s.fine_every == s.fine_every - 1


def chances(s: Settings, ids: torch.Tensor, tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Cumulative chance of each scene, float64 (count,), last value 1; all equal by default."""

    def holds(*words: str) -> torch.Tensor:
        return torch.isin(ids, torch.tensor(tokenizer(list(words))["input_ids"])[:, 1])

    single = holds(*SHAPES).sum(1) == 1
    weights = 1.0 + (s.single - 1) * single.double()
    weights *= 1.0 + (s.hard - 1) * holds("ring", "cross").any(1).double()
    total = weights.cumsum(0)
    return total / total[-1]


def draw_batch(
    step: int,
    s: Settings,
    latents: torch.Tensor,
    ids: torch.Tensor,
    empty: torch.Tensor,
    chance: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The examples, times and noise of one step; `chance` as `chances` gives it."""
    g = generator(s.seed, step)
    size = s.fine_batch if is_fine(step, s) else s.coarse_batch
    at = torch.rand(size, generator=g, dtype=torch.float64)
    pick = torch.searchsorted(chance, at).clamp_(max=len(latents) - 1)
    x0 = latents[pick].float()
    words = ids[pick].clone()
    words[torch.rand(size, generator=g) < s.drop] = empty
    # Stratified: one time from each of `size` equally likely slices of the logit-normal.
    u = (torch.arange(size) + torch.rand(size, generator=g)) / size
    t = torch.sigmoid(s.time_mean + s.time_std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
    noise = torch.randn(x0.shape, generator=g)
    # Zero tokens where T5's would be: one by default, as in the model's own call.
    zeros, toss = 1, float(torch.rand((), generator=g))
    if step >= s.fine_from * s.steps and toss < s.zeros:
        zeros = 256 if toss < s.zeros * 2 / 3 else 0
    return {"x0": x0, "ids": words, "t": t, "noise": noise, "zeros": torch.tensor(zeros)}


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


def optimizers(trainee: Trainee, s: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks' attention and feed-forward, AdamW for the rest."""
    blocks = trainee.denoiser.transformer_blocks.named_parameters()
    inner = [p for name, p in blocks if s.muon and p.ndim == 2 and "norm" not in name]
    taken = {id(p) for p in inner}
    rest = [p for p in trainee.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=s.peak, betas=(0.9, 0.98), fused=True)
    return [adam, Muon(inner, lr=s.peak)] if inner else [adam]


def train(
    work: Path,
    s: Settings,
    data: tuple[torch.Tensor, torch.Tensor],
    *,
    resume: bool = False,
    init_from: Path | None = None,
    save_every: int = 250,
    stop_at: int | None = None,
) -> Trainee:
    """Train; keeps `work/denoiser.pt`, resumable. Returns the trainee with its current weights.

    data: latents float16 (count, 4, 32, 32) and ids int64 (count, 16). init_from: a checkpoint
    whose averaged weights to start from. stop_at: leave after that step, as an interruption would.
    """
    torch.manual_seed(s.seed)
    work.mkdir(parents=True, exist_ok=True)
    trainee, file, first = Trainee(s), work / "denoiser.pt", 0
    opts = optimizers(trainee, s)
    average = Average(trainee, s.decay)
    if resume and file.is_file():
        state = load(file)
        trainee.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        average.load(state["average"])
        first = state["step"]
    elif init_from is not None:
        state = load(init_from)
        trainee.load_state_dict(state["model"])
        for value, p in zip(state["average"]["values"], trainee.parameters(), strict=True):
            p.data.copy_(value)
        average = Average(trainee, s.decay)
    latents, ids = data
    empty, chance = tokenize(trainee.tokenizer, [""])[0], chances(s, ids, trainee.tokenizer)
    losses = torch.compile(_losses, dynamic=False) if s.compile else _losses
    log = Log(work / "denoiser.jsonl", 50)
    last = min(s.steps, stop_at or s.steps)
    bar = tqdm(range(first, last), initial=first, total=s.steps, desc="denoiser", mininterval=5)
    for step in bar:
        b, fine = draw_batch(step, s, latents, ids, empty, chance), is_fine(step, s)
        t = b["t"][:, None, None, None]
        x, target = torch.lerp(b["x0"], b["noise"], t), b["noise"] - b["x0"]
        rate = learning_rate(step, s.steps, s.peak, s.warmup)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate * (s.muon_rate if isinstance(opt, Muon) else 1)
        with torch.autocast("cpu", torch.bfloat16):
            states, pooled = encode(trainee.encoders, b["ids"])
            zeros = int(b["zeros"])
            states = F.pad(states, (0, 0, 0, zeros))
            # Other counts than one are too rare to be worth compiled graphs of their own.
            run = losses if zeros == 1 else _losses
            loss = run(trainee, fine, x, b["t"], states, pooled, target)
        trainee.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0, foreach=True)
        for opt in opts:
            opt.step()
        average.update()
        name = f"zeros{zeros}" if zeros != 1 else "fine" if fine else "coarse"
        if line := log.add(step, **{name: loss.item()}):
            bar.set_postfix({k: v for k, v in line.items() if k in ("coarse", "fine")})
        if (step + 1) % save_every == 0 or step + 1 == last:
            moments = [opt.state_dict() for opt in opts]
            state = {"model": trainee.state_dict(), "optimizers": moments}
            state = {**state, "average": average.state(), "settings": asdict(s), "step": step + 1}
            save(state, file)
    return trainee
