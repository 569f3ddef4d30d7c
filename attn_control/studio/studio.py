"""What the page's events do, without the page: models, runs, jobs, and whose they are."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_control.studio.facts import Facts
from attn_control.studio.foreseen import Foreseen, check, foresee
from attn_control.studio.form import Form, Method
from attn_control.studio.models import Shelf
from attn_control.studio.opened import open_job
from attn_control.studio.page import Page, job_of, page_of
from attn_control.studio.pictures import Pictures
from attn_control.studio.runner import Run, Runner
from attn_control.studio.settings import Refused, Settings
from attn_control.studio.uploads import text_of_upload
from attn_control.studio.work import Result, make


class Studio:
    """One server: its settings, its device and its folder, which goes when it closes.

    ``owner`` is a browser's page throughout: whose run is cancelled, and whose goes with the page.
    """

    def __init__(self, settings: Settings, methods: tuple[Method, ...]) -> None:
        self.settings, self.methods = settings, methods
        self.shelf = Shelf(settings)
        self.runner = Runner(settings)
        self.pictures = Pictures(settings)
        self.folder = Path(tempfile.mkdtemp(prefix="attn-control-studio-"))
        self._runs: deque[Path] = deque()
        self._loading: dict[str, Run] = {}
        self._lock = threading.Lock()

    def facts(self, model: Any) -> Facts:
        """Of a model, loaded in its turn where it is not yet. Raises Refused at "model"."""
        known = self.shelf.known(model)
        if known is not None:
            return known
        with self._lock:  # all who ask meanwhile wait for the same loading
            run = self._loading.get(model)
            if run is None or not run.open:
                run = self.runner.submit(f"model {model}", lambda run: self.shelf.facts(model))
                self._loading = {model: run}
        run.wait()
        if run.error is not None:
            raise run.error
        if run.result is None:
            raise Refused("model", "loading was cancelled")
        return run.result

    def submit(self, owner: str, form: Mapping[str, Any]) -> Run:
        """Check the form and put its run in the line; ``run.result`` is a Result, in part at first.

        Raises:
            Refused: with its place on the page; from the run itself it comes as ``run.error``.
        """
        facts = self.facts(form.get("model"))
        page = page_of(form, facts, self.methods, self.settings)
        check(page, facts)
        picture = self.pictures.read(page.picture) if page.picture else None
        return self.runner.submit(owner, lambda run: self._make(page, facts, run, picture))

    def _make(self, page: Page, facts: Facts, run: Run, picture: bytes | None) -> Result:
        return make(page, facts, self.shelf, self._new_folder(), run, picture)

    def _new_folder(self) -> Path:
        """A folder for one run; the oldest goes where there are too many."""
        folder = self.folder / secrets.token_hex(8)
        with self._lock:
            self._runs.append(folder)
            while len(self._runs) > self.settings.kept:
                shutil.rmtree(self._runs.popleft(), ignore_errors=True)
        return folder

    def job(self, form: Mapping[str, Any]) -> str:
        """The form as the YAML of a job. Raises Refused for a form that is no run."""
        facts = self.facts(form.get("model"))
        return job_of(page_of(form, facts, self.methods, self.settings), facts, self.shelf.device)

    def foresee(self, form: Mapping[str, Any]) -> list[Foreseen]:
        """What the page's sparse controls would do. Raises Refused."""
        facts = self.facts(form.get("model"))
        return foresee(page_of(form, facts, self.methods, self.settings), facts)

    def open(self, text: str) -> tuple[Form, Facts, list[str]]:
        """A job as a form, in its turn where its model has to be loaded. Raises Refused."""
        return open_job(text, self.facts, self.methods, self.settings, self.pictures)

    def open_upload(self, raw: bytes) -> tuple[Form, Facts, list[str]]:
        """The same for an uploaded file."""
        return self.open(text_of_upload(raw, self.settings))

    def cancel(self, owner: str) -> bool:
        """Cancel what the owner has in the line or under way; True if there was something."""
        return self.runner.cancel(owner)

    def close(self) -> None:
        """Cancel all, and remove every picture."""
        self.runner.close()
        shutil.rmtree(self.folder, ignore_errors=True)
