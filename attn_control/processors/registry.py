"""Controls by name, for job files and the studio."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.processors.auto_sparse import AutoSparse
from attn_control.processors.control import Control
from attn_control.processors.head_gate import HeadGate
from attn_control.processors.nag import NAG
from attn_control.processors.neighborhood import NeighborhoodAttention
from attn_control.processors.radial import RadialAttention
from attn_control.processors.reshaped import ReshapedAttention
from attn_control.processors.seg import SEG
from attn_control.processors.selected import SelectedAttention
from attn_control.processors.skip_layers import SkipLayers
from attn_control.processors.soft_pag import SoftPAG
from attn_control.processors.spatial_temporal import SpatialTemporalAttention
from attn_control.processors.tile import TileAttention

SPARSE = (
    RadialAttention,
    NeighborhoodAttention,
    TileAttention,
    SpatialTemporalAttention,
    SelectedAttention,
    ReshapedAttention,
    AutoSparse,
)
CONTROLS: dict[str, type[Control]] = {
    cls.__name__: cls for cls in (SoftPAG, SEG, SkipLayers, NAG, HeadGate, *SPARSE)
}


def build_control(name: str, options: Mapping[str, Any]) -> Control:
    """The control of that name with these options.

    Raises:
        AttnControlError: an unknown control or option (with the nearest known one), a missing or
            bad value.
    """
    if name not in CONTROLS:
        raise AttnControlError(
            f"unknown control {name!r}{_hint(str(name), CONTROLS)}; known: {', '.join(CONTROLS)}"
        )
    cls = CONTROLS[name]
    known = [f.name for f in fields(cls) if f.name not in ("gates", "negative")]  # tensors
    if not isinstance(options, Mapping):
        raise AttnControlError(f"{name}: expected options such as {{heads: L3H1}}, got {options!r}")
    for key in options:
        if key not in known:
            raise AttnControlError(
                f"{name}: unknown option {key!r}{_hint(str(key), known)}; known: {', '.join(known)}"
            )
    if "heads" not in options and any(
        f.name == "heads" and f.default is MISSING for f in fields(cls)
    ):
        raise AttnControlError(
            f"{name}: option 'heads' is missing; expected a selector such as 'L3H1, L5'"
        )
    return cls(**options)


def _hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
