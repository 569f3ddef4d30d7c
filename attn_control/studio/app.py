"""The page: how its parts lie, and which event calls what. What they do is in `studio.py`."""

from __future__ import annotations

import gradio as gr

from attn_control import zoo
from attn_control.studio import events
from attn_control.studio.examples import EXAMPLES
from attn_control.studio.layout import STATIC, Ui
from attn_control.studio.page import start_form
from attn_control.studio.settings import Settings
from attn_control.studio.studio import Studio
from attn_control.studio.tabs import TABS

TITLE = "attn-control studio"
HEAD = (
    f"<h1>{TITLE}</h1><p>Control the attention of a diffusion model, head by head: the same prompt "
    "and seed, without and with.</p>"
)
EMPTY = (
    '<div class="ac-empty"><p>Press <b>Run</b>: two pictures of the same seed appear here, one '
    "without and one with control.</p></div>"
)


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio; the first model is loaded here, so that the first run is quick."""
    first = zoo.NAMES[0]
    facts = studio.facts(first)
    form = start_form(facts, studio.methods)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        ui = Ui(facts, form, studio.shelf.known)
        gr.HTML(HEAD, elem_id="ac-head", apply_default_css=False)
        with gr.Row(equal_height=False, elem_id="ac-page"):
            with gr.Column(scale=5, min_width=320, elem_id="ac-asks"):
                with gr.Column(elem_id="ac-prompt"):
                    _prompt(ui, studio.settings, first)
                with gr.Column(elem_id="ac-methods"):
                    _advanced(ui, studio.settings)
                    with ui.add("tabs", gr.Tabs()):
                        for tab in TABS:
                            with gr.Tab(tab.NAME, id=tab.NAME):
                                tab.layout(ui)
            with gr.Column(scale=6, min_width=320, elem_id="ac-results"):
                _results(ui)
        events.connect(page, ui, studio)
    return page


def _prompt(ui: Ui, settings: Settings, first: str) -> None:
    others = ["a folder of this server"] if settings.folders else []
    others += ["a hub id, owner/name"] if settings.allow_hub else []
    ui.ask(
        "model",
        gr.Dropdown(
            list(zoo.NAMES),
            value=first,
            label="model",
            info=f"built in, or {' or '.join(others)}" if others else "built in",
            allow_custom_value=True,
            elem_id="model",
        ),
    )
    ui.alert("model")
    ui.ask(
        "prompt",
        gr.Textbox(
            EXAMPLES[0].prompt,
            label="prompt",
            lines=2,
            max_lines=6,
            max_length=settings.text,
            elem_id="prompt",
        ),
    )
    ui.alert("prompt")
    _reference(ui)
    with gr.Row():
        ui.add("go", gr.Button("Run", variant="primary", min_width=90, elem_id="run"))
        cancel = gr.Button("Cancel", interactive=False, min_width=90, elem_id="cancel")
        ui.add("cancel", cancel)
    ui.alert("run")
    ui.add("status", gr.HTML("", elem_id="status"))
    with gr.Accordion("Examples", open=True), gr.Row(elem_classes="ac-examples"):
        for number, example in enumerate(EXAMPLES):
            button = gr.Button(example.label, size="sm", min_width=140)
            ui.add(f"example.{number}", button)


def _reference(ui: Ui) -> None:
    """A picture beside the prompt, in sight for models that take one."""
    ui.ask("picture", gr.State(""))
    with ui.add("picture.box", gr.Column(visible=bool(ui.facts.picture), elem_id="reference")):
        ui.add("picture.shown", gr.HTML("", apply_default_css=False, padding=False))
        with gr.Row():
            upload = gr.UploadButton(
                "Upload a reference picture",
                file_types=[".png", ".jpg", ".jpeg", ".webp"],
                type="binary",
                size="sm",
                elem_id="reference-upload",
            )
            ui.add("picture.upload", upload)
            remove = gr.Button("Remove it", size="sm", visible=False, elem_id="reference-remove")
            ui.add("picture.remove", remove)
    ui.alert("picture")


def _advanced(ui: Ui, settings: Settings) -> None:
    form, facts = ui.form, ui.facts
    with gr.Accordion("Advanced: seed, steps, CFG, size", open=False, elem_id="advanced"):
        ui.alert("sampler")
        with gr.Row():
            ui.ask("seed", gr.Number(form["seed"], label="seed", precision=0, elem_id="seed"))
            ui.add("dice", gr.Checkbox(label="a new seed each run", elem_id="dice"))
        steps, most = form["steps"], settings.steps
        with gr.Row():
            ui.ask("steps", gr.Slider(1, most, value=steps, step=1, label="steps", elem_id="steps"))
            cfg = gr.Slider(0, 30, value=form["cfg"], step=0.1, label="CFG scale", elem_id="cfg")
            ui.ask("cfg", cfg)
        negative = gr.Textbox(
            label="negative prompt", max_length=settings.text, visible=facts.negative
        )
        ui.ask("negative", negative)
        with gr.Row():
            for side in ("width", "height"):
                ui.ask(side, gr.Number(form[side], label=side, precision=0, min_width=90))
            frames = gr.Number(
                form["frames"] or 1, label="frames", precision=0, visible=facts.video, min_width=90
            )
            ui.ask("frames", frames)


def _results(ui: Ui) -> None:
    ui.add(
        "compare",
        gr.HTML(
            EMPTY,
            js_on_load=(STATIC / "compare.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            elem_id="compare",
        ),
    )
    ui.add("figures", gr.HTML("", apply_default_css=False, elem_id="figures"))
    with gr.Accordion("Session report: what fired", open=True):
        ui.add("report", gr.HTML("", apply_default_css=False, elem_id="report"))
    ui.add("history", gr.State([]))
    ui.add(
        "gallery",
        gr.Gallery(
            label="runs of this page, both sides",
            columns=4,
            height="auto",
            format="png",
            interactive=False,
            buttons=["download"],
            elem_id="gallery",
        ),
    )
