"""The one error class of the package; every module may import it."""

from __future__ import annotations


class AttnControlError(ValueError):
    """A request that cannot be carried out: names the control, the place, the value, the need."""
