"""Progress with time left: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any


class Progress:
    """Counts what is finished; `with Progress(console, total) as progress: progress.step("cfg")`.

    Args:
        console: a rich console; None shows nothing.
        total: how many to make in this run.
        every: seconds between two lines where there is no terminal.
        things: what is made, in words.
    """

    def __init__(
        self, console: Any, total: int, every: float = 15.0, things: str = "pictures"
    ) -> None:
        self.things = things
        self.console, self.total, self.every = console, total, every
        self.done = 0
        self.started = self.said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.console is not None and self.console.is_terminal and self.total:
            from rich import progress as rich

            self._bar = rich.Progress(
                rich.TextColumn("{task.description}"),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TextColumn("left"),
                rich.TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def describe(self, variant: str) -> None:
        """Say which variant is being rendered."""
        if self._bar is not None:
            from rich.markup import escape

            self._bar.update(self._task, description=escape(variant))

    def step(self) -> None:
        """One more picture is finished."""
        self.done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif self.console is not None and time.monotonic() - self.said >= self.every:
            self.said = time.monotonic()
            self.console.print(
                f"{self.done}/{self.total} {self.things}, {self.left()} left", style="dim"
            )

    def left(self) -> str:
        """Time left at the pace so far, as text."""
        if not self.done:
            return "unknown time"
        seconds = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        return duration(seconds)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
