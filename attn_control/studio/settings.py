"""What the operator of a studio allows: models, folders, and how much one run may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.render.jobfile import model_from
from attn_control.render.models import choose_device


class Refused(AttnControlError):
    """Bad input. `place` is the part of the page that caused it: a field of the page or a method's
    section, beside which the sentence is shown.
    """

    def __init__(self, place: str, sentence: str) -> None:
        super().__init__(sentence)
        self.place = place


@dataclass(frozen=True)
class Settings:
    """Limits hold for every run, however it is asked for.

    Attributes:
        device: as in a job; one run at a time uses it.
        allow_hub: whether a visitor may name a Hugging Face hub id, which downloads.
        folders: local models are read from inside these only.
        pixels: of one picture or frame, width times height.
        frames, steps: of one run.
        seconds: a run that takes longer ends.
        waiting: runs that may wait for the device.
        text: characters of a prompt and of each text field.
        upload, picture: bytes of an uploaded job, and of an uploaded reference picture.
        pictures: bytes of all reference pictures that are kept, those used last.
        kept: runs whose files are kept, the latest.
    """

    device: str = "auto"
    allow_hub: bool = False
    folders: tuple[Path, ...] = ()
    pixels: int = 1024 * 1024
    frames: int = 81
    steps: int = 100
    seconds: float = 900.0
    waiting: int = 20
    text: int = 2_000
    upload: int = 64_000
    picture: int = 8_000_000
    pictures: int = 200_000_000
    kept: int = 100

    @classmethod
    def of(cls, **given: Any) -> Settings:
        """Settings that hold. Raises AttnControlError: a folder that is none, a device that is no
        name of one.
        """
        settings = cls(**given)
        for folder in settings.folders:
            if not folder.is_dir():
                raise AttnControlError(f"--models {str(folder)!r} is no folder")
        choose_device(model_from({"name": "x", "device": settings.device}).device)
        return settings
