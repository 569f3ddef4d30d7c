"""How long the studio takes to show a picture, and to cancel.

``python benchmarks/studio_first_picture.py``: in a real Chromium, on the built-in shapes-sd3 at its
own settings, on the CPU.

1. From pressing Run to the first picture on the page: under 8 s.
2. From pressing Cancel: no more than the step under way is finished.

The wall's clock counts the neighbours' work too, so the processor's seconds of the server and of
the browser stand beside it, with the load of the machine. Needs Gradio, playwright and chromium.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from timing import Row, report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 600_000  # milliseconds


def descendants(root: int) -> list[int]:
    """Processes that a process started, and those that they started."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(stat(folder)[1])
        except OSError:  # it has ended meanwhile
            continue
    found, last = set(), {root}
    while last:
        last = {pid for pid, parent in parents.items() if parent in last} - found
        found |= last
    return sorted(found)


def stat(folder: Path) -> list[str]:
    """/proc/PID/stat from the state on: its name may hold spaces."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def cpu_of_browser() -> float:
    """Processor seconds of everything that this process started."""
    ticks = 0
    for pid in descendants(os.getpid()):
        try:
            fields = stat(Path(f"/proc/{pid}"))
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Page:
    """The studio's page in Chromium."""

    def __init__(self, browser: Any, address: str) -> None:
        self.page = browser.new_page(viewport={"width": 1440, "height": 900})
        self.page.set_default_timeout(PATIENCE)
        self.page.goto(address)
        self.page.wait_for_selector("#run:enabled")
        self.page.wait_for_function("document.querySelector('#prompt textarea').value.length > 0")

    def status(self, words: str) -> None:
        self.page.wait_for_function(
            "words => document.querySelector('#status')?.textContent.includes(words)", arg=words
        )

    def first_picture(self, seed: int) -> tuple[float, float, float]:
        """Seconds of the wall, of the server's and of the browser's processor."""
        field = self.page.locator("#seed input")
        if not field.is_visible():
            self.page.get_by_text("Advanced: seed, steps").click()
        field.fill(str(seed))
        field.press("Tab")
        before = self.source()
        begun = time.perf_counter(), time.process_time(), cpu_of_browser()
        self.page.locator("#run").click()
        self.page.wait_for_function(
            "before => { const now = document.querySelector('#compare img.ac-without');"
            " return now && now.complete && now.src !== before; }",
            arg=before,
        )
        ended = time.perf_counter(), time.process_time(), cpu_of_browser()
        self.status("done")
        spent = [last - first for first, last in zip(begun, ended, strict=True)]
        print("first picture: {:.1f} s, processors {:.1f} and {:.1f} s".format(*spent), flush=True)
        return tuple(spent)  # type: ignore[return-value]

    def source(self) -> str:
        shown = self.page.locator("#compare img.ac-without")
        return shown.get_attribute("src") if shown.count() else ""

    def cancelled_after(self, studio: Any) -> tuple[int, float]:
        """Steps that were finished after Cancel was pressed, and seconds until the page says so."""
        field = self.page.locator("#steps input[type=number]")
        field.fill("100")
        field.press("Enter")
        self.page.locator("#run").click()
        self.page.wait_for_function(
            r"/step ([2-9]|\d\d)/.test(document.querySelector('#status')?.textContent)"
        )
        run = studio.runner._now
        at_press: list[int] = []
        cancel = studio.cancel

        def pressed(owner: str) -> bool:  # where the press arrives
            at_press.append(int(re.search(r"step (\d+)", run.text)[1]))
            return cancel(owner)

        studio.cancel = pressed
        begun = time.perf_counter()
        self.page.locator("#cancel").click()
        self.status("cancelled")
        seconds = time.perf_counter() - begun
        studio.cancel = cancel
        assert run.wait(60) and run.state == "cancelled"
        done = round(run.share * 100)  # one side of 100 steps: no control is on
        print(f"cancel: {done - at_press[0]} steps, {seconds:.1f} s", flush=True)
        return done - at_press[0], seconds


def verify(page: Page) -> None:
    """It is a picture, and not a single colour."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(page.source().partition(",")[2])))
    assert picture.size == (128, 128) and len(picture.getcolors(1 << 16) or [0] * 9) > 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    try:
        import gradio
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        print(f"not run: {error}; pip install 'attn-control[demo]' playwright")
        return
    if CHROMIUM is None:
        print("not run: there is no chromium; apt-get install chromium")
        return
    from attn_control.studio import Settings
    from attn_control.studio.launch import launch

    served, studio, address = launch(Settings(device="cpu"), block=False)
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = Page(browser, address)
            begun = os.getloadavg()[0]
            taken = [page.first_picture(seed) for seed in range(options.rounds)]
            verify(page)
            after = [page.cancelled_after(studio) for _ in range(options.rounds)]
            version = browser.version
    finally:
        served.close(verbose=False)
        studio.close()
    wall, server, seen = (statistics.median(each) for each in zip(*taken, strict=True))
    told = statistics.median(seconds for _, seconds in after)
    how = f"shapes-sd3, 25 steps, 128 px, CFG; median of {options.rounds}"
    slowest = f"the first {taken[0][0]:.1f} s, the slowest {max(t[0] for t in taken):.1f} s"
    rows = [
        Row("Run to the first picture", wall, "s", 8.0, f"{how}; {slowest}"),
        Row("of it, the server's processor", server, "s", None, "all of its threads"),
        Row("of it, the browser's processor", seen, "s", None, "all of its processes"),
        Row("steps finished after Cancel", max(n for n, _ in after), "steps", 2.0, "the most"),
        Row("Cancel to the page's word", told, "s", None, "median"),
    ]
    load = f"{begun:.1f} to {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    more = {"gradio": gradio.__version__, "chromium": version, "load": load, "clock": "wall"}
    report("studio_first_picture", rows, torch.device("cpu"), **more)


if __name__ == "__main__":
    main()
