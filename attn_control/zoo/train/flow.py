"""What lessons by flow matching share: most steps through a coarse door, noise between two ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attn_control.zoo.train import loop
from attn_control.zoo.train.common import generator, logit_normal


@dataclass(frozen=True, kw_only=True)
class Settings(loop.Settings):
    """Everything that shapes a run; kept in its checkpoint. Lessons give their own numbers."""

    coarse_batch: int
    fine_batch: int
    fine_every: int
    fine_from: float  # share of the steps after which all are fine
    time_mean: float = 0.6  # of the logit of t: a little above 0, where the layout is decided
    time_std: float = 1.1
    drop: float = 0.1  # captions emptied, for classifier-free guidance
    compile: bool = True


@dataclass(frozen=True, kw_only=True)
class TellingSettings(Settings):
    """For lessons that ask words and tokens what they show; shapes-sd3's does not."""

    read: float = 0.1  # weight of what the text encoder's words tell, see reading.py
    read_first: int = 1500  # steps on captions alone, before the first picture
    see: float = 0.1  # weight of what the denoiser's tokens tell, see seeing.py


class Lesson:
    """Which steps are fine, how many examples they have, and the noise that is mixed in."""

    settings: Any

    def begin(self) -> None:
        """Nothing comes before the first step."""

    def is_fine(self, step: int) -> bool:
        """Whether a step runs at the shipped resolution."""
        s = self.settings
        return bool(step >= s.fine_from * s.steps or step % s.fine_every == s.fine_every - 1)

    def size(self, step: int) -> int:
        """Examples of a step."""
        return int(self.settings.fine_batch if self.is_fine(step) else self.settings.coarse_batch)

    def generator(self, step: int) -> torch.Generator:
        """The randomness of a step."""
        return generator(self.settings.seed, step)

    def dropped(self, size: int, g: torch.Generator) -> torch.Tensor:
        """Which captions of a batch are emptied, bool (size,)."""
        return torch.rand(size, generator=g) < self.settings.drop

    def noisy(self, x0: torch.Tensor, g: torch.Generator) -> dict[str, torch.Tensor]:
        """The examples with a time and noise each."""
        s = self.settings
        t = logit_normal(len(x0), s.time_mean, s.time_std, g)
        return {"x0": x0, "t": t, "noise": torch.randn(x0.shape, generator=g)}

    def told(
        self, kind: str, loss: torch.Tensor, see: torch.Tensor | None, read: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The figures of a step and the loss to descend: the velocity's, and what words and tokens
        are asked to tell besides.
        """
        total, figures = loss + self.settings.read * read, {kind: loss, "read": read}
        if see is not None:
            total, figures = total + self.settings.see * see, {**figures, "see": see}
        return figures, total

    @staticmethod
    def mixed(b: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the denoiser sees of a batch, and the velocity that it is to predict."""
        t = b["t"].view(-1, *[1] * (b["x0"].ndim - 1))
        return torch.lerp(b["x0"], b["noise"], t), b["noise"] - b["x0"]
