"""The page's events: each reads the form, asks the studio, and says what to show."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import gradio as gr

from attn_control.errors import AttnControlError
from attn_control.studio import show, show_run
from attn_control.studio.examples import EXAMPLES
from attn_control.studio.facts import Facts
from attn_control.studio.form import Form, form_of
from attn_control.studio.layout import GRIDS, Ui, grid_html
from attn_control.studio.page import WITH, WITHOUT, start_form
from attn_control.studio.runner import Run
from attn_control.studio.settings import Refused
from attn_control.studio.studio import Studio
from attn_control.studio.tabs import TAB_OF
from attn_control.studio.tabs.job import APPLY, TAKEN, UPLOAD
from attn_control.studio.turns import ASK, SHOW, cleared, told_at

POLL = 0.05  # seconds between two looks at a run
TELL = 0.4  # between two lines on its progress: each has the browser go over the whole page
SHOWN = 40  # pictures that the gallery keeps
_QUICK: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def owner_of(request: gr.Request) -> str:
    """The browser's page; a run is cancelled by the page that began it, and by no other."""
    return str(request.session_hash)


def connect(page: gr.Blocks, ui: Ui, studio: Studio) -> None:
    """Bind every event."""
    _Events(ui, studio).bind(page)


class _Events:
    def __init__(self, ui: Ui, studio: Studio) -> None:
        self.ui, self.studio = ui, studio

    # ---- from names to components

    def bind(self, page: gr.Blocks) -> None:
        ui, parts = self.ui, self.ui.parts
        # What a run may refuse is shown by the browser: a run that has the tabs among its outputs
        # would have Gradio walk over all that is in them, whenever it tells how far it is.
        refused = ui.add("refused", gr.Textbox(visible=False))
        results = ["status", "compare", "figures", "report", "gallery", "history", "go", "cancel"]
        shown = self.named([*results, "seed", "refused"])
        form = [*ui.fields, parts["dice"], parts["history"]]
        # The studio's own line keeps the device to one run; here only as many as may wait.
        pressed = [parts["go"].click, parts["prompt"].submit]
        ran = gr.on(
            pressed,
            self.run,
            form,
            shown,
            concurrency_limit=self.studio.settings.waiting + 2,
            **_QUICK,
        )
        gr.on(pressed, None, None, self.named(ui.alerts), js=cleared(ui.alerts), **_QUICK)
        ran.then(None, refused, self.named(ui.places), js=told_at(ui.places), **_QUICK)
        parts["cancel"].click(self.cancel, None, None, queue=False, **_QUICK)
        filled = self.named([*self.fillable(), *ui.places, "job.notes", "job.taken"])
        model = [parts["model"], parts["prompt"]]
        fills = [parts["model"].input(self.choose, model, filled, **_QUICK)]
        text = parts["job.text"]
        upload, taken = parts["job.upload"], parts["job.taken"]
        opened = [
            parts["job.apply"].click(self.apply, [text], filled, js=APPLY, **_QUICK),
            upload.upload(self.upload, [upload, text], filled, js=UPLOAD, **_QUICK),
        ]
        fills += [each.then(None, [taken], None, js=TAKEN, **_QUICK) for each in opened]
        for number in range(len(EXAMPLES)):
            button = parts[f"example.{number}"]
            fills.append(button.click(self.example(number), None, filled, **_QUICK))
        pictured = self.named([*self.pictured(""), *ui.places])
        upload, remove = parts["picture.upload"], parts["picture.remove"]
        fills.append(upload.upload(self.picture, [upload], pictured, **_QUICK))
        fills.append(
            remove.click(lambda: self.parts_of(self.pictured("")), None, pictured, **_QUICK)
        )
        self.write_along(page, fills)
        page.unload(self.leave)

    def write_along(self, page: gr.Blocks, fills: list[Any]) -> None:
        """The job and what is foreseen follow the fields."""
        ui, parts = self.ui, self.ui.parts
        shown = [parts["job.text"], parts["foreseen"]]
        turn = ui.add("turn", gr.Number(0, visible=False))
        answer = [turn, gr.Textbox(visible=False), gr.HTML(visible=False)]
        asks: dict[str, Any] = {"queue": False, "js": ASK, **_QUICK}
        changes = [part.change for part in ui.fields]
        asked = [
            gr.on(
                [*changes, page.load], self.write, [*ui.fields, turn], answer,
                trigger_mode="always_last", **asks,
            ),
            # Fields that are out of sight report no change.
            *(fill.then(self.write, [*ui.fields, turn], answer, **asks) for fill in fills),
        ]  # fmt: skip
        for each in asked:
            each.then(None, answer, shown, js=SHOW, **_QUICK)

    def named(self, names: list[str]) -> list[Any]:
        return [self.ui.parts[name] for name in names]

    def parts_of(self, changes: Mapping[str, Any]) -> dict[Any, Any]:
        """Changes by name as Gradio takes them."""
        return {self.ui.parts[name]: value for name, value in changes.items()}

    def fillable(self) -> list[str]:
        grids = [name for name in self.ui.parts if name.endswith(".grid")]
        shown = [name for name in self.ui.parts if name.startswith(("picture.", "job.picture"))]
        return [*self.ui.inputs, *grids, *shown]

    def form(self, values: tuple[Any, ...]) -> Form:
        return dict(zip(self.ui.inputs, values, strict=True))

    def refusals(self, error: AttnControlError | None) -> dict[str, Any]:
        """All places, of which one has a sentence, and is brought into sight."""
        said: dict[str, Any] = dict.fromkeys(self.ui.alerts, "")
        if error is None:
            return said
        at = getattr(error, "place", "run")
        said[f"alert.{at}" if f"alert.{at}" in said else "alert.run"] = show.alert(str(error))
        tab = TAB_OF.get(at)
        if tab is not None:
            said["alert.run"] = show.alert(f"See {at} in the tab {tab}.")
            said["tabs"] = gr.update(selected=tab)
            said[f"{at}.fold"] = gr.update(open=True)
        return said

    def refused(self, error: AttnControlError | None) -> dict[str, Any]:
        """The same for `told_at`: only what is to be changed."""
        said = {name: change for name, change in self.refusals(error).items() if change}
        return {"refused": json.dumps(said) if said else None}

    def filled(self, form: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
        """The page's fields and grids with these values."""
        changes: dict[str, Any] = {name: form[name] for name in self.ui.inputs if name in form}
        changes["frames"] = gr.update(value=form.get("frames") or 1, visible=facts.video)
        changes["cfg"] = gr.update(value=form.get("cfg") or 1.0, visible=facts.cfg is not None)
        changes["negative"] = gr.update(value=form.get("negative") or "", visible=facts.negative)
        changes |= self.pictured(form.get("picture") or "")
        changes["picture.box"] = gr.update(visible=bool(facts.picture))
        for method in self.studio.methods:
            for field in method.fields:
                if field.kind in GRIDS:
                    name = f"{method.control}.{field.option}"
                    label = f"{field.label} of {method.control}"
                    text = form.get(name, "")
                    whole = field.kind == "layers"
                    changes[f"{name}.grid"] = grid_html(facts, text, label, whole)
        return changes

    def pictured(self, name: str) -> dict[str, Any]:
        """The reference picture of that name on the page; "" for none."""
        raw = self.studio.pictures.read(name) if name else b""
        return {
            "picture": name,
            "picture.shown": show.picture(raw),
            "picture.remove": gr.update(visible=bool(name)),
            "job.picture": show.picture_link(name, raw),
        }

    # ---- a run

    async def run(self, request: gr.Request, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        *fields, dice, history = values
        form, owner = self.form(tuple(fields)), owner_of(request)
        changes: dict[str, Any] = {"refused": None}
        if dice is True:
            form["seed"] = changes["seed"] = secrets.randbelow(2**31)
        busy = {"go": gr.update(interactive=False), "cancel": gr.update(interactive=True)}
        idle = {"go": gr.update(interactive=True), "cancel": gr.update(interactive=False)}
        yield self.parts_of({**changes, **busy, "status": show.status("preparing", 0.0)})
        try:
            run = await asyncio.to_thread(self.studio.submit, owner, form)
        except Refused as error:
            yield self.parts_of({**self.refused(error), **idle, "status": ""})
            return
        try:
            said, told, sides = "", 0.0, 0
            while not run.wait(0):
                line, now = self.progress(run), {}
                if run.result is not None and len(run.result.sides) > sides:
                    sides = len(run.result.sides)
                    now = await asyncio.to_thread(self.results, run)
                if now or (line != said and time.monotonic() - told >= TELL):
                    said, told = line, time.monotonic()
                    yield self.parts_of({**now, "status": line})
                await asyncio.sleep(POLL)
        finally:
            if run.open:  # the browser went away
                run.cancel()
        shown = await asyncio.to_thread(self.results, run)  # films of long videos take a while
        ended = {**shown, **self.refused(run.error), **idle}
        ended["status"] = show.status(_ENDED[run.state], None)
        if run.state == "done":
            ended["history"] = history = (_pictures(run) + list(history or []))[:SHOWN]
            ended["gallery"] = history
        yield self.parts_of(ended)

    def progress(self, run: Run) -> str:
        ahead = self.studio.runner.ahead(run)
        return show.status(f"waiting, {ahead} before you" if ahead else run.text, run.share)

    def results(self, run: Run) -> dict[str, Any]:
        """What is finished so far; the last run's pictures stay until there is something new."""
        result = run.result
        if result is None or not result.sides:
            return {}
        return {
            "compare": show_run.compare(result),
            "figures": show_run.figures(result, ended=not run.open),
            "report": show_run.report(result),
        }

    def cancel(self, request: gr.Request) -> None:
        # Says nothing itself: its answer may come after the run's own last word.
        self.studio.cancel(owner_of(request))

    def leave(self, request: gr.Request) -> None:
        self.studio.cancel(owner_of(request))

    # ---- what fills the page

    def fill(
        self, make: Callable[[], tuple[Form, Facts, list[str]]], taken: str | None = None
    ) -> Any:
        """``taken``: what stood in the job's box, and is given up once the page is filled."""
        try:
            form, facts, lines = make()
            changes = {**self.filled(form, facts), **self.refusals(None)}
        except Refused as error:
            return self.parts_of({**self.refusals(error), "job.notes": "", "job.taken": None})
        return self.parts_of({**changes, "job.notes": show.notes(lines), "job.taken": taken})

    def choose(self, model: Any, prompt: Any) -> Any:
        """Another model: its sampler and its grids; heads of the old one go, and so does a prompt
        that was an example's. Words of the visitor's own stay.
        """

        def make() -> tuple[Form, Facts, list[str]]:
            facts = self.studio.facts(model)
            own = next((each for each in EXAMPLES if each.model == facts.model), None)
            form = start_form(facts, self.studio.methods)
            if own is not None and prompt in [each.prompt for each in EXAMPLES]:
                form["prompt"] = own.prompt
            return form, facts, []

        return self.fill(make)

    def apply(self, text: Any) -> Any:
        return self.fill(lambda: self.studio.open(str(text)), str(text))

    def upload(self, raw: Any, text: Any) -> Any:
        data = raw if isinstance(raw, bytes) else b""
        return self.fill(lambda: self.studio.open_upload(data), str(text))

    def picture(self, raw: Any) -> Any:
        try:
            name = self.studio.pictures.take(raw if isinstance(raw, bytes) else b"")
        except Refused as error:
            return self.parts_of(self.refusals(error))
        return self.parts_of({**self.pictured(name), **self.refusals(None)})

    def example(self, number: int) -> Callable[..., Any]:
        example = EXAMPLES[number]

        def make() -> tuple[Form, Facts, list[str]]:
            facts = self.studio.facts(example.model)
            shown, _ = form_of(example.controls, self.studio.methods)
            form = start_form(facts, self.studio.methods) | shown
            form |= {"model": example.model, "prompt": example.prompt}
            if example.reference is not None:
                form["picture"] = self.studio.pictures.draw(*example.reference)
            return form | ({} if example.cfg is None else {"cfg": example.cfg}), facts, []

        return lambda: self.fill(make)

    def write(self, *values: Any) -> tuple[Any, str, str]:
        """The job of the page as it is now, and what its sparse controls would do."""
        *fields, turn = values
        return turn, *self.written(self.form(tuple(fields)))

    def written(self, form: Form) -> tuple[str, str]:
        try:
            job = self.studio.job(form)
        except Refused as error:
            return f"# no job yet: {error}", ""
        try:
            return job, show.foreseen(self.studio.foresee(form))
        except Refused as error:
            return job, show.alert(str(error))


_ENDED = {"done": "done", "cancelled": "cancelled", "failed": "not finished"}


def _pictures(run: Run) -> list[str]:
    """Files for the gallery. Without captions, which the gallery hides from screen readers."""
    return [str(run.result.sides[n].file) for n in (WITH, WITHOUT) if n in run.result.sides]
