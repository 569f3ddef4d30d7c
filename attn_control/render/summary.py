"""The table of a job: how often each variant is right, by how much it differs, and what it costs.

Intervals redraw whole prompts (see metrics/intervals.py): pictures of one prompt are no independent
witnesses. Differences are paired: same prompt, same seed, same first noise.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Sized
from dataclasses import dataclass
from statistics import median
from typing import Any

from attn_control.metrics import Interval, bootstrap_mean, wilson
from attn_control.render.prompts import Key, key_of

Row = dict[str, Any]
FEWEST_PROMPTS = 5  # below that no interval is estimated


@dataclass(frozen=True)
class VariantSummary:
    """The numbers of one variant; what could not be scored is None."""

    name: str
    pictures: int
    seconds: float
    peak_bytes: int | None
    peak_is_own: bool
    right: Interval | None
    against: dict[str, Interval | None]


def summarise(
    rows: Sequence[Row], variants: Sequence[str], compare: Sequence[str]
) -> list[VariantSummary]:
    """One summary a variant, in the job's order; variants without a picture are left out."""
    by_name = {name: [row for row in rows if row["variant"] == name] for name in variants}
    found = []
    for name, mine in by_name.items():
        if not mine:
            continue
        peaks = [row["peak_bytes"] for row in mine if row["peak_bytes"] is not None]
        found.append(
            VariantSummary(
                name=name,
                pictures=len(mine),
                seconds=median(row["seconds"] for row in mine),
                peak_bytes=max(peaks, default=None),
                peak_is_own=all(row["peak_kind"].startswith("cuda") for row in mine),
                right=share_right(mine),
                against={other: paired(mine, by_name[other]) for other in compare if other != name},
            )
        )
    return found


def share_right(rows: Sequence[Row], verdict: str = "right") -> Interval | None:
    """How many of the scored pictures are fully right (or ``verdict``), with its interval.

    A verdict may itself be a share, such as that of a video's frames: then it is their mean.
    """
    scored = [row for row in rows if row["score"] is not None]
    if not scored:
        return None
    return interval_over_prompts(
        [row["score"][verdict] for row in scored], _prompts(scored), least=0
    )


def paired(rows: Sequence[Row], baseline: Sequence[Row], verdict: str = "right") -> Interval | None:
    """The difference in a verdict over the pictures that both variants have."""
    theirs = {(key_of(row), row["seed"]): row for row in baseline if row["score"] is not None}
    pairs = [
        (row, theirs[key_of(row), row["seed"]])
        for row in rows
        if row["score"] is not None and (key_of(row), row["seed"]) in theirs
    ]
    if not pairs:
        return None
    ours = [row for row, _ in pairs]
    differences = [float(a["score"][verdict]) - float(b["score"][verdict]) for a, b in pairs]
    return interval_over_prompts(differences, _prompts(ours), least=-1)


def _prompts(rows: Sequence[Row]) -> list[Key]:
    return [key_of(row) for row in rows]


def interval_over_prompts(
    values: Sequence[float], prompts: Sequence[Hashable], *, least: int
) -> Interval:
    """Bootstrap over prompts, and where that would claim certainty, a bound that does not.

    Too few prompts: the whole range, [least, 1]. All values alike: at least Wilson's share of all
    prompts is like these, and the rest may lie anywhere in the range.
    """
    mean, count = sum(values) / len(values), len(set(prompts))
    if count < FEWEST_PROMPTS:
        return Interval(mean, least, 1, len(values), count)
    if len(set(values)) > 1:
        return bootstrap_mean([float(value) for value in values], groups=prompts)
    share = wilson(count, count).low
    low, high = (share * mean + (1 - share) * end for end in (least, 1))
    return Interval(mean, low, high, len(values), count)


def percent(interval: Interval | None) -> str:
    """`83 % [71, 95]`, or a dash."""
    if interval is None:
        return "-"
    low, mean, high = (round(100 * part) for part in (interval.low, interval.mean, interval.high))
    return f"{mean} % [{low}, {high}]"


def points(interval: Interval | None) -> str:
    """`+12 [-4, +29]` in percentage points, or a dash."""
    if interval is None:
        return "-"
    low, mean, high = (round(100 * part) for part in (interval.low, interval.mean, interval.high))
    return f"{mean:+d} [{low:+d}, {high:+d}]"


def verdicts(summaries: Sequence[VariantSummary]) -> list[str]:
    """One sentence a difference whose interval leaves zero out, and one on what remains open."""
    told, open_ended = [], 0
    for each in summaries:
        for other, interval in each.against.items():
            if interval is None:
                continue
            if interval.low > 0:
                told.append(f"{each.name} is right more often than {other}.")
            elif interval.high < 0:
                told.append(f"{each.name} is right less often than {other}.")
            else:
                open_ended += 1
    if open_ended:
        told.append(
            f"{open_ended} of the differences could be chance: their intervals include zero."
        )
    return told


def table(summaries: Sequence[VariantSummary], compare: Sequence[str]) -> Any:
    """The same as a rich table, narrow enough for 80 columns in the quickstart.

    How many pictures stands there only where it differs, and memory only where each variant has its
    own: the peak of a process on a CPU is that of the hungriest variant so far.
    """
    from rich.markup import escape
    from rich.table import Table

    scored = any(each.right for each in summaries)
    compare = [name for name in compare if any(each.against.get(name) for each in summaries)]
    counts = len({each.pictures for each in summaries}) > 1
    peaks = any(each.peak_is_own for each in summaries)
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column("variant", no_wrap=True)
    heads = ["pictures"] * counts
    if scored:
        heads += ["fully right", *(f"vs {escape(other)}" for other in compare)]
    for head in [*heads, "s each", *(["peak"] * peaks)]:
        shown.add_column(head, justify="right")
    for each in summaries:
        cells = [str(each.pictures)] * counts
        if scored:
            cells += [percent(each.right), *(points(each.against.get(name)) for name in compare)]
        cells.append(f"{each.seconds:.2f}")
        if peaks:
            cells.append("-" if each.peak_bytes is None else f"{each.peak_bytes / 1e9:.2f} GB")
        shown.add_row(*map(escape, [each.name, *cells]))
    return shown


def memory_line(summaries: Sequence[VariantSummary]) -> str | None:
    """The peak of the process, where no variant has a peak of its own."""
    peaks = [each.peak_bytes for each in summaries if each.peak_bytes and not each.peak_is_own]
    return f"Peak memory of the process: {max(peaks) / 1e9:.2f} GB." if peaks else None


def footnote(rows: Sequence[Row]) -> str:
    """How much data there is, in words that keep anyone from reading too much into it."""
    scored = [row for row in rows if row["score"] is not None]
    if not scored:
        return "These prompts have no scorer: look at the sheet. Seconds are medians."
    prompts = set(_prompts(scored))
    seeds = range(max(len({r["seed"] for r in scored if key_of(r) == key}) for key in prompts))
    return (
        f"n = {_count(prompts, 'prompt')} x {_count(seeds, 'seed')} a variant"
        + (", which is small" if len(prompts) < 50 else "")
        + (", too few for an interval" if len(prompts) < FEWEST_PROMPTS else "")
        + ". In brackets: 95 % intervals from redrawing whole prompts. Differences are in points, "
        "picture by picture with the same first noise. Seconds are medians."
    )


def _count(things: Sized, name: str) -> str:
    return f"{len(things)} {name}" + ("" if len(things) == 1 else "s")
