"""One tab a file: its methods as data, and how it is laid out. A new tab is a new file here."""

from attn_control.studio.tabs import guidance, job, video

TABS = (guidance, video, job)
METHODS = tuple(method for tab in TABS for method in tab.METHODS)
TAB_OF = {method.control: tab.NAME for tab in TABS for method in tab.METHODS}

__all__ = ["METHODS", "TABS", "TAB_OF"]
