"""Renders a prepared job: every result saved at once, nothing finished is ever lost or redone."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.render.hub_errors import first_line
from attn_control.render.judge import judge
from attn_control.render.measure import peak_memory, reset_peak, versions
from attn_control.render.media import Made, is_blank, made_of
from attn_control.render.prepare import Prepared, Task, VariantPlan
from attn_control.render.progress import Progress
from attn_control.render.store import (
    append_row,
    make_folder,
    read_record,
    read_rows,
    replace_file,
    save,
    slug,
)
from attn_control.render.watch import watched

OnStep = Callable[[str], None]


class Failed(AttnControlError):
    """A picture could not be made; `reason` is the sentence without where and what is kept."""

    def __init__(self, message: str, variant: str, reason: str) -> None:
        super().__init__(message)
        self.variant, self.reason = variant, reason


@dataclass
class Outcome:
    """What a run left behind; `rows` holds all finished pictures, in the job's order."""

    rows: list[dict[str, Any]]
    made: int
    kept: int
    total: int
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)


def finished(images: Path, task: Task) -> dict[str, Any] | None:
    """The record of a task's picture, if it is there with the same settings."""
    record = read_record(images / task.file)
    return record if record is not None and record.get("hash") == task.digest else None


def run(
    prepared: Prepared,
    out: Path,
    *,
    overwrite: bool = False,
    console: Any = None,
    on_step: OnStep | None = None,
) -> Outcome:
    """Render what is missing of a job into `out`.

    Pictures that are there with the same settings are kept, unless `overwrite`. Ctrl-C ends the run
    cleanly: the picture under way is dropped, all finished ones stay.

    on_step: called with the variant's name after each step of the sampler; a KeyboardInterrupt that
        it raises ends the run in the same way.

    Raises:
        AttnControlError: a picture failed, or the disk; says how many finished ones are kept.
    """
    images = make_folder(out)
    results = out / "results.jsonl"
    known = read_rows(results)
    rows: dict[str, dict[str, Any]] = {}
    for task in prepared.tasks:
        record = None if overwrite else finished(images, task)
        if record is not None:
            rows[task.file] = known.get(task.file) or record
            if task.file not in known:
                append_row(results, record)
    outcome = Outcome([], 0, len(rows), len(prepared.tasks))
    missing = [task for task in prepared.tasks if task.file not in rows]
    if outcome.kept and console is not None:
        console.print(
            f"{outcome.kept} of {outcome.total} {prepared.things} are already there", style="dim"
        )
    try:
        with Progress(console, len(missing), things=prepared.things) as progress:
            for plan in prepared.variants:
                todo = [task for task in missing if task.variant == plan.name]
                if todo:
                    _run_variant(prepared, plan, todo, out, rows, outcome, progress, on_step)
    except KeyboardInterrupt:
        outcome.interrupted = True
    outcome.rows = [rows[task.file] for task in prepared.tasks if task.file in rows]
    blank = sum(bool(row.get("blank")) for row in outcome.rows)
    if blank:
        outcome.notes.append(
            f"{blank} {prepared.things[:-1]}(s) show one single colour, which hints at NaN values"
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
    on_step: OnStep | None = None,
) -> None:
    from attn_control import attach

    progress.describe(plan.name)
    tell = None if on_step is None else functools.partial(on_step, plan.name)
    # closing(): a control that never acted becomes a note below, not a warning from `with`.
    attached = closing(attach(prepared.pipe, *plan.controls))
    with attached as session, watched(prepared.pipe, tell):
        for task in todo:
            try:
                made, row = _render(prepared, plan, task)
                row |= _sparsity(session)
                save(made, out / "images" / task.file, row, plan.video)
                append_row(out / "results.jsonl", row)
            except Exception as error:  # a foreign pipeline may raise anything
                done = f"{len(rows)} of {outcome.total} {prepared.things}"
                reason = str(error) if isinstance(error, AttnControlError) else _reason(error)
                raise Failed(
                    f"variant {task.variant!r}, prompt {task.prompt}, seed {task.seed}: {reason} "
                    f"({done} are finished and kept in {out}; the same command goes on from there)",
                    task.variant,
                    reason,
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
                f"{prepared.things} are those of the plain pipeline"
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


def _sparsity(session: Any) -> dict[str, Any]:
    """What the sparse controls came to in the run that just ended; {} without any."""
    found = session.sparsity(session.step.run_id) if session.step is not None else []
    told = [
        {"density": round(s.density, 6), "computed": round(s.computed, 6), "outcomes": s.outcomes}
        for s in found
        if s is not None
    ]
    return {"sparse": told} if told else {}


def call(prepared: Prepared, plan: VariantPlan, task: Task, output: str = "pil") -> Any:
    """One call of the pipeline, as it is attached now.

    output: of the pipeline; "latent" leaves decoding out.
    """
    import torch

    # On the CPU whatever the device: the same seed is the same noise on every machine.
    generator = torch.Generator("cpu").manual_seed(task.seed)
    kwargs = dict(plan.kwargs)
    if task.prompt.image is not None:
        kwargs["image"] = task.prompt.image.picture()
    return prepared.pipe(prompt=task.prompt.text, generator=generator, output_type=output, **kwargs)


def _render(prepared: Prepared, plan: VariantPlan, task: Task) -> tuple[Made, dict[str, Any]]:
    """One picture or video and its row of results."""
    device, prompt = prepared.choice.device, task.prompt
    reset_peak(device)
    start = time.perf_counter()
    made = made_of(call(prepared, plan, task))
    seconds = time.perf_counter() - start
    peak, peak_kind = peak_memory(device)
    _check_size(made, plan)
    row: dict[str, Any] = {
        "file": task.file,
        "hash": task.digest,
        "variant": task.variant,
        "prompt": prompt.text,
        "seed": task.seed,
        "score": judge(prepared.choice, made, prompt),
        "seconds": round(seconds, 4),
        "peak_bytes": peak,
        "peak_kind": peak_kind,
        "blank": is_blank(made),
        "size": list(made.size),
        "steps": plan.steps,
        "scheduler": type(getattr(prepared.pipe, "scheduler", None)).__name__,
        "settings": task.settings,
        "versions": versions(),
    }
    if prompt.image is not None:
        row["image"] = {"name": prompt.image.name, "digest": prompt.image.digest}
    if made.is_video:
        row["frames"] = len(made.frames)
    return made, row


def _check_size(made: Made, plan: VariantPlan) -> None:
    (width, height), asked = made.size, plan.kwargs
    if (asked.get("width") or width, asked.get("height") or height) != made.size:
        raise AttnControlError(
            f"the pipeline made {width} x {height} pixels where the sampler asks for "
            f"width {asked.get('width')} and height {asked.get('height')}"
        )
    if made.is_video != (plan.video is not None):
        kinds = ("a picture", "a video")
        raise AttnControlError(
            f"the pipeline made {kinds[made.is_video]}, expected {kinds[not made.is_video]}"
        )
    frames = asked.get("num_frames") or len(made.frames)
    if len(made.frames) != frames and made.is_video:
        raise AttnControlError(
            f"the pipeline made {len(made.frames)} frames where the sampler asks for {frames}"
        )
