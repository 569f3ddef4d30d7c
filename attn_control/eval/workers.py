"""A suite's pictures, made by several processes side by side.

Small models leave most of a second core idle, so on a CPU every process has a core to itself. They
write where a single process would, and what is there already is kept; measuring, and above all
timing, is left to the one process that comes after them.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.eval.suite import SuiteFile
from attn_control.render.prepare import Prepared
from attn_control.render.progress import Progress
from attn_control.render.run import finished, run

WORTH = 10  # pictures for which a process is worth its start
MOST = 8


def missing(prepared: dict[str, Prepared], out: Path, overwrite: bool) -> int:
    """How many pictures of all measurements are not there yet."""
    return sum(
        overwrite or finished(out / name / "images", task) is None
        for name, each in prepared.items()
        for task in each.tasks
    )


def processes(prepared: dict[str, Prepared], left: int) -> int:
    """How many processes pay: one a core that torch would use, one where a GPU does the work."""
    import torch

    devices = {str(each.choice.device).split(":")[0] for each in prepared.values()}
    if devices != {"cpu"}:
        return 1
    return max(1, min(torch.get_num_threads(), left // WORTH, MOST))


def render_shared(
    suite: SuiteFile,
    out: Path,
    *,
    left: int,
    jobs: int,
    spread: int | None = None,
    overwrite: bool = False,
    console: Any = None,
) -> list[str]:
    """Make what is missing in `jobs` processes; returns their notes.

    left: how many pictures that is. Raises AttnControlError with the first process's message that
    failed, once all have ended; KeyboardInterrupt if they were interrupted.
    """
    import torch

    threads = max(1, torch.get_num_threads() // jobs)
    if console is not None:
        console.print(f"{suite.name}: {left} pictures, {jobs} processes", style="dim")
    # Spawned: a fork would inherit torch's threads in the middle of what they do.
    context = multiprocessing.get_context("spawn")
    before = _rows(suite, out)
    with ProcessPoolExecutor(jobs, context) as pool, Progress(console, left) as progress:
        shares = [
            pool.submit(_share, suite, out, spread, overwrite, number, jobs, threads)
            for number in range(jobs)
        ]
        try:
            _follow(shares, lambda: _rows(suite, out) - before, progress)
        except KeyboardInterrupt:  # of this process alone, perhaps; what is finished is kept
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    try:
        found = [share.result() for share in shares]
    except BrokenProcessPool:
        raise AttnControlError(
            f"suite {suite.name!r}: a process was ended from outside, perhaps for its "
            f"memory; what is finished is kept in {out}: go on with --jobs {jobs - 1}"
        ) from None
    errors = [error for _, error, _ in found if error]
    if errors:
        raise AttnControlError(errors[0])
    if any(interrupted for _, _, interrupted in found):
        raise KeyboardInterrupt
    return list(dict.fromkeys(note for notes, _, _ in found for note in notes))


def part(prepared: Prepared, number: int, jobs: int) -> Prepared:
    """Every `jobs`-th picture of each variant, from the number-th on: not all cost the same."""
    tasks = [
        task
        for plan in prepared.variants
        for task in [task for task in prepared.tasks if task.variant == plan.name][number::jobs]
    ]
    return dataclasses.replace(prepared, tasks=tuple(tasks))


def _share(
    suite: SuiteFile,
    out: Path,
    spread: int | None,
    overwrite: bool,
    number: int,
    jobs: int,
    threads: int,
) -> tuple[list[str], str, bool]:
    """In a process of its own: its notes, what went wrong, and whether it was interrupted."""
    import torch

    from attn_control.eval.run import prepare_suite

    torch.set_num_threads(threads)
    notes: list[str] = []
    try:
        for name, each in prepare_suite(suite, out, spread).items():
            outcome = run(part(each, number, jobs), out / name, overwrite=overwrite)
            if outcome.interrupted:
                return notes, "", True
            notes += [f"{name}: {note}" for note in outcome.notes]
    except AttnControlError as error:  # as text: not every error survives the way back
        return notes, str(error), False
    except KeyboardInterrupt:
        return notes, "", True
    return notes, "", False


def _follow(shares: Sequence[Future[Any]], count: Callable[[], int], progress: Progress) -> None:
    """Tell how far the processes are until all have ended."""
    while wait(shares, timeout=2).not_done:
        while progress.done < min(count(), progress.total - 1):
            progress.step()


def _rows(suite: SuiteFile, out: Path) -> int:
    """Rows of results so far."""
    files = [out / name / "results.jsonl" for name in suite.suite.measurements]
    return sum(file.read_bytes().count(b"\n") for file in files if file.is_file())
