"""The fixed prompts that the built-in models are scored on, one JSON line a prompt."""

from __future__ import annotations

import json
from pathlib import Path

from attn_control.errors import AttnControlError

# The same captions and seeds, so that the two models can be compared prompt by prompt.
_SHARED = {"shapes-sd15": "shapes-sd3"}


def load_prompts(name: str) -> list[dict]:
    """The prompts of a built-in model: dicts of prompt, objects (1 | 2), split, seed.

    split is "heldout" where a (colour, shape) pair that training never drew takes part.
    Raises AttnControlError for a name without prompts.
    """
    folder = Path(__file__).parent
    file = folder / f"{_SHARED.get(name, name)}.jsonl"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.jsonl")))
        raise AttnControlError(f"no fixed prompts for {name!r}; there are some for: {known}")
    return [json.loads(line) for line in file.read_text().splitlines()]
