"""The grid of layers and heads that is clicked, and the selector that it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from attn_control.errors import AttnControlError
from attn_control.select import parse_heads

Cells = dict[int, set[int]]  # layer -> its heads that are on


@dataclass(frozen=True)
class Layer:
    """One row of the grid: a layer's number and how many heads its attention has."""

    number: int
    heads: int


def cells_of(text: str, layers: Sequence[Layer]) -> Cells:
    """The heads of the grid that a selector names; what is no selector yet names none.

    >>> cells_of("L1H0-1, L2", [Layer(1, 4), Layer(2, 2)])
    {1: {0, 1}, 2: {0, 1}}
    """
    cells: Cells = {}
    for term in _terms(text):
        if term.slot not in (None, "joint", "self") or term.model is not None:
            continue
        for layer in layers:
            if term.layers and not term.layers[0] <= layer.number <= term.layers[1]:
                continue
            low, high = term.heads or (0, layer.heads - 1)
            cells.setdefault(layer.number, set()).update(range(low, min(high, layer.heads - 1) + 1))
    return {number: heads for number, heads in cells.items() if heads}


def text_of(cells: Cells, layers: Sequence[Layer], before: str = "") -> str:
    """The shortest selector of these heads; items of ``before`` that no grid shows stay.

    >>> text_of({1: {0, 1}, 2: {0, 1}}, [Layer(1, 4), Layer(2, 2)])
    'L1H0-1, L2'
    """
    kept = [
        term.text
        for term in _terms(before)
        if term.slot not in (None, "joint", "self") or term.model is not None
    ]
    rows = []
    for layer in layers:
        on = sorted(cells.get(layer.number, set()) & set(range(layer.heads)))
        if on:
            heads = "" if len(on) == layer.heads else None
            rows.append((layer.number, [heads] if heads == "" else [f"H{r}" for r in _runs(on)]))
    items = []
    for _, group in groupby(enumerate(rows), key=lambda each: (each[1][0] - each[0], each[1][1])):
        same = [row for _, row in group]
        first, last, parts = same[0][0], same[-1][0], same[0][1]
        span = f"L{first}" if first == last else f"L{first}-{last}"
        items += [span + part for part in parts]
    return ", ".join([*items, *kept])


def _runs(numbers: Iterable[int]) -> list[str]:
    """`[0, 1, 3]` as `["0-1", "3"]`."""
    found = []
    for _, group in groupby(enumerate(numbers), key=lambda each: each[1] - each[0]):
        run = [number for _, number in group]
        found.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return found


def _terms(text: str) -> tuple:
    try:
        return parse_heads(text).terms if text.strip() else ()
    except AttnControlError:
        return ()
