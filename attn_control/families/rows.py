"""The rows of a batch: cond rows alone, or once more with another text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attn_control.call import rows_in
from attn_control.families.family import Family
from attn_control.layouts import Arguments


def slice_rows(
    family: Family, arguments: Arguments, rows: tuple[int, int]
) -> dict[str, Any] | None:
    """The rows' arguments alone, or None where some argument's batch dimension is not known."""
    total = rows_in(arguments[family.sample])
    if rows == (0, total):
        return dict(arguments)
    return _by_rows(family, arguments, total, lambda value: value[rows[0] : rows[1]])


def repeat_rows(
    family: Family, arguments: Arguments, rows: tuple[int, int], text: torch.Tensor
) -> dict[str, Any] | None:
    """The arguments with some rows once more at the end, there with another text; None as above."""
    total = rows_in(arguments[family.sample])
    if family.folded or isinstance(arguments[family.sample], list):
        return None

    def again(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value, value[rows[0] : rows[1]]])

    given = arguments[family.text]
    made = _by_rows(family, arguments, total, again)
    return None if made is None else {**made, family.text: torch.cat([given, text])}


def _by_rows(
    family: Family,
    arguments: Arguments,
    total: int,
    change: Callable[[Any], Any],
) -> dict[str, Any] | None:
    """Change every tensor with a batch dimension; None if an argument is not known to have one."""

    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            count = value.shape[0] if value.ndim else 0
            if family.folded and count > total and not count % total:  # a row a frame
                return change(value.unflatten(0, (total, -1))).flatten(0, 1)
            return change(value) if count == total else value
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(walk(item) for item in value)
        return value

    def has_tensor(value: Any) -> bool:
        if isinstance(value, (dict, list, tuple)):
            return any(map(has_tensor, value.values() if isinstance(value, dict) else value))
        return isinstance(value, torch.Tensor)

    listed = isinstance(arguments[family.sample], list)
    known = family.row_fields | family.shared_fields
    if any(has_tensor(value) for name, value in arguments.items() if name not in known):
        return None
    made: dict[str, Any] = {}
    for name, value in arguments.items():
        if listed and isinstance(value, list):  # a row an item
            value = change(value) if name in family.row_fields and len(value) == total else value
        elif name in family.row_fields:
            value = walk(value)
        made[name] = value
    return made
