"""How the heads of the quickstart were chosen: try every head alone, then the best together.

    python examples/jobs/screen_heads.py --out out/screen

Guides by one head or one whole layer at a time, without CFG, on prompts and seeds that neither the
quickstart nor the model's 200 evaluation prompts use, and scores every picture exactly. The best
few are then tried together on further prompts. Everything lands in screen.json; docs/render.md has
what came out. A screen like this picks the lucky along with the good: expect what it picked to do
worse on new prompts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attn_control import attach, zoo
from attn_control.processors import SoftPAG
from attn_control.render import load_job
from attn_control.render.command import quickstart_job
from attn_control.zoo.scenes import BACKGROUNDS, RELATIONS, SEEN_PAIRS, CaptionSpec, caption_of

MODEL = "shapes-sd3"
BATCH = 16


def new_prompts(count: int, seed: int, used: set[str]) -> list[str]:
    """Captions of two objects whose pairs were seen in training; adds them to `used`.

    Two objects only: the evaluation set takes nearly all captions of one.
    """
    rng = np.random.default_rng(seed)
    found: list[str] = []
    while len(found) < count:
        first, second = rng.choice(len(SEEN_PAIRS), size=2, replace=False)
        relation, background = rng.choice(RELATIONS), rng.choice(list(BACKGROUNDS))
        pairs = (SEEN_PAIRS[first], SEEN_PAIRS[second])
        caption = caption_of(CaptionSpec(pairs, str(relation), str(background)))
        if caption not in used:
            used.add(caption)
            found.append(caption)
    return found


def measure(pipe: Any, controls: list[Any], prompts: list[str], steps: int, cfg: float) -> dict:
    """Share fully right, and the mean of the scorer's parts (which ranks with less noise)."""
    call = {**zoo.defaults(MODEL), "num_inference_steps": steps, "guidance_scale": cfg}
    right, parts = [], []
    with attach(pipe, *controls):
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            noise = [
                torch.Generator("cpu").manual_seed(50_000 + start + i) for i in range(len(batch))
            ]
            images = pipe(prompt=batch, generator=noise, output_type="pil", **call).images
            for image, prompt in zip(images, batch, strict=True):
                found = zoo.score(MODEL, image, prompt)
                right.append(found.right)
                parts.append(
                    np.mean(
                        [found.present, found.bound, found.relation, found.background, found.right]
                    )
                )
    return {"right": float(np.mean(right)), "parts": float(np.mean(parts))}


def main() -> None:
    """Screen single heads and layers, then combinations; print and save."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--out", type=Path, default=Path("out/screen"))
    options.add_argument("--prompts", type=int, default=32, help="pictures a candidate")
    options.add_argument("--steps", type=int, default=12, help="sampling steps of the screen")
    options.add_argument("--final-steps", type=int, default=20, help="steps of the second stage")
    options.add_argument("--scale", type=float, default=2.0, help="guidance scale of the screen")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    job, _ = load_job(quickstart_job())
    used = {row["prompt"] for row in zoo.load_prompts(MODEL)} | set(job.prompts.texts or [])
    first = new_prompts(given.prompts, 1, used)
    second = new_prompts(2 * given.prompts, 2, used)
    pipe = zoo.load(MODEL)
    with attach(pipe) as session:
        sites = [(site.layer, site.heads) for site in session.sites]
    found: dict[str, Any] = {"screen": {}, "together": {}, "arguments": vars(given) | {"out": ""}}
    start = time.time()

    def tell(stage: str, name: str, result: dict) -> None:
        found[stage][name] = result
        line = f"{stage:9} {name:44} right {result['right']:.2f}  parts {result['parts']:.3f}"
        print(f"{line}  ({time.time() - start:.0f} s)", flush=True)
        (given.out / "screen.json").write_text(json.dumps(found, indent=1, default=str))

    def both(stage: str, name: str, controls: list[Any], prompts: list[str], steps: int) -> None:
        tell(stage, name, measure(pipe, controls, prompts, steps, 1.0))

    both("screen", "no guidance", [], first, given.steps)
    tell("screen", "CFG 3", measure(pipe, [], first, given.steps, 3.0))
    names = [f"L{layer}" for layer, _ in sites]
    names += [f"L{layer}H{head}" for layer, heads in sites for head in range(heads)]
    for name in names:
        both("screen", name, [SoftPAG(name, u=1.0, scale=given.scale)], first, given.steps)

    ranked = sorted(names, key=lambda name: -found["screen"][name]["parts"])
    heads = [name for name in ranked if "H" in name]
    layers = [name for name in ranked if "H" not in name]
    both("together", "no guidance", [], second, given.final_steps)
    tell("together", "CFG 3", measure(pipe, [], second, given.final_steps, 3.0))
    for layer in layers[:2]:
        for scale in (1.0, 2.0, 4.0):
            control = SoftPAG(layer, u=1.0, scale=scale)
            both("together", str(control), [control], second, given.final_steps)
    for count in (1, 2, 4, 8):
        for u, scale in ((1.0, 1.0), (1.0, 2.0), (1.0, 4.0), (0.5, 4.0)):
            control = SoftPAG(", ".join(heads[:count]), u=u, scale=scale)
            both("together", str(control), [control], second, given.final_steps)
    best = max(
        (name for name in found["together"] if "H" in name),
        key=lambda name: found["together"][name]["parts"],
    )
    print("best heads:", best)


if __name__ == "__main__":
    main()
