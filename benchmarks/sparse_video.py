"""The time of a whole denoising run under sparse attention over the dense one, at 8,192 tokens:
``python benchmarks/sparse_video.py [--frames N] [--side P] [--steps S] [--rounds R] [--only X]``.

The denoiser has the shape of the zoo's shapes-wan, at random: time does not depend on the weights.
Each control runs without a correction at a few densities, in turns with the dense run and in one
process, each run with its masks built anew. Reported are the ratio to the dense run, the amortised
density, and what Amdahl's law foretells: 1 - share x (1 - computed), where share is that of
self-attention in the dense run, measured here, and computed the work in dense attentions.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from timing import Row, report, side_by_side

from attn_control import attach
from attn_control.eval.attention_clock import attention_share
from attn_control.policy import StepPolicy
from attn_control.processors import (
    AutoSparse,
    NeighborhoodAttention,
    RadialAttention,
    ReshapedAttention,
    SelectedAttention,
    SpatialTemporalAttention,
    TileAttention,
)
from attn_control.processors.sparse import SparseControl
from attn_control.zoo.train.video_autoencoder import build as build_vae
from attn_control.zoo.train.wan_model import build

CPU = torch.device("cpu")
ONCE = StepPolicy(first=1, refresh=None)
"""One dense step; what chooses masks does so at the next, and all others are sparse."""


def controls() -> dict[str, SparseControl]:
    """By name; "share" is what computes nothing between refreshes."""
    options: dict[str, Any] = {"policy": ONCE, "correction": "none"}
    found: dict[str, SparseControl] = {
        "share": TileAttention(policy=ONCE, correction="share"),
        "radial": RadialAttention(decay_factor=0.3, block=32, **options),
        "reshaped 0.125": ReshapedAttention(width=0.125, block=32, **options),
        "spatial, temporal 0.2": SpatialTemporalAttention(target_density=0.2, **options),
        "auto 0.2": AutoSparse(target_density=0.2, **options),
        "neighborhood 0.2": NeighborhoodAttention(target_density=0.2, **options),
    }
    for density in (0.1, 0.2, 0.4, 0.7):
        found[f"tile {density}"] = TileAttention(target_density=density, **options)
        found[f"selected {density}"] = SelectedAttention(keep=density, **options)
    return found


def pipeline() -> tuple[WanPipeline, dict[str, Any]]:
    """A pipeline without a text encoder, and the words that it is called with."""
    torch.manual_seed(0)
    transformer, vae = build(), build_vae()
    assert isinstance(vae, AutoencoderKLWan)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    words = torch.randn(1, 24, transformer.config.text_dim)
    return pipe, {"prompt_embeds": words, "guidance_scale": 1.0, "output_type": "latent"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=63)
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="controls whose name this expression finds")
    args = parser.parse_args()
    pipe, call = pipeline()
    call |= {"height": args.side, "width": args.side, "num_frames": args.frames}
    call["num_inference_steps"] = args.steps
    spent: dict[str, tuple[float, float]] = {}

    def run(name: str = "", control: SparseControl | None = None) -> None:
        chosen = () if control is None else (control,)
        with closing(attach(pipe, *chosen)) as session:
            pipe(**call, generator=torch.Generator().manual_seed(0))
            for found in filter(None, session.sparsity()):
                spent[name] = found.density, found.computed

    chosen = {name: c for name, c in controls().items() if re.search(args.only, name)}
    runs: dict[str, Callable[[], Any]] = {"dense": run}
    runs |= {name: partial(run, name, control) for name, control in chosen.items()}
    share = attention_share(pipe, run, "cpu")  # warms up, too
    taken = side_by_side(runs, CPU, args.rounds, warmup=0)
    dense = taken.pop("dense")
    tokens = ((args.frames - 1) // 2 + 1) * (args.side // 8) ** 2
    rows = [
        Row(f"attention's share of a dense run of {tokens} tokens", share, "", None, "measured")
    ]
    for name, seconds in taken.items():
        ratio = sum(a / b for a, b in zip(seconds, dense, strict=True)) / args.rounds
        density, computed = spent[name]
        foretold = 1 - share * (1 - computed)
        note = f"amortised density {density:.3f}, computed {computed:.3f}, foretold {foretold:.3f}"
        rows.append(Row(f"{name}, denoising over dense", ratio, "x", 1.0, note))
    report("sparse_video", rows, CPU)


if __name__ == "__main__":
    main()
