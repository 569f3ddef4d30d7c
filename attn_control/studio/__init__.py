"""The studio: a page in the browser, where pictures are made without and with control."""

from attn_control.studio.settings import Refused, Settings

__all__ = ["Refused", "Settings"]
