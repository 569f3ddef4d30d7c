"""The ledger of a sparse control: what every one of its calls came to, row by row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from attn_control.call import Site, Step
from attn_control.masks.line import Line
from attn_control.masks.place import Place
from attn_control.policy import DENSE, OUTCOMES


class Fired(NamedTuple):
    """One branch's rows of one call at one site.

    run, index: of the step; layer: the site's label, with its model; outcome: see ``policy``.
    density: share of all query-key pairs that the result was read from. computed: work done, in
    dense attentions: a refresh that also runs its mask has more than 1.
    """

    run: int
    index: int | None
    branch: str
    layer: str
    outcome: str
    density: float
    computed: float


def label(site: Site) -> str:
    """A site's short name, unmistakable among two denoisers."""
    return f"{site.model}:{site.label}" if site.model != "transformer" else site.label


@dataclass(frozen=True)
class Summary:
    """density, computed: means over all calls; by_layer: layer -> step -> mean density there;
    outcomes: how many calls came to what; notes: why something stayed dense.
    """

    density: float
    computed: float
    by_layer: dict[str, dict[int, float]]
    outcomes: dict[str, int]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "by_layer": {
                layer: {str(step): round(value, 6) for step, value in steps.items()}
                for layer, steps in self.by_layer.items()
            },
        }


class Ledger:
    """Filled by the softmaxes of one control on one denoiser while they run."""

    def __init__(self) -> None:
        self.rows: list[Fired] = []
        self.notes: dict[str, None] = {}
        self.place: Place | Line | None = None  # of the last geometry that was compiled
        self.spared: set[Site] = set()  # sites that stay dense though they are selected

    def dense(self, step: Step, sites: Iterable[Site]) -> None:
        """Sites that a step leaves dense as a whole."""
        for site in sites:
            for branch in dict.fromkeys(step.branch):
                self.add(step, branch, site, DENSE, 1.0, 1.0)

    def add(
        self, step: Step, branch: str, site: Site, outcome: str, density: float, computed: float
    ) -> None:
        row = Fired(step.run_id, step.index, branch, label(site), outcome, density, computed)
        self.rows.append(row)

    def note(self, text: str) -> bool:
        """Keep a sentence for the report; whether it is new."""
        new = text not in self.notes
        self.notes[text] = None
        return new


def summary(ledgers: Iterable[Ledger], run: int | None = None) -> Summary | None:
    """Of one control on all its denoisers, in one run or in all; None if it was not called."""
    ledgers = list(ledgers)
    rows = [row for ledger in ledgers for row in ledger.rows if run in (None, row.run)]
    notes = [note for ledger in ledgers for note in ledger.notes]
    if not rows:
        return None
    cells: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.index is not None:
            cells.setdefault(row.layer, {}).setdefault(row.index, []).append(row.density)
    by_layer = {
        layer: {step: sum(found) / len(found) for step, found in sorted(steps.items())}
        for layer, steps in cells.items()
    }
    outcomes = {name: sum(row.outcome == name for row in rows) for name in OUTCOMES}
    return Summary(
        sum(row.density for row in rows) / len(rows),
        sum(row.computed for row in rows) / len(rows),
        by_layer,
        {name: count for name, count in outcomes.items() if count},
        notes,
    )
