"""Parts of the page as HTML: nothing here that came from outside is left unescaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from attn_control.studio.foreseen import Foreseen
from attn_control.studio.grid import Cells, Layer

CRISP = 256  # pictures smaller than this are shown pixel by pixel


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


def picture(raw: bytes) -> str:
    """A reference picture, small; "" for none."""
    if not raw:
        return ""
    from PIL import Image

    small = Image.open(io.BytesIO(raw))
    width, height = small.size
    small.thumbnail((256, 256))
    file = io.BytesIO()
    small.save(file, "PNG")
    crisp = ' class="ac-crisp"' if max(width, height) < CRISP else ""
    return (
        f'<figure class="ac-reference"><img{crisp} src="{data_uri("png", file.getvalue())}" '
        f'alt="reference picture"><figcaption>{width} x {height} pixels</figcaption></figure>'
    )


def picture_link(name: str, raw: bytes) -> str:
    """Where the file comes from that a job with a picture reads; "" for none."""
    if not name:
        return ""
    link = f'<a href="{data_uri("png", raw)}" download="{escape(name)}">Download {escape(name)}</a>'
    return f'<p class="ac-note">The job reads the reference picture beside it. {link}</p>'


def data_uri(kind: str, raw: bytes) -> str:
    """A file that is part of the page."""
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def foreseen(plans: Sequence[Foreseen]) -> str:
    """Masks of the controls that are on, and their density by step: a bar each, darker if dense."""
    return "".join(_foreseen(plan) for plan in plans)


def _foreseen(plan: Foreseen) -> str:
    size, told = (
        "tokens differ from layer to layer",
        "No one mask: tokens differ from layer to layer.",
    )
    if plan.place is not None:
        frames, rows, columns = plan.place.shape
        size = f"{plan.place.tokens} tokens ({frames} x {rows} x {columns})"
        told = "No mask yet: it is chosen while it runs."
    picture = f'<p class="ac-note">{told}</p>'
    if plan.mask is not None:
        file = io.BytesIO()
        plan.picture().save(file, "PNG")
        picture = (
            f'<img src="{data_uri("png", file.getvalue())}" alt="block mask of {plan.control}, '
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
