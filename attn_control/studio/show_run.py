"""What a run made, as HTML: both sides, the figures, what fired. All that is text is escaped."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from attn_control.studio.page import WITH, WITHOUT
from attn_control.studio.show import CRISP, data_uri
from attn_control.studio.work import Result, Side

_WORDS = {
    "right": "all right",
    "present": "objects there",
    "bound": "colours on their objects",
    "relation": "relation",
    "background": "background",
    "texture": "texture",
    "frames": "frames right",
    "direction": "direction",
    "crossing": "crossing",
}


def compare(result: Result) -> str:
    """Both sides: a slider between two pictures, or two videos that play in step."""
    if not result.sides:
        return ""
    sides = [result.sides.get(WITHOUT), result.sides.get(WITH)]
    shown = [side for side in sides if side is not None]
    return _players(shown, result) if result.video else _pictures(shown, result)


def _pictures(sides: Sequence[Side], result: Result) -> str:
    names = {WITHOUT: "without control", WITH: "with control"}
    width, height = sides[0].size
    crisp = " ac-crisp" if max(width, height) < CRISP else ""
    images = "".join(
        f'<img class="ac-{side.variant}" src="{_uri(side)}" width="{width}" height="{height}" '
        f'alt="{escape(result.page.prompt)}, {names[side.variant]}">'
        for side in sides
    )
    tags = "".join(f'<span class="ac-tag ac-tag-{s.variant}">{s.variant}</span>' for s in sides)
    cut = ""
    if len(sides) == 2:
        cut = (
            '<div class="ac-cut" aria-hidden="true"></div>'
            '<input type="range" class="ac-slider" min="0" max="100" value="50" step="1" '
            'aria-label="how much of the picture without control is shown">'
        )
    return (
        f'<figure class="ac-compare{crisp}" style="aspect-ratio: {width} / {height}">'
        f"{images}{tags}{cut}</figure>"
    )


def _players(sides: Sequence[Side], result: Result) -> str:
    parts, count = [], 1
    for side in sides:
        frames = side.frames()
        count, (width, height) = len(frames), frames[0].size
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        crisp = " ac-crisp" if max(width, height) < CRISP else ""
        parts.append(
            f'<div class="ac-player"><div class="ac-film{crisp}" role="img" '
            f'aria-label="{escape(result.page.prompt)}, {side.variant} control" '
            f'data-columns="{columns}" data-rows="{rows}" style="aspect-ratio: {width} / {height}; '
            f"background-size: {100 * columns}% {100 * rows}%; "
            f'background-image: url({_film(frames, columns, rows)})"></div>'
            f'<span class="ac-tag ac-tag-{side.variant}">{side.variant}</span></div>'
        )
    return (
        f'<figure class="ac-players" data-count="{count}">'
        f'<div class="ac-films">{"".join(parts)}</div><div class="ac-controls">'
        '<button type="button" class="ac-play" aria-pressed="false">play</button>'
        f'<input type="range" class="ac-time" min="0" max="{count - 1}" value="0" step="1" '
        f'aria-label="frame of both videos"><output>1 of {count}</output></div></figure>'
    )


def _film(frames: Sequence[Any], columns: int, rows: int) -> str:
    """All frames on one sheet, row by row: the page shows one frame of both at the same time."""
    from PIL import Image

    width, height = frames[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % columns * width, number // columns * height))
    small = columns * width * rows * height < 2_000_000
    file = io.BytesIO()
    sheet.save(file, "PNG") if small else sheet.save(file, "JPEG", quality=90)
    return data_uri("png" if small else "jpeg", file.getvalue())


def _uri(side: Side) -> str:
    return data_uri("png", side.file.read_bytes())


def figures(result: Result, ended: bool = True) -> str:
    """The scorer's verdicts where there are some, and the times, side by side."""
    sides = [each for name in (WITHOUT, WITH) if (each := result.sides.get(name))]
    if not sides:
        return ""
    head = "".join(f'<th scope="col">{side.variant}</th>' for side in sides)
    rows = []
    if any(side.score for side in sides):
        keys = [key for key in _WORDS if any(key in (side.score or {}) for side in sides)]
        for key in keys:
            rows.append((_WORDS[key], [_verdict((side.score or {}).get(key)) for side in sides]))
    rows.append(("time per step", [_milliseconds(side.step_seconds) for side in sides]))
    rows.append(("whole time", [f"{side.seconds:.2f} s" for side in sides]))
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    told = escape(_difference(result, ended))
    return (
        f'<table class="ac-figures"><caption>{told}</caption><thead><tr>'
        f'<th scope="col">seed {result.page.seed}</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _difference(result: Result, ended: bool) -> str:
    if result.psnr is None:
        if WITH not in result.sides and not result.page.controls:
            return "No control is on: switch one on to see a difference."
        return f"The run under control {'was not finished' if ended else 'is under way'}."
    if math.isinf(result.psnr):
        return "Both sides are equal, pixel by pixel."
    return f"The two differ by {result.psnr:.1f} dB PSNR (the lower, the more)."


def _verdict(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        word, name = ("yes", "yes") if value else ("no", "no")
        return f'<span class="ac-{name}">{word}</span>'
    return f"{100 * value:.0f} %"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f} ms"


def report(result: Result) -> str:
    """What the session says fired: each control, where, when and at what cost."""
    if result.report is None:
        return ""
    rows = []
    for control in result.report["controls"]:
        where = ", ".join(
            _place(site) for site in control["sites"].values() if site["calls"]
        ) or escape(str(control.get("idle") or control.get("reason") or "nowhere"))
        seconds = control["extra"].get("seconds")
        cost = "-" if not seconds else f"{control['extra']['calls']} forwards, {seconds:.2f} s"
        cells = [escape(control["name"]), where, _steps(control["steps"]), cost]
        density = control.get("density", 1.0)
        cells.append("-" if density == 1.0 else f"{density:.3f}")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ("control", "fired at", "steps", "extra", "density")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    told = [escape(line) for line in [*result.report.get("notes", []), *result.notes]]
    return (
        '<div class="ac-scroll" tabindex="0" role="region" aria-label="session report"><table '
        f'class="ac-report"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        + "".join(f'<p class="ac-note">{line}</p>' for line in told)
    )


def _place(site: dict[str, Any]) -> str:
    label = escape(site["label"].removesuffix(".joint").removesuffix(".self"))
    heads = site["heads"]
    return f"{label}H{','.join(map(str, heads))}"


def _steps(by_run: dict[str, list[int]]) -> str:
    steps = sorted({step for run in by_run.values() for step in run})
    if not steps:
        return "none"
    if steps == list(range(steps[0], steps[-1] + 1)):
        return f"{steps[0]} to {steps[-1]}"
    return ", ".join(map(str, steps))
