"""Where tokens stand, found out by moving one of them and seeing which index of q or k moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_control.call import Layout, Segment, Site
from attn_control.doctor.finding import Finding, Skipped
from attn_control.doctor.patient import Patient
from attn_control.doctor.subject import copied

SMALL = 1e-3  # of the largest movement: below it, rounding


def layout(p: Patient) -> Finding:
    """Lengths at every site, and the index of single tokens at the first site of each slot."""
    if p.family.layout is None:
        raise Skipped(
            "attach-only: this family's order of tokens is not known; controls of all tokens work"
        )
    known = [(site, p.layout(site)) for site in p.sites]
    if all(found is None for _, found in known):
        raise Skipped("the rows of this call have no common order of tokens, or no common softmax")
    wrong = [text for site, found in known if found and (text := _lengths(p, site, found))]
    if wrong:
        more = f" (and {len(wrong) - 1} more sites)" if len(wrong) > 1 else ""
        return Finding("FAIL", "layout", wrong[0] + more)
    probed: list[str] = []
    slots: set[str] = set()
    ran = list(p.seen)
    for site, found in sorted(known, key=lambda pair: ran.index(pair[0].name)):
        if found is None or site.slot in slots:
            continue
        first = not slots
        slots.add(site.slot)
        for what, problem in _probes(p, site, found, first):
            if problem:
                return Finding("FAIL", "layout", f"{site.label}: {problem}")
            probed.append(f"{what} at {site.label}")
    if not probed:
        raise Skipped("no argument of this call holds single tokens that could be moved")
    orders = dict.fromkeys(_order(found) for _, found in known if found)
    detail = f"{'; '.join(orders)}; {', '.join(probed)} moved where it should"
    return Finding("PASS", "layout", detail, {"orders": list(orders), "probed": probed})


def _order(layout: Layout) -> str:
    def side(segments: tuple[Segment, ...]) -> str:
        parts = []
        for s in segments:
            grid = f" ({' x '.join(map(str, s.grid))})" if s.grid else ""
            parts.append(f"{s.role} {s.length}{grid}")
        return f"[{', '.join(parts)}]"

    return side(layout.q) if layout.is_self else f"{side(layout.q)} -> {side(layout.k)}"


def _lengths(p: Patient, site: Site, layout: Layout) -> str | None:
    call = p.seen[site.name][p.main(site)[0]]
    ran = call.q.shape[2], call.k.shape[2]
    if ran == (layout.q_len, layout.k_len):
        return None
    return (
        f"{site.label} ran {ran[0]} queries and {ran[1]} keys, the layout {_order(layout)} has"
        f" {layout.q_len} and {layout.k_len}"
    )


def _probes(p: Patient, site: Site, layout: Layout, first: bool) -> list[tuple[str, str | None]]:
    """Each probe that can be made at a site: what was moved, and what is wrong."""
    found: list[tuple[str, str | None]] = []
    texts = [s for s in layout.k if s.role == "text"]
    text = p.call.get(p.family.text)
    tokens = _token_count(text)
    if len(texts) == 1 and tokens:
        found.append(("a word", _text(p, site, texts[0], tokens)))
    pictures = [s for s in layout.q if s.role in ("image", "video")]
    # Behind other attention everything moves: only the first site shows a picture's single tokens.
    if first and len(pictures) == 1 and (place := _pixel(p, layout, pictures[0])) is not None:
        index, token = place
        moved = _moved(p, site, p.family.sample, index, side="q")
        found.append(("a patch", _judge_picture(p, moved, pictures[0], token)))
    return found


def _text(p: Patient, site: Site, segment: Segment, tokens: int) -> str | None:
    """The first word stands first in its segment, and the last one last where all are kept."""
    for token in (0, tokens - 1):
        moved = _strong(_moved(p, site, p.family.text, (token,), side="k"))
        if not moved and token:
            continue  # the end of a text may be padding, which nobody reads
        if not moved:
            return f"word {token} moved no key"
        outside = [n for n in moved if not segment.start <= n < segment.stop]
        if outside:
            return (
                f"word {token} moved key {outside[0]}, but the text is said to stand at"
                f" {segment.start} to {segment.stop - 1}"
            )
        wanted = segment.start + token
        if len(moved) == 1 and tokens == segment.length and moved != [wanted]:
            return f"word {token} moved key {moved[0]}, expected {wanted}"
    return None


def _judge_picture(p: Patient, moved: Tensor, segment: Segment, token: int) -> str | None:
    strong, wanted = _strong(moved), segment.start + token
    if not strong:
        return f"patch {token} moved no query"
    peak = int(moved.argmax())
    if not segment.start <= peak < segment.stop:
        return (
            f"patch {token} moved query {peak} most, but the picture is said to stand at"
            f" {segment.start} to {segment.stop - 1}"
        )
    if len(strong) == 1 or segment.grid is None:
        return None if peak == wanted else f"patch {token} moved query {peak}, expected {wanted}"
    # Mixed before the first attention (convolutions, refiners): most where it stands, or beside it.
    _, height, width = segment.grid
    (row, column), (y, x) = (
        divmod(n % (height * width), width) for n in (peak - segment.start, token)
    )
    if max(abs(row - y), abs(column - x)) > 2:
        return f"patch {token} moved query {peak} most, expected {wanted} or a neighbour"
    return None


def _pixel(p: Patient, layout: Layout, picture: Segment) -> tuple[tuple[Any, ...], int] | None:
    """An index into one row of the sample, and the token of the picture that it is part of."""
    row = p.call[p.family.sample][0]
    if row.ndim == 2 and len(row) >= picture.length:  # packed: a token is a token
        token = picture.length // 3
        return (token,), token
    spatial = _spatial(p, row)
    if picture.grid is None or spatial is None:
        return None
    frames, height, width = picture.grid
    place = (frames // 2, height // 2, width // 3)
    token = (place[0] * height + place[1]) * width + place[2]
    # A reference frame may stand before the video in one and the same sample.
    sized = [s for s in layout.q if s.grid is not None and s.grid[1:] == picture.grid[1:]]
    before = sum(s.grid[0] for s in sized if s.grid and s.start < picture.start)
    whole = (sum(s.grid[0] for s in sized if s.grid), height, width)
    at = (before + place[0], *place[1:])
    index: list[Any] = [slice(None)] * row.ndim
    for dim, where, size in zip(spatial[::-1], at[::-1], whole[::-1], strict=False):
        step = max(1, row.shape[dim] // size)
        index[dim] = min(where * step, row.shape[dim] - 1)
    return tuple(index), token


def _spatial(p: Patient, row: Tensor) -> tuple[int, ...] | None:
    """Which dimensions of a row are (frames,) height and width: all but that of the channels."""
    config = dict(getattr(p.model, "config", None) or {})
    channels = next((config[n] for n in ("in_channels", "in_visual_dim") if config.get(n)), None)
    if row.ndim == 3:
        return (1, 2)
    if row.ndim != 4:
        return None
    dims = [dim for dim in range(4) if row.shape[dim] == channels]
    channel = dims[0] if len(dims) == 1 else 0
    left = tuple(dim for dim in range(4) if dim != channel)
    return (left[0], left[1], left[2])


def _token_count(text: Any) -> int:
    """Tokens of the text argument: (rows, tokens, ...), or a list of (tokens, width)."""
    if isinstance(text, Tensor) and text.ndim >= 3:
        return int(text.shape[1])
    if isinstance(text, list) and text and isinstance(text[0], Tensor) and text[0].ndim == 2:
        return min(len(row) for row in text)
    return 0


def _moved(p: Patient, site: Site, argument: str, index: tuple[Any, ...], side: str) -> Tensor:
    """How far each token of q or k moves when one place of an argument is changed in every row."""
    call = copied(p.call)
    for row in call[argument]:
        row[index] += max(1.0, 3 * row.float().abs().mean().item())
    before, after = (_tokens(p, site, given, side) for given in (p.call, call))
    return (after - before).abs().amax(dim=(0, 1, 3))


def _tokens(p: Patient, site: Site, call: dict[str, Any], side: str) -> Tensor:
    """q or k of a site in a plain call, in float64 on the CPU."""
    seen = p.watched(call=call, keep=(site.name,), attached=False)[site.name][p.main(site)[0]]
    tensor: Tensor = getattr(seen, side)
    return tensor.detach().to("cpu").double()


def _strong(moved: Tensor) -> list[int]:
    top = moved.max().item()
    return [] if top == 0 else torch.nonzero(moved > SMALL * top).flatten().tolist()
