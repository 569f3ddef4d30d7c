"""What a run made, as HTML: nothing here that came from outside is left unescaped."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from attn_control.studio.foreseen import Foreseen
from attn_control.studio.grid import Cells, Layer
from attn_control.studio.page import WITH, WITHOUT
from attn_control.studio.work import Result, Side

CRISP = 256  # pictures smaller than this are shown pixel by pixel
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


def alert(sentence: str) -> str:
    """A refusal, read out by screen readers; empty for none."""
    return f'<p class="ac-alert" role="alert">{escape(sentence)}</p>' if sentence else ""


def notes(lines: Sequence[str]) -> str:
    """Sentences that are no error."""
    return "".join(f'<p class="ac-note" role="status">{escape(line)}</p>' for line in lines)


def status(text: str, share: float | None) -> str:
    """Where a run is; share from 0 to 1, None when it has ended.

    Steps come many times a second: what stands before ": " is announced, the rest is seen.
    """
    told, colon, seen = text.partition(": ")
    line = f'<p class="ac-status"><span role="status">{escape(told)}</span>'
    line += f'<span aria-hidden="true">{colon}{escape(seen)}</span></p>'
    if share is None:
        return line
    bar = f'aria-label="progress of the run" max="100" value="{100 * share:.0f}"'
    return f"{line}<progress {bar}></progress>"


def grid(layers: Sequence[Layer], cells: Cells, label: str, whole: bool) -> str:
    """Layers down, heads across, a button each; ``whole``: layers only."""
    if not layers:
        return '<p class="ac-note">This model has no heads to click; write a selector.</p>'
    rows = []
    for place, layer in enumerate(layers):
        on = cells.get(layer.number, set())
        all_on = len(on) == layer.heads
        cell = _button(
            f"L{layer.number}",
            f"L{layer.number}, the whole layer",
            layer.number,
            None,
            all_on,
            not place,
        )
        heads = ""
        if not whole:
            heads = "".join(
                "<td>"
                + _button("", f"layer {layer.number} head {head}", layer.number, head, head in on)
                + "</td>"
                for head in range(layer.heads)
            )
        rows.append(f'<tr><th scope="row">{cell}</th>{heads}</tr>')
    most = max(layer.heads for layer in layers)
    heads = "" if whole else "".join(f'<th scope="col">H{head}</th>' for head in range(most))
    top = f'<thead><tr><th scope="col">layer</th>{heads}</tr></thead>'
    return (
        f'<div class="ac-grid{" ac-whole" if whole else ""}" role="group" tabindex="-1" '
        f'aria-label="{escape(label)}"><table>{top}<tbody>{"".join(rows)}</tbody></table></div>'
    )


def _button(
    text: str, label: str, layer: int, head: int | None, on: bool, first: bool = False
) -> str:
    where = f'data-layer="{layer}"' + (f' data-head="{head}"' if head is not None else "")
    return (
        f'<button type="button" {where} aria-pressed="{str(on).lower()}" aria-label="{label}" '
        f'tabindex="{0 if first else -1}" title="{label}">{text}</button>'
    )


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
    return _data("png" if small else "jpeg", file.getvalue())


def _uri(side: Side) -> str:
    return _data("png", side.file.read_bytes())


def _data(kind: str, raw: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def figures(result: Result) -> str:
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
    return (
        f'<table class="ac-figures"><caption>{escape(_difference(result))}</caption><thead><tr>'
        f'<th scope="col">seed {result.page.seed}</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _difference(result: Result) -> str:
    if result.psnr is None:
        if WITH not in result.sides and not result.page.controls:
            return "No control is on: switch one on to see a difference."
        return "The run under control is under way."
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


def foreseen(plans: Sequence[Foreseen]) -> str:
    """Masks of the controls that are on, and their density by step: a bar each, darker if dense."""
    return "".join(_foreseen(plan) for plan in plans)


def _foreseen(plan: Foreseen) -> str:
    frames, rows, columns = plan.place.shape
    size = f"{plan.place.tokens} tokens ({frames} x {rows} x {columns})"
    picture = '<p class="ac-note">The mask is chosen while it runs.</p>'
    if plan.mask is not None:
        file = io.BytesIO()
        plan.picture().save(file, "PNG")
        picture = (
            f'<img src="{_data("png", file.getvalue())}" alt="block mask of {plan.control}, '
            f'{plan.mask.density():.0%} of all pairs are on">'
        )
    bars = "".join(
        f'<rect x="{10 * step}" y="{100 - 100 * (value or 0):.1f}" width="8" '
        f'height="{100 * (value or 0):.1f}" class="ac-{outcome}"><title>step {step}: {outcome}'
        f"{'' if value is None else f', density {value:.2f}'}</title></rect>"
        for step, (outcome, value) in enumerate(zip(plan.outcomes, plan.densities, strict=True))
    )
    mean = "not known before it runs" if plan.amortised is None else f"{plan.amortised:.3f}"
    told = f"{plan.control}: density over the whole run {mean}, {size}."
    bound = f" Perhaps more: {escape(plan.bound)}." if plan.bound else ""
    return (
        f'<figure class="ac-mask"><div>{picture}</div><div><svg viewBox="0 0 '
        f'{10 * len(plan.outcomes)} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="density by step of {plan.control}">{bars}</svg>'
        f"<figcaption>{told}{bound} A bar is a step; a full one is dense.</figcaption></div>"
        "</figure>"
    )


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
