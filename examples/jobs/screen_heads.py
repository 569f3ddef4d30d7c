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
from attn_control.render.models import quiet_libraries
from attn_control.zoo.scenes import (
    BACKGROUNDS,
    RELATIONS,
    SEEN_PAIRS,
    CaptionSpec,
    caption_of,
    parse_caption,
)

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


def graded(prompt: str, found: Any) -> float:
    """Between 0 and 1, kinder than right or wrong, so that it ranks heads with less noise.

    Half for the objects (one for colour and shape, a half for the colour alone, less where there
    are more pieces than objects), a quarter each for the relation and for being fully right.
    """
    asked = parse_caption(prompt).objects
    kinds = {(each.colour, each.shape) for each in found.found}
    colours = {each.colour for each in found.found}
    objects = sum(1.0 if o in kinds else 0.5 if o[0] in colours else 0.0 for o in asked)
    objects /= max(len(asked), len(found.found))
    return 0.5 * objects + 0.25 * (found.bound and found.relation) + 0.25 * found.right


def measure(pipe: Any, controls: list[Any], prompts: list[str], steps: int, cfg: float) -> dict:
    """Share fully right, and the mean grade."""
    call = {**zoo.defaults(MODEL), "num_inference_steps": steps, "guidance_scale": cfg}
    right, grades = [], []
    with attach(pipe, *controls):
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            noise = [
                torch.Generator("cpu").manual_seed(50_000 + start + i) for i, _ in enumerate(batch)
            ]
            images = pipe(prompt=batch, generator=noise, output_type="pil", **call).images
            for image, prompt in zip(images, batch, strict=True):
                found = zoo.score(MODEL, image, prompt)
                right.append(found.right)
                grades.append(graded(prompt, found))
    return {"right": float(np.mean(right)), "grade": float(np.mean(grades))}


def main() -> None:
    """Screen single heads and layers, then combinations; print and save."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--out", type=Path, default=Path("out/screen"))
    options.add_argument(
        "--prompts", type=int, default=32, help="pictures a candidate, first stage"
    )
    options.add_argument("--steps", type=int, default=10, help="sampling steps, first stage")
    options.add_argument("--scale", type=float, default=1.5, help="guidance scale, first stage")
    options.add_argument("--more-prompts", type=int, default=40, help="pictures, second stage")
    options.add_argument("--more-steps", type=int, default=12, help="steps, second stage")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    job, _ = load_job(quickstart_job())
    used = {row["prompt"] for row in zoo.load_prompts(MODEL)} | set(job.prompts.texts or [])
    first = new_prompts(given.prompts, 1, used)
    second = new_prompts(given.more_prompts, 2, used)
    with quiet_libraries():
        pipe = zoo.load(MODEL)
    with attach(pipe) as session:
        sites = [(site.layer, site.heads) for site in session.sites]
    found: dict[str, Any] = {"alone": {}, "together": {}, "arguments": vars(given)}
    start = time.time()

    def run(stage: str, name: str, controls: list[Any], cfg: float = 1.0) -> None:
        prompts, steps = (first, given.steps) if stage == "alone" else (second, given.more_steps)
        result = found[stage][name] = measure(pipe, controls, prompts, steps, cfg)
        spent = time.time() - start
        line = f"{stage:8}  {name:52}  right {result['right']:.2f}  grade {result['grade']:.3f}"
        print(f"{line}  ({spent:.0f} s)", flush=True)
        (given.out / "screen.json").write_text(json.dumps(found, indent=1, default=str))

    run("alone", "no guidance", [])
    run("alone", "CFG 3", [], 3.0)
    layers = [f"L{layer}" for layer, _ in sites]
    heads = [f"L{layer}H{head}" for layer, count in sites for head in range(count)]
    for name in layers + heads:
        run("alone", name, [SoftPAG(name, scale=given.scale)])
    layers.sort(key=lambda name: -found["alone"][name]["grade"])
    heads.sort(key=lambda name: -found["alone"][name]["grade"])
    print("best alone:", ", ".join(layers[:3] + heads[:8]))

    run("together", "no guidance", [])
    run("together", "CFG 3", [], 3.0)
    tried = [SoftPAG(layers[0], scale=scale) for scale in (1.0, 2.0)]
    for count in (2, 4):
        names = ", ".join(heads[:count])
        tried += [SoftPAG(names, scale=scale) for scale in (1.0, 2.0)]
    for control in tried:
        run("together", str(control), [control])
    for control in tried[2:]:
        run("together", f"CFG 3 + {control}", [control], 3.0)


if __name__ == "__main__":
    main()
