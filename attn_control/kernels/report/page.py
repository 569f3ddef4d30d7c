"""A report as a page for people, and as a file for `kernels.cost`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from attn_control.kernels.cost import fit
from attn_control.kernels.report.checks import Check


@dataclass
class Report:
    """device: by its own name; where: versions and the date; rows: as `times.measure` gives them;
    left: what time or memory did not allow.
    """

    device: str
    where: dict[str, str]
    close: float
    checks: list[Check] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def held(self) -> dict[str, bool]:
        """Of each executor, whether everything that was checked of it was right."""
        names = dict.fromkeys([check.impl for check in self.checks])
        return {
            name: all(check.held for check in self.checks if check.impl == name)
            and all(
                row["error"] <= self.close
                for row in self.rows
                if row["impl"] == name and row["error"] is not None
            )
            for name in names
        }

    def data(self) -> dict[str, Any]:
        """As `kernels.cost` reads it."""
        return {"device": self.device, **self.where, "held": self.held, "rows": self.rows}

    def page(self) -> str:
        where = "\n".join(f"- {key}: {value}" for key, value in self.where.items())
        held = ", ".join(f"{name}: {'yes' if ok else '**NO**'}" for name, ok in self.held.items())
        return "\n".join(
            [
                f"# {self.device}",
                "",
                "Measured by `make gpu-report` on this GPU; nothing here is modelled.",
                "",
                where,
                f"- everything that was checked is right: {held}",
                "",
                "## Correctness",
                "",
                "Largest difference from a softmax in float64. The bar is twice the error of",
                "torch's own attention in the same precision, or what rounding alone makes.",
                "",
                *_checks(self.checks),
                "",
                "## Times",
                "",
                "Milliseconds, medians, taken in turns; in brackets the time over that of dense",
                "attention. The density is that of the blocks that are visited.",
                "",
                *_times(self.rows),
                "",
                "## Lines through them",
                "",
                'What `attend(impl="auto")` goes by: milliseconds a call, and a billion pairs.',
                "",
                *_lines(self.rows),
                "",
                "## Not run",
                "",
                *([f"- {each}" for each in self.left] or ["Nothing was left out."]),
                "",
            ]
        )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _checks(checks: Sequence[Check]) -> list[str]:
    rows = [
        (c.impl, c.case, c.dtype, str(c.dim), c.what, f"{c.error:.2g}", f"{c.bar:.2g}")
        + (("yes",) if c.held else ("**NO**",))
        for c in checks
    ]
    return table(("executor", "case", "dtype", "dim", "of", "error", "bar", "held"), rows)


def _times(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line a cell and way; the rows of one follow each other, dense first."""
    lines: list[list[str]] = []
    names = ("flex", "triton")
    for row in rows:
        if row["impl"] == "dense":
            cell = (row["kind"], row["way"], str(row["dim"]), str(row["heads"]), str(row["tokens"]))
            lines.append([*cell, "", f"{row['milliseconds']:.3f}", *("-" for _ in names)])
            dense = row["milliseconds"]
        else:
            ratio = row["milliseconds"] / dense
            lines[-1][5] = f"{row['density']:.3f}"
            lines[-1][7 + names.index(row["impl"])] = f"{row['milliseconds']:.3f} ({ratio:.2f})"
    return table(("mask", "way", "dim", "heads", "tokens", "density", "dense", *names), lines)


def _lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    keys = ("impl", "way", "precision", "dim")
    kinds = dict.fromkeys(tuple(row[key] for key in keys) for row in rows)
    found = []
    for kind in kinds:
        call, pair = fit([row for row in rows if tuple(row[key] for key in keys) == kind])
        found.append((*map(str, kind), f"{call:.4f}", f"{pair * 1e9:.3f}"))
    return table((*keys, "ms a call", "ms a billion pairs"), found)
