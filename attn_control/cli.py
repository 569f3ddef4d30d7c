"""The command line. Nothing heavy is imported before a command runs: --help must be instant."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from attn_control.errors import AttnControlError

app = typer.Typer(
    name="attn-control",
    help="Control the attention of any diffusers pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[
    Path, typer.Option("--out", "-o", help="Folder for images/, sheet.png and results.jsonl.")
]
Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:0 or mps; over the job's.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Render pictures anew that are already there.")
]


def _version(asked: bool) -> None:
    if asked:
        from attn_control import __version__

        typer.echo(f"attn-control {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Control the attention of any diffusers pipeline."""


@app.command()
def quickstart(
    out: Out = Path("out/quickstart"), device: Device = None, overwrite: Overwrite = False
) -> None:
    """Render the built-in job: no guidance, CFG, PAG, SoftPAG; print how often each is right."""

    def work(console: Any, log: Any) -> Any:
        from attn_control.render.command import quickstart_job, render

        return render(
            quickstart_job(), out, device=device, overwrite=overwrite, console=console, log=log
        )

    _guarded(work)


@app.command()
def render(
    job: Annotated[Path, typer.Argument(help="The job, a YAML file.", show_default=False)],
    out: Out,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Built-in name, folder or hub id; over the job's."),
    ] = None,
    device: Device = None,
) -> None:
    """Render a job: every variant, prompt and seed, a contact sheet, and results with scores."""

    def work(console: Any, log: Any) -> Any:
        from attn_control.render.command import render as run

        return run(
            job,
            out,
            model=model,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
            console=console,
            log=log,
        )

    _guarded(work)


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Examine it too: a built-in name, a folder (also of a denoiser alone)"
            " or a hub id.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda, cuda:0 or mps; for --model.")
    ] = "auto",
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Steps of the short runs; for --model.")
    ] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything here, to paste into an issue.")
    ] = None,
) -> None:
    """Check this machine and, with --model, that a model behaves under control; 1 on any FAIL."""
    found: list[bool] = []

    def work(console: Any, log: Any) -> None:
        from attn_control.doctor import examine, examine_model, failed, print_findings, write_json

        machine = print_findings(examine())
        checks = []
        if model is not None:
            log.print(f"examining {model} ...", style="dim")
            checks = print_findings(examine_model(model, device, steps))
        if json_file is not None:
            write_json(json_file, machine, checks, model)
        found.append(failed([*machine, *checks]))

    _guarded(work)
    if any(found):
        raise typer.Exit(1)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Show this one whole.")] = None,
) -> None:
    """List the named sets of controls, with their source and who verified them."""

    def work(console: Any, log: Any) -> None:
        from attn_control.catalog import describe, find_preset
        from attn_control.catalog import presets as all_presets

        if name is not None:
            typer.echo(describe(find_preset(name)))
            return
        known = all_presets()
        width = max(len(each.name) for each in known)
        for each in known:
            mark = "" if each.verified else " (not run by us)"
            typer.echo(f"{each.name:{width}}  {each.title}{mark}")

    _guarded(work)


@app.command()
def studio(
    port: Annotated[int | None, typer.Option("--port", help="Default: a free one.")] = None,
    host: Annotated[
        str, typer.Option("--host", help="0.0.0.0 serves every network that this machine is in.")
    ] = "127.0.0.1",
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda, cuda:0 or mps.")
    ] = "auto",
    models: Annotated[
        list[Path] | None,
        typer.Option("--models", help="A folder whose models visitors may name; may be repeated."),
    ] = None,
    allow_hub: Annotated[
        bool, typer.Option("--allow-hub", help="Let visitors name hub ids, which are downloaded.")
    ] = False,
    max_pixels: Annotated[int, typer.Option("--max-pixels", min=64)] = 1024 * 1024,
    max_frames: Annotated[int, typer.Option("--max-frames", min=1)] = 81,
    max_steps: Annotated[int, typer.Option("--max-steps", min=1)] = 100,
    max_seconds: Annotated[float, typer.Option("--max-seconds", min=1)] = 900.0,
    browser: Annotated[bool, typer.Option("--browser", help="Open one.")] = False,
) -> None:
    """Serve the studio, a page in the browser: pictures without and with control, side by side."""

    def work(console: Any, log: Any) -> None:
        from attn_control.studio import Settings
        from attn_control.studio.launch import launch

        settings = Settings.of(
            device=device,
            folders=tuple(models or ()),
            allow_hub=allow_hub,
            pixels=max_pixels,
            frames=max_frames,
            steps=max_steps,
            seconds=max_seconds,
        )
        log.print("opening the studio ...", style="dim")
        launch(settings, host=host, port=port, browser=browser)

    _guarded(work)


@app.command()
def mask(
    pattern: Annotated[
        str,
        typer.Argument(
            help="radial, neighborhood, tiles, band, ...; several joined by +.", show_default=False
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(help="Of the pattern, such as kernel_size=3,5,5.", show_default=False),
    ] = None,
    grid: Annotated[
        str, typer.Option("--grid", help="Tokens: frames,height,width, or height,width.")
    ] = "21,30,52",
    block: Annotated[int, typer.Option("--block", min=1, help="Tokens a block.")] = 128,
    tile: Annotated[
        str | None, typer.Option("--tile", help="Tokens of a tile along each axis: tiled order.")
    ] = None,
    text_before: Annotated[int, typer.Option("--text-before", min=0)] = 0,
    text_after: Annotated[int, typer.Option("--text-after", min=0)] = 0,
    png: Annotated[Path | None, typer.Option("--png", help="Draw it into this file.")] = None,
) -> None:
    """Say what a mask costs and covers, and draw it: blocks, keys by token, coverage by row."""

    def work(console: Any, log: Any) -> None:
        from attn_control.masks.coverage import describe, picture
        from attn_control.masks.grid import Grid
        from attn_control.masks.patterns import make

        if png is not None and not png.parent.is_dir():
            raise AttnControlError(f"mask: there is no folder {png.parent} for --png {png}")
        tokens = Grid(
            _sizes("--grid", grid),
            block,
            None if tile is None else _sizes("--tile", tile),
            before=text_before,
            after=text_after,
        )
        made = make(pattern, tokens, options or [])
        for line in describe(made, tokens):
            typer.echo(line)
        if png is not None:
            picture(made, tokens).save(png, "PNG")
            typer.echo(f"drawn: {png}")

    _guarded(work)


def _sizes(option: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise AttnControlError(f"mask: {option} expects sizes such as 21,30,52, got {text!r}")
    return tuple(int(part) for part in parts)


@app.command("eval")
def evaluate(
    suite: Annotated[
        str,
        typer.Argument(help="A suite by name, or a YAML file of one's own.", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default out/eval-SUITE.")] = None,
    prompts: Annotated[
        int | None, typer.Option("--prompts", min=5, help="The short form: so many prompts a job.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, render nothing.")
    ] = False,
    overwrite: Overwrite = False,
    publish: Annotated[
        Path | None, typer.Option("--publish", help="A docs folder that takes the result.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            min=1,
            help="Processes that render side by side; default one a core, on a GPU one in all.",
        ),
    ] = None,
) -> None:
    """Measure methods on the built-in models, with intervals; an interrupted run goes on."""

    def work(console: Any, log: Any) -> Any:
        from attn_control.eval.command import evaluate as run

        return run(
            suite,
            out or Path("out") / f"eval-{Path(suite).stem}",
            spread=prompts,
            overwrite=overwrite,
            dry_run=dry_run,
            publish=publish,
            jobs=jobs,
            console=console,
            log=log,
        )

    _guarded(work)


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # a file or a pipe has no width; 80 would break the table
    return console


def _guarded(work: Callable[[Any, Any], Any]) -> None:
    """Run a command; errors become one message and exit code 2, an interrupted run 130."""
    console, log = _console(), _console(stderr=True)
    before: Any = None
    try:
        if threading.current_thread() is threading.main_thread():
            # A terminated job (a scheduler, a closing container) ends as cleanly as Ctrl-C.
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        outcome = work(console, log)
    except AttnControlError as error:
        # Never through rich's markup: a value like [/b] is text.
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    if outcome is not None and outcome.interrupted:
        raise typer.Exit(130)
