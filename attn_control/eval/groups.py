"""Groups of the zoo's fixed prompts, by what their files and captions say of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """No unknown key and no silent conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Where(Strict):
    """Which prompts; what is left out does not narrow.

    reference, texture: of models that take reference pictures, whether the prompt points to one and
    what that one shows. direction, crossing: of videos.
    """

    split: Literal["seen", "heldout"] | None = None
    objects: Annotated[int, Field(ge=1)] | None = None
    reference: bool | None = None
    texture: str | None = None
    direction: Literal["right", "left", "down", "up"] | None = None
    crossing: Literal["behind", "in front of"] | None = None

    def asked(self) -> dict[str, Any]:
        """What narrows, and to which value."""
        return self.model_dump(exclude_none=True)

    def holds(self, traits: Mapping[str, Any]) -> bool:
        """Whether a prompt with these traits (`zoo.prompts.traits`) belongs here."""
        return all(traits.get(key) == value for key, value in self.asked().items())

    def __str__(self) -> str:
        counts = {1: "one object", 2: "two objects"}
        words = {
            "split": self.split,
            "objects": counts.get(self.objects or 0, f"{self.objects} objects"),
            "reference": "with a reference" if self.reference else "without a reference",
            "texture": f"{self.texture} reference",
            "direction": f"moving {self.direction}",
            "crossing": f"crossing {self.crossing}",
        }
        return ", ".join(str(words[key]) for key in self.asked()) or "all"
