"""Rows that run behind the pipeline's own, in the same forward: with another text, or perturbed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from attn_control.call import rows_in
from attn_control.entry import Entry
from attn_control.errors import AttnControlError
from attn_control.families import Family, repeat_rows
from attn_control.phases import Pass


def with_riders(run: Pass, riders: list[Entry], family: Family) -> Pass:
    """A pass that has room for the perturbed cond rows of these guides, one behind the other."""
    if not riders or run.cond is None:
        return run
    total, each = rows_in(run.arguments[family.sample]), run.cond[1] - run.cond[0]
    spans = tuple(
        (entry.number, (total + n * each, total + (n + 1) * each)) for n, entry in enumerate(riders)
    )
    return replace(run, acting=[*run.acting, *riders], riders=spans)


def append(run: Pass, entries: list[Entry], family: Family) -> tuple[Pass, dict[str, Any]]:
    """The pass's arguments, with the cond rows once more for each control that asks for it.

    Args:
        run: the pass; entries: all controls in force, by number; family: of the model.

    Raises:
        AttnControlError: some argument's batch dimension is not known.
    """
    asking = [entries[number] for number, _ in run.riders]
    asking = asking or [entry for entry in run.acting if entry.control.appends][:1]
    if not asking or run.cond is None:
        return run, run.arguments
    first, last = run.cond
    made = run.arguments
    for entry in asking:
        text, more = made.get(family.text), None
        if isinstance(text, Tensor):
            other = text[first:last]
            other = entry.control.negative_text(other) if entry.control.appends else other
            more = repeat_rows(family, made, run.cond, other)
        if more is None:
            raise AttnControlError(
                f"{entry.control}: cannot repeat the rows of {family.denoiser}: it was called with"
                " tensors whose batch dimension is not known"
            )
        made = more
    return replace(run, appended=len(asking) * (last - first)), made
