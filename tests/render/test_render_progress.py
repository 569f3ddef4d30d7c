"""Progress: a pace, a time left, and a line now and then where there is no terminal."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from attn_control.render.progress import Progress, duration


@pytest.mark.parametrize(
    "seconds,text",
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_time_left_follows_the_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress(None, 10) as progress:
        assert progress.left() == "unknown time"
        for _ in range(4):
            now[0] += 5
            progress.step()
        assert progress.left() == "30 s"


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    now, text = [0.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress(Console(file=text, width=80), 6, every=10) as progress:
        progress.describe("[red]")
        for _ in range(6):
            now[0] += 4
            progress.step()
    assert text.getvalue() == "3/6 pictures, 12 s left\n6/6 pictures, 0 s left\n"


def test_a_terminal_gets_a_bar_that_shows_names_as_text():
    text = io.StringIO()
    with Progress(Console(file=text, width=80, force_terminal=True), 2) as progress:
        progress.describe("[/b] cfg")
        progress.step()
        progress.step()
    assert "[/b] cfg" in text.getvalue() and "2/2" in text.getvalue()


def test_nothing_to_do_shows_nothing():
    text = io.StringIO()
    with Progress(Console(file=text, force_terminal=True), 0):
        pass
    assert text.getvalue() == ""
