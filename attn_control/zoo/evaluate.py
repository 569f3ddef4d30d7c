"""`python -m attn_control.zoo.evaluate NAME --out DIR`: scores on the fixed prompts.

Renders every prompt with its own seed, with and without classifier-free guidance, and writes
`DIR/scores.json` (one row a prompt and setting) and `DIR/table.md`: shares with 95 % bootstrap
intervals, seen and held-out pairs apart. Prompts of shapes-flux that point to a reference are
rendered by diffusers' FluxKontextPipeline around the same parts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from attn_control import zoo

PARTS = {
    "shapes-flux": ("present", "bound", "relation", "background", "texture", "right"),
    "shapes-wan": ("frames", "direction", "crossing", "background", "right"),
}
_PICTURE_PARTS = ("present", "bound", "relation", "background", "right")


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
    """What the pipeline makes of each prompt, each from its own seed (the same whatever the batch).

    A PIL image a row, or uint8 (frames, height, width, 3) where the pipeline makes videos.
    """
    import torch
    from tqdm import tqdm

    switch = "true_cfg_scale" if "true_cfg_scale" in kwargs else "guidance_scale"
    pointing = [i for i, row in enumerate(rows) if row.get("reference")]
    others = [i for i, row in enumerate(rows) if not row.get("reference")]
    chunks = [
        part[i : i + batch] for part in (pointing, others) for i in range(0, len(part), batch)
    ]
    made: dict[int, Any] = {}
    for chunk in tqdm(chunks, desc=f"guidance {guidance:g}", leave=False):
        part = [rows[i] for i in chunk]
        call = {**kwargs, switch: guidance}
        if "negative_prompt" in call:  # one a prompt: the pipelines do not repeat it themselves
            call["negative_prompt"] = [call["negative_prompt"]] * len(part)
        run = pipe
        if part[0].get("reference"):
            run, more = _with_references(pipe, part)
            call |= more
        call["generator"] = [torch.Generator("cpu").manual_seed(r["seed"]) for r in part]
        out = run(prompt=[r["prompt"] for r in part], **call)
        if hasattr(out, "frames"):
            made |= zip(chunk, (np.asarray(out.frames) * 255).round().astype(np.uint8), strict=True)
        else:
            made |= zip(chunk, out.images, strict=True)
    return [made[i] for i in range(len(rows))]


def _with_references(pipe: Any, rows: list[dict]) -> tuple[Any, dict[str, Any]]:
    """The pipeline that takes pictures, around the same parts, and the pictures for it."""
    from diffusers import FluxKontextPipeline
    from PIL import Image

    from attn_control.zoo.scenes import SIZE, draw
    from attn_control.zoo.textures import reference_scene

    kontext = FluxKontextPipeline(**pipe.components)
    kontext.set_progress_bar_config(disable=True)
    images = [Image.fromarray(draw(reference_scene(**row["reference"]))) for row in rows]
    return kontext, {"image": images, "max_area": SIZE * SIZE, "_auto_resize": False}


def judge(name: str, row: dict[str, Any], made: Any) -> dict[str, Any]:
    """The scorer's answers for one prompt's picture or video."""
    reference = (row.get("reference") or {}).get("texture")
    s = zoo.score(name, made, row["prompt"], reference)
    parts = {part: getattr(s, part) for part in PARTS.get(name, _PICTURE_PARTS)}
    if hasattr(s, "found"):
        parts["found"] = [f"{o.colour} {o.shape}" for o in s.found]
    return parts


def _sheet(made: list[Any]) -> Any:
    """All pictures, ten a row; of a video its first, middle and last frame, side by side."""
    from PIL import Image

    tiles = [np.asarray(m.convert("RGB")) if hasattr(m, "convert") else
             np.concatenate([m[0], m[len(m) // 2], m[-1]], 1) for m in made]  # fmt: skip
    height, width, _ = tiles[0].shape
    sheet = np.zeros(((len(tiles) + 9) // 10 * height, 10 * width, 3), np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // 10 * height, i % 10 * width
        sheet[y : y + height, x : x + width] = tile
    return Image.fromarray(sheet)


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


def parts_table(name: str, scores: list[dict[str, Any]], settings: list[str]) -> str:
    """A Markdown table of every part of the score; the texture also of references alone."""
    lines = ["| part | prompts | n | " + " | ".join(settings) + " |"]
    lines.append("|---" * (len(settings) + 3) + "|")
    wanted = [(part, "all", lambda row: True) for part in PARTS.get(name, _PICTURE_PARTS)]
    if name == "shapes-flux":
        wanted.append(("texture", "with a reference", lambda row: bool(row["reference"])))
    for part, which, holds in wanted:
        columns = []
        for setting in settings:
            rows = [r for r in scores if r["setting"] == setting and holds(r)]
            columns.append(np.array([r[part] for r in rows], float))
        if not len(columns[0]):
            continue
        cells = ["{:.1f} % [{:.1f}, {:.1f}]".format(*interval(c)) for c in columns]
        lines.append(f"| {part} | {which} | {len(columns[0])} | {' | '.join(cells)} |")
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

    pipe = pipe or zoo.load(name)
    call = {**zoo.defaults(name), **overrides}
    switch = "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"
    cfg = guidance if guidance is not None else call[switch]
    rows = subset(zoo.load_prompts(name), limit)
    out.mkdir(parents=True, exist_ok=True)
    scores, settings = [], {}
    with torch.inference_mode():
        for scale in (cfg, 1.0) if baseline else (cfg,):
            label = f"CFG {scale:g}" if scale > 1 else "no CFG"
            start = time.perf_counter()
            made = render(pipe, rows, scale, batch, **call)
            settings[label] = (time.perf_counter() - start) / len(rows)
            for row, each in zip(rows, made, strict=True):
                scores.append({**row, "setting": label, **judge(name, row, each)})
            _sheet(made).save(out / f"sheet-{label.replace(' ', '-').lower()}.png")
    text = table(scores, list(settings)) + "\n\n" + parts_table(name, scores, list(settings))
    seconds = ", ".join(f"{label} {value:.2f} s" for label, value in settings.items())
    (out / "scores.json").write_text(json.dumps(scores, indent=0))
    (out / "table.md").write_text(text + f"\n\nSeconds a prompt: {seconds}\n")
    print(text + f"\nseconds a prompt: {seconds}")
    return scores


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m attn_control.zoo.evaluate", description=__doc__)
    cli.add_argument("name", choices=zoo.KNOWN)
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
