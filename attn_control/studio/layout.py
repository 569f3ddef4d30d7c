"""How a method's section lies on the page: the only knowledge of Gradio that tabs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from attn_control.studio import show
from attn_control.studio.facts import Facts
from attn_control.studio.form import Field, Method
from attn_control.studio.grid import cells_of, text_of
from attn_control.studio.settings import Refused

STATIC = Path(__file__).with_name("static")
GRIDS = ("heads", "layers")
Known = Callable[[Any], "Facts | None"]


class Ui:
    """The page's components by name. `inputs` are those that a form is read from, in order."""

    def __init__(self, facts: Facts, form: dict[str, Any], known: Known) -> None:
        self.facts, self.form, self.known = facts, form, known
        self.parts: dict[str, Any] = {}
        self.inputs: list[str] = []

    def facts_of(self, model: Any) -> Facts:
        """Of the model that is chosen; while that is none yet, of the one the page opened with."""
        try:
            return self.known(model) or self.facts
        except Refused:
            return self.facts

    def add(self, name: str, part: Any) -> Any:
        """A component that events may change."""
        self.parts[name] = part
        return part

    def ask(self, name: str, part: Any) -> Any:
        """One that is a field of the form."""
        self.inputs.append(name)
        return self.add(name, part)

    def alert(self, place: str) -> Any:
        """Where the refusals of a place are shown."""
        return self.add(f"alert.{place}", gr.HTML("", elem_classes="ac-place", padding=False))

    @property
    def fields(self) -> list[Any]:
        return [self.parts[name] for name in self.inputs]

    @property
    def alerts(self) -> list[str]:
        return [name for name in self.parts if name.startswith("alert.")]

    @property
    def places(self) -> list[str]:
        """What a refusal may change: its sentence, and the tab and the fold that it stands in."""
        return [*self.alerts, "tabs", *(name for name in self.parts if name.endswith(".fold"))]


def section(ui: Ui, method: Method) -> None:
    """A method: what it does, its switch, its grid, its fields, and its refusals."""
    with gr.Accordion(method.title, open=False, elem_id=f"section-{method.control}") as fold:
        ui.add(f"{method.control}.fold", fold)
        gr.HTML(
            f'<p class="ac-about">{method.about} '
            f'<a href="{method.paper}" target="_blank" rel="noreferrer">{method.paper_name}</a></p>'
        )
        on = ui.ask(f"{method.control}.on", gr.Checkbox(label=f"use {method.control}"))
        ui.alert(method.control)
        for field in method.fields:
            _field(ui, method, field)
        more = gr.Textbox(
            label="more options",
            info="as in a job, for example {parallel: 0, limit: 0.3}",
            placeholder="none",
            max_length=2_000,
        )
        ui.ask(f"{method.control}.more", more)
    on.change(
        lambda switched: gr.update(label=f"{method.title}{' · on' if switched else ''}"),
        on,
        fold,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )


def _field(ui: Ui, method: Method, field: Field) -> None:
    name, start = f"{method.control}.{field.option}", ui.form
    if field.kind == "window":
        with gr.Row():
            for end in ("from", "to"):
                key = f"{method.control}.{end}"
                part = gr.Slider(
                    0,
                    1,
                    value=start[key],
                    step=0.01,
                    label=end,
                    info="share of the steps",
                    min_width=140,
                )
                ui.ask(key, part)
    elif field.kind in GRIDS:
        _grid(ui, method, field)
    elif field.kind in ("number", "whole", "share"):
        step = 1 if field.kind == "whole" else field.step
        part = gr.Slider(
            field.low, field.high, value=start[name], step=step, label=field.label, info=field.info
        )
        ui.ask(name, part)
    elif field.kind == "choice":
        choices = list(field.choices)
        part = gr.Dropdown(choices, value=start[name], label=field.label, info=field.info or None)
        ui.ask(name, part)
    elif field.kind == "switch":
        ui.ask(name, gr.Checkbox(value=start[name], label=field.label, info=field.info or None))
    else:
        part = gr.Textbox(value=start[name], label=field.label, info=field.info, max_length=2_000)
        ui.ask(name, part)


def grid_html(facts: Facts, text: str, label: str, whole: bool) -> str:
    """The grid of a model with the heads of a selector on."""
    return show.grid(facts.layers, cells_of(text or "", facts.layers), label, whole)


def _grid(ui: Ui, method: Method, field: Field) -> None:
    """The buttons and the selector beside them, each of which changes the other."""
    name, whole = f"{method.control}.{field.option}", field.kind == "layers"
    label = f"{field.label} of {method.control}"
    grid = ui.add(
        f"{name}.grid",
        gr.HTML(
            grid_html(ui.facts, ui.form[name], label, whole),
            js_on_load=(STATIC / "grid.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            elem_id=f"grid-{method.control}",
        ),
    )
    text = gr.Textbox(value=ui.form[name], label=field.label, info=field.info, max_length=2_000)
    ui.ask(name, text)

    def picked(before: str, model: str, event: gr.EventData) -> tuple[Any, bool]:
        facts = ui.facts_of(model)
        cells: dict[int, set[int]] = {}
        for cell in event.cells if isinstance(event.cells, list) else []:
            layer = next((each for each in facts.layers if each.number == cell[0]), None)
            if layer is not None:
                on = range(layer.heads) if whole else [cell[1]]
                cells.setdefault(layer.number, set()).update(on)
        return text_of(cells, facts.layers, before if isinstance(before, str) else ""), True

    quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    grid.pick(
        picked,
        [text, ui.parts["model"]],
        [text, ui.parts[f"{method.control}.on"]],
        **quick,
    )
    text.input(
        lambda typed, model: grid_html(ui.facts_of(model), typed, label, whole),
        [text, ui.parts["model"]],
        grid,
        **quick,
    )
