"""The exact scorer's verdict on what a built-in model made of a prompt."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.render.media import Made
from attn_control.render.models import ModelChoice
from attn_control.render.prompts import Prompt


def judge(choice: ModelChoice, made: Made, prompt: Prompt) -> dict[str, Any] | None:
    """The score as data; None for models and captions without a scorer, and what it cannot judge.

    Where the caption leaves the texture to a reference, that is the one drawn for the fixed prompt,
    or what the given picture shows.
    """
    if choice.kind != "zoo":
        return None
    from attn_control import zoo
    from attn_control.zoo.references import asks_for_reference

    if not zoo.is_scorable(choice.name, prompt.text):
        return None
    options: dict[str, Any] = {}
    if prompt.image is not None and asks_for_reference(prompt.text):
        drawn = prompt.image.drawn
        options["reference"] = prompt.image.picture() if drawn is None else drawn[0]
    try:
        return asdict(zoo.score(choice.name, made.scorable, prompt.text, **options))
    except AttnControlError:  # say a picture too small to judge: it is still a picture
        return None
