"""Control the attention of any diffusers pipeline: composable, exact and undoable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_control.errors import AttnControlError

if TYPE_CHECKING:
    from attn_control.catalog import preset, presets
    from attn_control.session import Session, attach

__all__ = ["AttnControlError", "Session", "attach", "preset", "presets"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; the command line's --help must not wait for it.
    home = {"attach": "session", "Session": "session", "preset": "catalog", "presets": "catalog"}
    if name in home:
        import importlib

        return getattr(importlib.import_module(f"attn_control.{home[name]}"), name)
    raise AttributeError(f"module 'attn_control' has no attribute {name!r}")
