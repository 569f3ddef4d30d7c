"""Numbers with intervals as text, and Markdown tables of them."""

from __future__ import annotations

from typing import Any

Numbers = dict[str, Any]


def percent(numbers: Numbers | None) -> str:
    """`66.2 % [56.2, 76.2]`, or a dash."""
    if numbers is None:
        return "-"
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*_hundredfold(numbers))


def points(numbers: Numbers | None) -> str:
    """`+25.0 [+17.5, +32.5]` in percentage points, or a dash."""
    if numbers is None:
        return "-"
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*_hundredfold(numbers))


def _hundredfold(numbers: Numbers) -> tuple[float, float, float]:
    return 100 * numbers["mean"], 100 * numbers["low"], 100 * numbers["high"]


def plain(numbers: Numbers | None, digits: int = 2) -> str:
    """`31.20 [30.85, 31.58]`, or a dash."""
    if numbers is None:
        return "-"
    mean, low, high = (f"{numbers[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def planted_line(planted: Numbers, things: str = "pictures") -> str:
    """The positive control in a sentence."""
    return (
        f"Positive control: {planted['replaced']} {things} of {planted['variant']} replaced by "
        f"true drawings, which plants {100 * planted['planted']:+.1f} points; found "
        f"{points(planted['found'])}; {planted['changed_when_read_back']} verdicts changed when "
        f"the {things} were read back: **{'passed' if planted['passed'] else 'FAILED'}**."
    )


def decibels(numbers: Numbers | None) -> str:
    """`+4.20 [+3.10, +5.30]`, or a dash."""
    if numbers is None:
        return "-"
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(numbers[key] for key in ("mean", "low", "high")))
