"""One browser at the studio's page: what a visitor does, and what is waited for."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = os.environ.get("ATTN_CONTROL_AXE", "")
SHOTS = Path(__file__).parents[2] / "out" / "studio"
# Of a busy machine: what takes how long is for benchmarks/studio_first_picture.py to say.
PATIENCE = 60_000
MARKS = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


class Visit:
    """One browser at the page."""

    def __init__(self, browser, address, width=1440, dark=False):
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
        )
        self.page = page = self.context.new_page()
        page.set_default_timeout(PATIENCE)
        self.strangers = []
        page.on("request", self._asked)
        page.goto(f"{address}?__theme={scheme}")
        self.ready()

    def ready(self):
        """Wait until the page can be used."""
        self.page.wait_for_selector("#run:enabled")
        self.page.wait_for_function("document.querySelector('#prompt textarea').value.length > 0")

    def _asked(self, request):
        if not re.match(r"(http|ws)://(127\.0\.0\.1|localhost)|data:|blob:", request.url):
            self.strangers.append(request.url)

    def shot(self, name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        # Pictures for people: a page that is drawn slowly is no failure of what is tested.
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True, animations="disabled")

    def opened(self):
        """Gradio sets the fields of what is opened once more a frame later; nobody types sooner."""
        frames = "() => new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))"
        self.page.evaluate(frames)

    def tab(self, name):
        self.page.get_by_role("tab", name=name, exact=True).click()
        self.opened()

    def section(self, control):
        section = self.page.locator(f"#section-{control}")
        if not section.locator("input[type=checkbox]").first.is_visible():
            section.locator(".label-wrap").first.click()
            section.locator("input[type=checkbox]").first.wait_for()
            self.opened()
        return section

    def steps(self, count):
        if not self.page.locator("#steps").is_visible():
            self.page.get_by_text("Advanced: seed, steps").click()
            self.page.locator("#steps").wait_for()
            self.opened()
        field = self.page.locator("#steps input[type=number]")
        field.fill(str(count))
        field.press("Enter")

    def model(self, name):
        box = self.page.locator("#model input")
        box.fill(name)
        box.press("Enter")
        box.press("Tab")

    def yaml(self, words):
        """Wait until the job says so; the job."""
        self.page.wait_for_function(
            "words => document.querySelector('#job-yaml textarea')?.value.includes(words)",
            arg=words,
        )
        return self.page.locator("#job-yaml textarea").input_value()

    def run(self):
        self.page.locator("#run").click()

    def status(self, words):
        self.page.wait_for_function(
            "words => document.querySelector('#status')?.textContent.includes(words)", arg=words
        )

    def picture(self, side):
        source = self.page.locator(f"#compare img.ac-{side}").get_attribute("src")
        return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")

    def close(self):
        self.context.close()
