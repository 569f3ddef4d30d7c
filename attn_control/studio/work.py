"""What one press of the button does: the page's job, prepared and rendered as `render` does it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from attn_control.errors import AttnControlError
from attn_control.metrics import psnr
from attn_control.render.jobfile import job_from_text
from attn_control.render.media import read_media
from attn_control.render.prepare import prepare
from attn_control.render.run import run as render
from attn_control.studio.facts import Facts
from attn_control.studio.models import Shelf
from attn_control.studio.page import WITH, WITHOUT, Page, job_of, placed
from attn_control.studio.runner import Run, Stopped


@dataclass(frozen=True)
class Side:
    """One of the two: its file, its numbers. `step_seconds`: median time between two steps."""

    variant: str
    file: Path
    seconds: float
    step_seconds: float | None
    size: tuple[int, int]
    score: dict[str, Any] | None

    def frames(self) -> list[Any]:
        """PIL RGB, one for a picture."""
        return read_media(self.file)


@dataclass
class Result:
    """What a run made so far; `psnr` in dB between the two sides, infinite for equal ones."""

    page: Page
    job: str
    video: bool
    sides: dict[str, Side] = field(default_factory=dict)
    report: dict[str, Any] | None = None
    psnr: float | None = None
    notes: list[str] = field(default_factory=list)


def make(
    page: Page, facts: Facts, shelf: Shelf, folder: Path, run: Run, picture: bytes | None = None
) -> Result:
    """Render both sides into a folder; ``run`` is told of each step, and may stop there.

    picture: the page's reference picture as PNG; it lies beside the job, as a user would have it.

    Raises:
        Refused: with the place on the page that caused it.
        Stopped: it was cancelled.
    """
    text = job_of(page, facts, shelf.device)
    result = Result(page, text, facts.video)
    run.result = result
    run.say("preparing", 0.0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.yaml").write_text(text, encoding="utf-8")
        if picture is not None:
            (folder / page.picture).write_bytes(picture)
        job, source = job_from_text(text, str(folder / "job.yaml"))
        prepared = prepare(job, source, folder, load=shelf.load, identify=shelf.identify)
        total = sum(plan.steps for plan in prepared.variants)
        times: dict[str, list[float]] = {plan.name: [] for plan in prepared.variants}

        def on_step(variant: str) -> None:
            times[variant].append(time.perf_counter())
            done, steps = len(times[variant]), prepared.variants[0].steps
            share = sum(map(len, times.values())) / total
            run.say(f"{variant} control: step {done} of {steps}", min(share, 1.0))
            run.check()

        for plan in prepared.variants:
            run.check()
            tasks = tuple(task for task in prepared.tasks if task.variant == plan.name)
            outcome = render(_part(prepared, plan, tasks), folder, on_step=on_step)
            if outcome.interrupted:
                raise Stopped
            result.notes += [note for note in outcome.notes if note not in result.notes]
            result.sides[plan.name] = _side(outcome.rows[0], folder, times[plan.name])
        if WITH in result.sides:
            report = folder / "reports" / f"{WITH}.json"
            result.report = json.loads(report.read_text(encoding="utf-8"))
            result.psnr = difference(result.sides[WITHOUT].frames(), result.sides[WITH].frames())
        return result
    except AttnControlError as error:
        raise placed(error, page) from error


def _part(prepared: Any, plan: Any, tasks: tuple[Any, ...]) -> Any:
    """One variant of a prepared job, so that its picture can be shown before the next begins."""
    import dataclasses

    return dataclasses.replace(prepared, variants=(plan,), tasks=tasks)


def _side(row: dict[str, Any], folder: Path, times: Sequence[float]) -> Side:
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    return Side(
        variant=row["variant"],
        file=folder / "images" / row["file"],
        seconds=row["seconds"],
        step_seconds=median(gaps) if gaps else None,
        size=tuple(row["size"]),
        score=row["score"],
    )


def difference(first: Sequence[Any], second: Sequence[Any]) -> float:
    """PSNR in dB over all frames at once; infinite for equal ones."""
    if len(first) != len(second):
        return math.nan
    a, b = (np.stack([np.asarray(frame) for frame in frames]) for frames in (first, second))
    return psnr(a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:]))
