"""Denoisers of diffusers that ``attach`` refuses, each with a true reason."""

from __future__ import annotations

_AUDIO = "it makes audio, and controls know pictures and videos only"
_LATER = "its row is not written yet"
_PART = "it is a building block, not a denoiser of its own"

REFUSED: dict[str, str] = {}
