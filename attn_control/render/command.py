"""From a job file to a sheet: what `attn-control render` and `quickstart` do, as functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attn_control.render.job import Job
from attn_control.render.jobfile import load_job, model_from
from attn_control.render.prepare import Prepared, prepare
from attn_control.render.run import Outcome, run
from attn_control.render.sheet import make_sheets
from attn_control.render.summary import (
    footnote,
    memory_line,
    percent,
    summarise,
    table,
    verdicts,
)


def quickstart_job() -> Path:
    """The job file inside the package."""
    return Path(__file__).with_name("quickstart.yaml")


def render(
    path: Path,
    out: Path,
    *,
    model: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Any = None,
    log: Any = None,
) -> Outcome | None:
    """Read, check and render a job; print what came out.

    Args:
        path: the job file.
        out: folder for images/, results.jsonl, reports/ and the sheet.
        model: a model to use instead of the job's.
        device: a device to use instead of the job's.
        overwrite: render pictures anew that are already there.
        dry_run: check everything, print the plan, write nothing.
        console: where results go; None prints nothing.
        log: where progress goes; None shows none.

    Returns:
        What was rendered; None after a dry run.

    Raises:
        AttnControlError: anything wrong with the job, its model or the folder, before rendering; or
            a picture that failed.
    """
    job, source = load_job(path)
    job = _replaced(job, model, device)
    if log is not None:
        log.print(f"loading {job.model.name} ...", style="dim")
    prepared = prepare(job, source, out, given=model is not None or device is not None)
    if dry_run:
        if console is not None:
            print_plan(prepared, out, console)
        return None
    outcome = run(prepared, out, overwrite=overwrite, console=log)
    sheets = write_sheets(prepared, outcome, out)
    if console is not None:
        print_outcome(prepared, outcome, out, sheets, console)
    return outcome


def _replaced(job: Job, model: str | None, device: str | None) -> Job:
    """The job with --model and --device put in; the file's revision goes with the file's model."""
    if model is None and device is None:
        return job
    changed = job.model.model_dump(exclude_none=True)
    if model is not None:
        changed = {**changed, "name": model}
        changed.pop("revision", None)
    if device is not None:
        changed["device"] = device
    return job.model_copy(update={"model": model_from(changed)})


def compared(prepared: Prepared) -> list[str]:
    """The variants that others are held against: those the job names, else the first."""
    names = [variant.name for variant in prepared.variants]
    return list(prepared.job.compare) or names[:1]


def write_sheets(prepared: Prepared, outcome: Outcome, out: Path) -> list[Path]:
    """Draw the contact sheet of what is finished."""
    if not outcome.rows:
        return []
    variants = [variant.name for variant in prepared.variants]
    notes = {}
    for each in summarise(outcome.rows, variants, []):
        right = percent(each.right).replace(" %", " % right") + ", " if each.right else ""
        notes[each.name] = f"{right}{each.seconds:.2f} s each"
    seeds = prepared.seeds
    numbers = sorted({seed for each in seeds.values() for seed in each})
    told = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    size = "{} x {} px".format(*outcome.rows[0]["size"])
    if "frames" in outcome.rows[0]:
        size += f", {outcome.rows[0]['frames']} frames (first, middle, last shown)"
    made_by = f"{prepared.choice.name}, {size}, {prepared.variants[0].steps} steps, seeds {told}"
    if prepared.choice.kind == "zoo":
        made_by += ". Made by the tiny model that comes with attn-control"
        made_by += "; the badge is the exact scorer's verdict." if _scored(outcome) else "."
    if outcome.interrupted:
        made_by += " Interrupted: empty tiles were not rendered."
    return make_sheets(
        outcome.rows,
        out,
        variants=variants,
        seeds=seeds,
        title=prepared.job.title or "attn-control",
        subtitle=made_by,
        notes=notes,
        references={
            prompt.key: prompt.image.picture for prompt in prepared.prompts if prompt.image
        },
    )


def _scored(outcome: Outcome) -> bool:
    return any(row["score"] is not None for row in outcome.rows)


def print_outcome(
    prepared: Prepared, outcome: Outcome, out: Path, sheets: list[Path], console: Any
) -> None:
    """The table, what it means, and where everything lies."""
    from rich.markup import escape

    def say(line: str, **style: Any) -> None:
        console.print(escape(line), soft_wrap=True, highlight=False, **style)

    if outcome.rows:
        variants = [variant.name for variant in prepared.variants]
        summaries = summarise(outcome.rows, variants, compared(prepared))
        console.print()
        console.print(table(summaries, compared(prepared)))
        console.print()
        for line in verdicts(summaries):
            say(line)
        say(footnote(outcome.rows), style="dim")
        memory = memory_line(summaries)
        if memory:
            say(memory, style="dim")
    for note in outcome.notes:
        say(f"note: {note}", style="yellow")
    made = f"{outcome.made} {prepared.things} made, {outcome.kept} kept from before"
    if outcome.interrupted:
        say(
            f"interrupted: {made}, {outcome.total - len(outcome.rows)} of {outcome.total} missing; "
            "the same command goes on from there",
            style="yellow",
        )
    else:
        say(made, style="dim")
    if sheets:
        say(f"sheet    {sheets[0]}" + (f" and {len(sheets) - 1} more" if sheets[1:] else ""))
        say(f"results  {out / 'results.jsonl'}")


def print_plan(prepared: Prepared, out: Path, console: Any) -> None:
    """What a run would do, after every check that needs no rendering."""
    from rich.markup import escape
    from rich.table import Table

    def say(line: str) -> None:
        console.print(escape(line), soft_wrap=True, highlight=False)

    choice, variants = prepared.choice, prepared.variants
    common = {
        key: value
        for key, value in variants[0].kwargs.items()
        if all(key in each.kwargs and each.kwargs[key] == value for each in variants)
    }
    say(f"{choice.name} ({choice.kind}) on {choice.device} in {choice.dtype}")
    for video in dict.fromkeys(each.video for each in variants if each.video is not None):
        say(f"videos are written as {video.format} at {video.fps:g} frames a second")
    say(f"all variants: {_settings(common) or 'the defaults of the pipeline'}")
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column("variant", no_wrap=True)
    shown.add_column("controls and sampler", overflow="fold")
    shown.add_column("row-forwards", justify="right", no_wrap=True)
    for each in variants:
        own = {key: value for key, value in each.kwargs.items() if key not in common}
        does = [*map(str, each.controls), *([_settings(own)] if own else [])]
        cost = str(each.row_forwards)
        shown.add_row(*map(escape, (each.name, "\n".join(does) or "-", cost)))
    console.print(shown)
    seeds = 1 if prepared.job.seeds == "own" else len(prepared.job.seeds)
    there = sum((out / "images" / task.file).exists() for task in prepared.tasks)
    say(
        f"{len(prepared.tasks)} {prepared.things}: {len(variants)} variants x "
        f"{len(prepared.prompts)} prompts x {seeds} seeds, about {prepared.row_forwards} "
        "row-forwards"
    )
    say(f"they would go to {out}" + (f", where {there} of them are" if there else ""))
    for each in variants:
        if not each.exact:
            say(f"{each.name}: its window of sigma can be checked at the first call only")
    say("every check passed; nothing was rendered or written")


def _settings(kwargs: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
