"""Renders a prepared job: every picture saved at once, nothing finished is ever lost or redone."""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.render.hub_errors import first_line
from attn_control.render.measure import is_blank, peak_memory, reset_peak, versions
from attn_control.render.prepare import Prepared, Task, VariantPlan
from attn_control.render.progress import Progress
from attn_control.render.store import (
    append_row,
    make_folder,
    read_record,
    read_rows,
    replace_file,
    save_picture,
    slug,
)


@dataclass
class Outcome:
    """What a run left behind; `rows` holds all finished pictures, in the job's order."""

    rows: list[dict[str, Any]]
    made: int
    kept: int
    total: int
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)


def run(prepared: Prepared, out: Path, *, overwrite: bool = False, console: Any = None) -> Outcome:
    """Render what is missing of a job into `out`.

    Pictures that are there with the same settings are kept, unless `overwrite`. Ctrl-C ends the run
    cleanly: the picture under way is dropped, all finished ones stay.

    Raises:
        AttnControlError: a picture failed, or the disk; says how many finished ones are kept.
    """
    images = make_folder(out)
    results = out / "results.jsonl"
    known = read_rows(results)
    rows: dict[str, dict[str, Any]] = {}
    for task in prepared.tasks:
        record = None if overwrite else read_record(images / task.file)
        if record is not None and record.get("hash") == task.digest:
            rows[task.file] = known.get(task.file) or record
            if task.file not in known:
                append_row(results, record)
    outcome = Outcome([], 0, len(rows), len(prepared.tasks))
    missing = [task for task in prepared.tasks if task.file not in rows]
    if outcome.kept and console is not None:
        console.print(f"{outcome.kept} of {outcome.total} pictures are already there", style="dim")
    try:
        with Progress(console, len(missing)) as progress:
            for plan in prepared.variants:
                todo = [task for task in missing if task.variant == plan.name]
                if todo:
                    _run_variant(prepared, plan, todo, out, rows, outcome, progress)
    except KeyboardInterrupt:
        outcome.interrupted = True
    outcome.rows = [rows[task.file] for task in prepared.tasks if task.file in rows]
    blank = sum(bool(row.get("blank")) for row in outcome.rows)
    if blank:
        outcome.notes.append(
            f"{blank} picture(s) show one single colour, which hints at NaN values"
        )
    return outcome


def _run_variant(
    prepared: Prepared,
    plan: VariantPlan,
    todo: list[Task],
    out: Path,
    rows: dict[str, dict[str, Any]],
    outcome: Outcome,
    progress: Progress,
) -> None:
    from attn_control import attach

    progress.describe(plan.name)
    # closing(): a control that never acted becomes a note below, not a warning from `with`.
    with closing(attach(prepared.pipe, *plan.controls)) as session:
        for task in todo:
            try:
                image, row = _render(prepared, plan, task)
                save_picture(image, out / "images" / task.file, row)
                append_row(out / "results.jsonl", row)
            except Exception as error:  # a foreign pipeline may raise anything
                kept = f"{len(rows)} of {outcome.total} pictures are finished and kept in {out}"
                reason = str(error) if isinstance(error, AttnControlError) else _reason(error)
                raise AttnControlError(
                    f"variant {task.variant!r}, prompt {task.prompt!r}, seed {task.seed}: {reason} "
                    f"({kept}; the same command goes on from there)"
                ) from error
            rows[task.file] = row
            outcome.made += 1
            progress.step()
        report = session.report().to_dict()
    for control in report["controls"]:
        if not control["fired"] and not control.get("idle"):
            reason = control.get("reason") or "no reason is known"
            outcome.notes.append(
                f"variant {plan.name!r}: {control['name']} never acted ({reason}); its "
                "pictures are those of the plain pipeline"
            )
    reports = out / "reports"
    reports.mkdir(exist_ok=True)
    path = reports / f"{slug(plan.name, 40)}.json"
    text = json.dumps(report, indent=2, default=str) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _reason(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {first_line(error)}; try a smaller size or dtype"
    return f"the pipeline raised {type(error).__name__}: {first_line(error)}"


def _render(prepared: Prepared, plan: VariantPlan, task: Task) -> tuple[Any, dict[str, Any]]:
    """One picture and its row of results."""
    import torch

    device = prepared.choice.device
    # On the CPU whatever the device: the same seed is the same noise on every machine.
    generator = torch.Generator("cpu").manual_seed(task.seed)
    reset_peak(device)
    start = time.perf_counter()
    result = prepared.pipe(
        prompt=task.prompt, generator=generator, output_type="pil", **plan.kwargs
    )
    seconds = time.perf_counter() - start
    peak, peak_kind = peak_memory(device)
    image = result.images[0]
    _check_size(image, plan.kwargs)
    score = _score(prepared, image, task.prompt)
    row = {
        "file": task.file,
        "hash": task.digest,
        "variant": task.variant,
        "prompt": task.prompt,
        "seed": task.seed,
        "score": score,
        "seconds": round(seconds, 4),
        "peak_bytes": peak,
        "peak_kind": peak_kind,
        "blank": is_blank(image),
        "size": list(image.size),
        "steps": plan.steps,
        "scheduler": type(getattr(prepared.pipe, "scheduler", None)).__name__,
        "settings": task.settings,
        "versions": versions(),
    }
    return image, row


def _check_size(image: Any, kwargs: dict[str, Any]) -> None:
    asked = (kwargs.get("width") or image.width, kwargs.get("height") or image.height)
    if tuple(image.size) != asked:
        raise AttnControlError(
            f"the pipeline made {image.width} x {image.height} pixels where the sampler asks for "
            f"width {asked[0]} and height {asked[1]}"
        )


def _score(prepared: Prepared, image: Any, prompt: str) -> dict[str, Any] | None:
    if prepared.choice.kind != "zoo":
        return None
    from attn_control import zoo

    name = prepared.choice.name
    if not zoo.is_scorable(name, prompt):
        return None
    try:
        return asdict(zoo.score(name, image, prompt))
    except AttnControlError:  # say a picture too small to judge: it is still a picture
        return None
