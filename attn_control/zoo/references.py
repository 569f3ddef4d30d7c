"""Reference pictures: how the fixed ones are drawn, and the pipeline that takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from attn_control.errors import AttnControlError
from attn_control.zoo.scenes import draw
from attn_control.zoo.textures import REFERENCE, reference_scene

if TYPE_CHECKING:
    from diffusers import FluxKontextPipeline


def draw_reference(texture: str, seed: int) -> np.ndarray:
    """The picture that a fixed prompt of shapes-flux points to, uint8 (128, 128, 3)."""
    return draw(reference_scene(texture, seed))


def asks_for_reference(caption: str) -> bool:
    """Whether a caption of shapes-flux leaves the texture to a reference.

    >>> asks_for_reference("a red circle with the texture of the reference")
    True
    """
    return REFERENCE in " ".join(caption.lower().split())


def with_references(pipe: Any) -> FluxKontextPipeline:
    """The pipeline that takes pictures, around the same parts; without one it draws the same bits.

    Raises AttnControlError for a pipeline whose model was not trained with references.
    """
    from diffusers import FluxKontextPipeline, FluxPipeline

    if type(pipe) is not FluxPipeline:
        raise AttnControlError(f"{type(pipe).__name__} takes no reference pictures")
    kontext = FluxKontextPipeline(**pipe.components)
    kontext.set_progress_bar_config(disable=True)
    return kontext
