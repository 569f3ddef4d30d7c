"""The fixed prompts that the built-in models are scored on, one JSON line a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from attn_control.errors import AttnControlError

# The same captions and seeds, so that the two models can be compared prompt by prompt.
_SHARED = {"shapes-sd15": "shapes-sd3"}


Row = TypeVar("Row")


def spread(rows: Sequence[Row], count: int | None) -> list[Row]:
    """`count` of them, evenly over their order, so that every kind takes part; None: all."""
    count = min(count or len(rows), len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def load_prompts(name: str) -> list[dict]:
    """The prompts of a built-in model: dicts of prompt, objects (1 | 2), split, seed.

    split is "heldout" where a (colour, shape) pair that training never drew takes part. Those of
    shapes-flux have a `reference`, None or what `references.draw_reference` takes.
    Raises AttnControlError for a name without prompts.
    """
    folder = Path(__file__).parent
    file = folder / f"{_SHARED.get(name, name)}.jsonl"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.jsonl")))
        raise AttnControlError(f"no fixed prompts for {name!r}; there are some for: {known}")
    return [json.loads(line) for line in file.read_text().splitlines()]


def traits(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a fixed prompt may be chosen by: objects and split; of shapes-flux whether it points to
    a `reference` and that one's `texture`, of shapes-wan its `direction` and `crossing`.
    """
    found = {key: row[key] for key in ("objects", "split")}
    if name == "shapes-flux":
        drawn = row["reference"]
        found |= {"reference": drawn is not None, "texture": drawn and drawn["texture"]}
    if name == "shapes-wan":
        from attn_control.zoo.videos import parse_video

        spec = parse_video(row["prompt"])
        found |= {"direction": spec.direction, "crossing": spec.crossing}
    return found
