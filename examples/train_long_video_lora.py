"""Train a LoRA for videos of twice the length through a radial mask (arXiv 2506.19852), and one
through dense attention beside it: what each loses, what its videos are worth, what a step costs.

python examples/train_long_video_lora.py --out lora --quick

Both start alike and see the same clips, times and noise. They take their steps in turns, so that
what else the machine does hits both. Everything is seeded and kept in --out: the same line again
goes on. `pipe.load_lora_weights("lora/radial")` then loads what was learnt.

For a model and clips of your own, change `load`, `clips` and `encode`.
"""

import argparse
import contextlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import export_to_video
from tqdm import tqdm

from attn_control import AttnControlError, attach, zoo
from attn_control.metrics.intervals import bootstrap_paired
from attn_control.processors import RadialAttention, StepPolicy
from attn_control.zoo.videos import draw_video, sample_video

try:
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
except ImportError:
    raise SystemExit("a LoRA needs peft: pip install 'attn-control[train]'") from None

MODEL = "shapes-wan"
ARMS = ("dense", "radial")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TIMES = (0.5, 0.8)  # at which validation looks
FIRST = {"train": 100_000, "held_out": 200_000}  # seeds of clips; the model has seen 0 to 5,999
SAVE_EVERY = 10
DEFAULTS = {
    "frames": 33, "clips": 160, "held_out": 10,  # pixel frames (the model learnt 17), videos
    "steps": 80, "batch": 1, "rank": 16, "rate": 1e-3, "seed": 0,  # the rate falls to zero
    "decay": 0.2, "block": 32, "dense_layers": "L0",  # of the mask; the paper keeps the first dense
    "prompts": 4, "sampling_steps": 8,  # of the fixed prompts with one object
}  # fmt: skip
QUICK = {"clips": 24, "held_out": 4, "steps": 12, "prompts": 1, "sampling_steps": 4}


def load():
    """The pipeline that is to learn longer videos."""
    pipe = zoo.load(MODEL)
    pipe.transformer.requires_grad_(False)
    return pipe


def clips(first, count, frames):
    """Captions with videos, float (1, 3, frames, height, width) in [-1, 1], one by one."""
    for seed in range(first, first + count):
        video = sample_video(seed, frames=frames)
        pixels = torch.from_numpy(draw_video(video)).permute(3, 0, 1, 2)
        yield video.caption, pixels[None].float() / 127.5 - 1


def mask(args):
    """The mask, at every step: training draws its times at random, so that nothing may depend on
    where a sampler is, or be kept from one call for the next.
    """
    policy = StepPolicy(first=0, refresh=None, layers=args.dense_layers)
    return RadialAttention(
        decay_factor=args.decay, block=args.block, correction="none", policy=policy
    )


def attending(model, how, args):
    """A denoiser's attention, "dense" or "radial", until the context ends."""
    # The denoiser, not the pipeline: in training there is no sampler to follow.
    return attach(model, mask(args)) if how == "radial" else contextlib.nullcontext()


def save(state, file):
    """Under another name first: an interrupted run leaves the old file whole."""
    part = file.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, file)


# ---- 1. clips as latents, captions as states


@torch.no_grad()
def encode(args):
    """Of "train" and "held_out" the latents float16 and the states, and the states of "" as
    "empty"; from the cache, or made now.
    """
    file = args.out / "clips.pt"
    if file.is_file():
        return torch.load(file, weights_only=True)
    pipe = load()
    length = zoo.defaults(MODEL)["max_sequence_length"]
    both = pipe.vae.config.latents_mean, pipe.vae.config.latents_std
    mean, std = (torch.tensor(x)[:, None, None, None] for x in both)

    def states_of(caption):
        return pipe.encode_prompt(caption, None, False, max_sequence_length=length)[0]

    data = {"empty": states_of("")}
    for kind, count in (("train", args.clips), ("held_out", args.held_out)):
        latents, states = [], []
        for caption, pixels in tqdm(clips(FIRST[kind], count, args.frames), kind, count):
            latents.append(((pipe.vae.encode(pixels).latent_dist.mode() - mean) / std).half())
            states.append(states_of(caption))
        data[kind] = {"latents": torch.cat(latents), "states": torch.cat(states)}
    save(data, file)
    return data


# ---- 2. training


def loss_of(model, latents, states, t, noise):
    """Flow matching: the velocity from clips to noise, at times t in (0, 1), float (batch,)."""
    x0 = latents.float()
    noisy = torch.lerp(x0, noise, t.view(-1, 1, 1, 1, 1))
    velocity = model(noisy, 1000 * t, states, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - x0)


def batch(data, step, args):
    """One step's clips, states, times and noise; they depend on the step alone."""
    g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    at = torch.randint(args.clips, (args.batch,), generator=g)
    latents, states = (data["train"][name][at] for name in ("latents", "states"))
    dropped = torch.rand(args.batch, generator=g) < 0.1  # for classifier-free guidance
    states = torch.where(dropped[:, None, None], data["empty"], states)
    t = torch.sigmoid(0.5 + torch.randn(args.batch, generator=g))
    return latents, states, t, torch.randn(latents.shape, generator=g)


class Arm:
    """A denoiser with a LoRA on it, which learns through one kind of attention."""

    def __init__(self, args):
        self.pipe = load()
        self.model = self.pipe.transformer.train()
        torch.manual_seed(args.seed)
        config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS)
        self.model.add_adapter(config)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights)
        self.losses, self.seconds = [], []

    def step(self, examples, rate):
        """One step; keeps its loss and its time."""
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(self.model, *examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())  # waits for a GPU, too
        self.seconds.append(time.perf_counter() - began)

    def state(self):
        lora, optimizer = get_peft_model_state_dict(self.model), self.optimizer.state_dict()
        return {"lora": lora, "optimizer": optimizer, "log": [self.losses, self.seconds]}

    def restore(self, state):
        set_peft_model_state_dict(self.model, state["lora"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = state["log"]


def train(args, data):
    """Both arms, in turns; their LoRAs go to --out/dense and --out/radial.

    Returns each one's losses and seconds, step by step.
    """
    file, first = args.out / "training.pt", 0
    arms = {name: Arm(args) for name in ARMS}
    if file.is_file():
        state = torch.load(file, weights_only=True)
        first = state["step"]
        for name, arm in arms.items():
            arm.restore(state[name])
    with contextlib.ExitStack() as sessions:
        for name, arm in arms.items() if first < args.steps else ():
            sessions.enter_context(attending(arm.model, name, args))
        for step in tqdm(range(first, args.steps), "steps", args.steps, initial=first):
            examples = batch(data, step, args)
            for name in ARMS if step % 2 else ARMS[::-1]:
                arms[name].step(examples, args.rate * (1 - step / args.steps))
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
                save({"step": step + 1} | {name: arm.state() for name, arm in arms.items()}, file)
    for name, arm in arms.items():
        layers = get_peft_model_state_dict(arm.model)
        arm.pipe.save_lora_weights(args.out / name, transformer_lora_layers=layers)
    return {name: {"losses": arm.losses, "seconds": arm.seconds} for name, arm in arms.items()}


# ---- 3. what it was worth


@torch.no_grad()
def validation(model, held_out, args):
    """The losses at fixed times and noise: for each held-out clip a list, a number a time."""
    g, rows = torch.Generator().manual_seed(args.seed), []
    for latents, states in zip(held_out["latents"], held_out["states"], strict=True):
        clip = latents[None], states[None]
        noise = torch.randn(clip[0].shape, generator=g)
        rows.append([loss_of(model, *clip, torch.tensor([t]), noise).item() for t in TIMES])
    return rows


def sample(pipe, row, file, args):
    """A video of a fixed prompt and seed: its score. The video goes to ``file``."""
    options = zoo.defaults(MODEL) | {"num_frames": args.frames}
    options["num_inference_steps"] = args.sampling_steps
    g = torch.Generator().manual_seed(row["seed"])
    video = pipe(row["prompt"], generator=g, output_type="pil", **options).frames[0]
    export_to_video(video, str(file), fps=16)
    score = zoo.score(MODEL, video, row["prompt"])
    return {"prompt": row["prompt"], "frames": score.frames, "direction": score.direction}


def evaluate(args, data):
    """No LoRA and both, each under dense attention and under the mask, as a list of cells."""
    file = args.out / "cells.json"
    cells = json.loads(file.read_text()) if file.is_file() else []
    prompts = [row for row in zoo.load_prompts(MODEL) if row["objects"] == 1]
    prompts = [prompts[n * len(prompts) // args.prompts] for n in range(args.prompts)]
    for tuned in ("no", *ARMS):
        pipe = load()
        if tuned != "no":
            pipe.load_lora_weights(args.out / tuned)
        for how in ARMS:
            if any((cell["tuned"], cell["runs"]) == (tuned, how) for cell in cells):
                continue
            with attending(pipe.transformer, how, args) as session:
                losses = validation(pipe.transformer, data["held_out"], args)
                scores = [
                    sample(pipe, row, args.out / f"{tuned}-{how}-{n}.mp4", args)
                    for n, row in enumerate(tqdm(prompts, f"tuned: {tuned}, runs: {how}"))
                ]
                computed = session.report().controls[0].computed if session else 1.0
            cell = {"tuned": tuned, "runs": how, "computed": computed}
            cells.append(cell | {"losses": losses, "scores": scores})
            file.write_text(json.dumps(cells))
    return cells


def table(cells, training):
    """What was found, as Markdown."""
    head = "tuned | runs | pairs computed | held-out loss | change, 95 % | frames right | direction"
    lines = [f"| {head} |", "|---" * 7 + "|"]
    untuned = np.mean(cells[0]["losses"], 1)
    for cell in cells:
        losses, scores = np.mean(cell["losses"], 1), cell["scores"]
        change = bootstrap_paired(losses, untuned)
        told = [cell["tuned"], cell["runs"], f"{cell['computed']:.0%}", f"{losses.mean():.4f}"]
        told.append(f"{change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}]")
        told.append(f"{np.mean([s['frames'] for s in scores]):.0%}" if scores else "-")
        told.append(f"{sum(s['direction'] for s in scores)} of {len(scores)}" if scores else "-")
        lines.append(f"| {' | '.join(told)} |")
    dense, radial = (np.array(training[name]["seconds"]) for name in ARMS)
    low, middle, high = np.quantile(radial / dense, (0.25, 0.5, 0.75))
    lines.append(
        f"\nLoss of {len(untuned)} clips that no model saw, change to the first row; videos of"
        f" {len(cells[0]['scores'])} prompts. A training step through the mask took {middle:.2f} of"
        f" a dense one's time (median of {len(dense)} pairs in turns, half of them {low:.2f} to"
        f" {high:.2f}; {np.median(radial):.2f} s and {np.median(dense):.2f} s)."
    )
    return "\n".join(lines)


def options(argv=None):
    """The command line. ``--quick`` changes defaults, and what is given beside it counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="to see it work, not to learn much")
    for name, value in DEFAULTS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, help=f"default: {value}")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    for name in ("clips", "held_out", "steps", "batch", "rank", "sampling_steps"):
        if getattr(args, name) < 1:
            parser.error(f"expected {name} of 1 or more, got {getattr(args, name)}")
    if args.frames < 5 or args.frames % 2 == 0:
        parser.error(f"expected an odd number of frames, 5 or more, got {args.frames}")
    return args


def main(argv=None):
    args = options(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in DEFAULTS}
    file = args.out / "settings.json"
    before = json.loads(file.read_text()) if file.is_file() else settings
    if before != settings:
        raise AttnControlError(
            f"{args.out} holds a run of other settings; expected them again, or another --out:"
            f" {before} there, {settings} here"
        )
    file.write_text(json.dumps(settings))
    data = encode(args)
    training = train(args, data)
    cells = evaluate(args, data)
    found = {"settings": settings, "training": training, "cells": cells}
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    print(table(cells, training))


if __name__ == "__main__":
    main()
