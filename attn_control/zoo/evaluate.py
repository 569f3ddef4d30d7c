"""`python -m attn_control.zoo.evaluate shapes-sd3 --out DIR`: scores on the fixed prompts.

Renders every prompt with its own seed, with and without classifier-free guidance, and writes
`DIR/scores.json` (one row a prompt and setting) and `DIR/table.md`: shares with 95 % bootstrap
intervals, seen and held-out pairs apart.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from attn_control import zoo

_PARTS = ("present", "bound", "relation", "background", "right")


def interval(values: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean of (n,) values and its 95 % percentile bootstrap interval, in percent."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1) * 100
    return float(values.mean() * 100), *np.percentile(means, [2.5, 97.5]).tolist()


def subset(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """`limit` prompts spread evenly over the file, so that every kind takes part."""
    if not limit or limit >= len(rows):
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]


def render(pipe: Any, rows: list[dict], guidance: float, batch: int, **kwargs: Any) -> list[Any]:
    """One PIL image a prompt, each from its own seed (the same whatever the batch)."""
    import torch
    from tqdm import tqdm

    images = []
    for i in tqdm(range(0, len(rows), batch), desc=f"guidance {guidance:g}", leave=False):
        part = rows[i : i + batch]
        seeds = [torch.Generator("cpu").manual_seed(r["seed"]) for r in part]
        prompts = [r["prompt"] for r in part]
        out = pipe(prompts, generator=seeds, **{**kwargs, "guidance_scale": guidance})
        images += out.images
    return images


def table(scores: list[dict[str, Any]], settings: list[str]) -> str:
    """A Markdown table of the share of fully right pictures, and guidance's gain, paired."""
    lines = ["| prompts | n | " + " | ".join(settings) + " | gain (points) |"]
    lines.append("|---" * (len(settings) + 3) + "|")
    for split in ("seen", "heldout"):
        for objects in (1, 2, None):
            rights = []
            for setting in settings:
                rows = [r for r in scores if r["setting"] == setting and r["split"] == split]
                rows = [r for r in rows if objects is None or r["objects"] == objects]
                rights.append(np.array([r["right"] for r in rows], float))
            if not len(rights[0]):
                continue
            cells = ["{:.1f} % [{:.1f}, {:.1f}]".format(*interval(r)) for r in rights]
            gain = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval(rights[0] - rights[-1]))
            kind = {1: "one object", 2: "two objects", None: "all"}[objects]
            lines.append(f"| {split}, {kind} | {len(rights[0])} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


def evaluate(
    name: str,
    out: Path,
    *,
    limit: int | None = None,
    guidance: float | None = None,
    batch: int = 20,
    pipe: Any = None,
    baseline: bool = True,
    **overrides: Any,
) -> list[dict[str, Any]]:
    """Render and score; returns the rows that it writes to `out/scores.json`."""
    import torch
    from PIL import Image

    pipe = pipe or zoo.load(name)
    call = {**zoo.defaults(name), **overrides}
    cfg = guidance if guidance is not None else call["guidance_scale"]
    rows = subset(zoo.load_prompts(name), limit)
    out.mkdir(parents=True, exist_ok=True)
    scores, settings = [], {}
    with torch.inference_mode():
        for scale in (cfg, 1.0) if baseline else (cfg,):
            label = f"CFG {scale:g}" if scale > 1 else "no CFG"
            start = time.perf_counter()
            images = render(pipe, rows, scale, batch, **call)
            settings[label] = (time.perf_counter() - start) / len(rows)
            for row, image in zip(rows, images, strict=True):
                s = zoo.score(name, image, row["prompt"])
                found = [f"{o.colour} {o.shape}" for o in s.found]
                parts = {p: getattr(s, p) for p in _PARTS}
                scores.append({**row, "setting": label, **parts, "found": found})
            width, height = images[0].size
            sheet = Image.new("RGB", (10 * width, (len(images) + 9) // 10 * height))
            for i, image in enumerate(images):
                sheet.paste(image, (i % 10 * width, i // 10 * height))
            sheet.save(out / f"sheet-{label.replace(' ', '-').lower()}.png")
    text = table(scores, list(settings))
    seconds = ", ".join(f"{label} {value:.2f} s" for label, value in settings.items())
    (out / "scores.json").write_text(json.dumps(scores, indent=0))
    (out / "table.md").write_text(text + f"\n\nSeconds an image: {seconds}\n")
    print(text + f"\nseconds an image: {seconds}")
    return scores


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m attn_control.zoo.evaluate", description=__doc__)
    cli.add_argument("name", choices=zoo.NAMES)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--limit", type=int, help="only so many prompts, spread over the file")
    cli.add_argument("--guidance", type=float, help="default: the model's own")
    cli.add_argument("--steps", type=int, help="sampler steps; default: the model's own")
    cli.add_argument("--max-sequence-length", type=int, help="zero tokens for T5; default: none")
    cli.add_argument("--no-baseline", action="store_true", help="skip the run without guidance")
    cli.add_argument("--batch", type=int, default=20)
    args = cli.parse_args(argv)
    overrides = {"num_inference_steps": args.steps, "max_sequence_length": args.max_sequence_length}
    evaluate(
        args.name, args.out, limit=args.limit, guidance=args.guidance, batch=args.batch,
        baseline=not args.no_baseline, **{k: v for k, v in overrides.items() if v is not None},
    )  # fmt: skip


if __name__ == "__main__":
    main()
