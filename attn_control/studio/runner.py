"""One run at a time on the device: a line of runs, one thread that works, and cancelling."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.studio.settings import Refused, Settings

log = logging.getLogger(__name__)
OPEN = ("waiting", "running")


class Stopped(KeyboardInterrupt):
    """Ends a run as Ctrl-C ends a job: what is finished stays, all is undone."""


class Run:
    """One press of the button. `state`: waiting, running, done, cancelled or failed."""

    def __init__(self, owner: str, work: Callable[[Run], Any], seconds: float) -> None:
        self.owner, self.work, self.seconds = owner, work, seconds
        self.state = "waiting"
        self.text, self.share = "waiting for the device", 0.0
        self.result: Any = None  # also what is finished while others are under way
        self.error: AttnControlError | None = None
        self.started: float | None = None
        self._stop = threading.Event()
        self._ended = threading.Event()

    @property
    def open(self) -> bool:
        return self.state in OPEN

    def say(self, text: str, share: float) -> None:
        """How far it is; share from 0 to 1."""
        self.text, self.share = text, share

    def cancel(self) -> None:
        """Ask it to end; it does at its next step, or before it begins."""
        self._stop.set()

    def check(self) -> None:
        """For the work, at each step. Raises Stopped once it was cancelled or takes too long."""
        if self._stop.is_set():
            raise Stopped
        if self.started is not None and time.monotonic() - self.started > self.seconds:
            self.error = Refused("run", f"the run took longer than {self.seconds:g} s, and ended")
            raise Stopped

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended; True if it has."""
        return self._ended.wait(seconds)

    def _end(self, state: str) -> None:
        self.state = state
        self._ended.set()


class Runner:
    """The line. Its thread is the only one that touches a pipeline."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._line: deque[Run] = deque()
        self._now: Run | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="studio-device", daemon=True)
        self._thread.start()

    def submit(self, owner: str, work: Callable[[Run], Any]) -> Run:
        """Put work at the end of the line.

        Raises:
            Refused: at "run": the line is full, or this owner's last run has not ended.
        """
        with self._changed:
            if self._closed:
                raise Refused("run", "the studio is closing")
            if any(run.open for run in self._of(owner)):
                raise Refused("run", "your last run has not ended yet: cancel it, or wait")
            if len(self._line) >= self.settings.waiting:
                raise Refused(
                    "run", f"{len(self._line)} runs wait already; try again in a little while"
                )
            run = Run(owner, work, self.settings.seconds)
            self._line.append(run)
            self._changed.notify_all()
        return run

    def ahead(self, run: Run) -> int:
        """How many come before it, the one under way among them."""
        with self._changed:
            if run not in self._line:
                return 0
            return self._line.index(run) + (self._now is not None)

    def cancel(self, owner: str) -> bool:
        """Cancel what this owner has in the line or under way; True if there was something."""
        with self._changed:
            mine = [run for run in self._of(owner) if run.open]
            for run in mine:
                run.cancel()
                run.say("cancelling at the next step", run.share)
                if run.state == "waiting":
                    self._line.remove(run)
                    run._end("cancelled")
            return bool(mine)

    def close(self) -> None:
        """Cancel all and let the thread end."""
        with self._changed:
            self._closed = True
            owners = {run.owner for run in [*self._line, *([self._now] if self._now else [])]}
        for owner in owners:
            self.cancel(owner)
        with self._changed:
            self._changed.notify_all()
        self._thread.join(timeout=60)

    def _of(self, owner: str) -> list[Run]:
        now = [self._now] if self._now is not None else []
        return [run for run in [*now, *self._line] if run.owner == owner]

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._line and not self._closed:
                    self._changed.wait()
                if not self._line:
                    return
                run = self._now = self._line.popleft()
                run.state, run.started = "running", time.monotonic()
            state = self._carry_out(run)
            with self._changed:
                self._now = None
                run._end(state)

    def _carry_out(self, run: Run) -> str:
        """Its final state. Nothing that work raises ends the thread."""
        try:
            run.check()
            run.result = run.work(run)
            return "done"
        except KeyboardInterrupt:  # Stopped, or one that the renderer made of it
            return "cancelled" if run.error is None else "failed"
        except AttnControlError as error:
            run.error = error
        except BaseException:  # a foreign pipeline may raise anything, and the page must live
            log.exception("a run failed")
            run.error = Refused("run", "this run failed in an unexpected way; the log says more")
        return "failed"
