"""Arguments of patterns, checked with one sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attn_control.errors import AttnControlError


def at_least(owner: str, name: str, value: object, least: int) -> None:
    """An int, not below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise AttnControlError(f"{owner}: {name}={value!r} has to be an int of at least {least}")


def each(owner: str, name: str, value: Any, axes: int, kind: type = int) -> tuple[Any, ...]:
    """One value for all axes, or one an axis, as one an axis."""
    given = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(given) != axes or any(type(v) is not kind for v in given):
        raise AttnControlError(
            f"{owner}: {name}={value!r} has to be {kind.__name__}, or one for each of {axes} axes"
        )
    return given
