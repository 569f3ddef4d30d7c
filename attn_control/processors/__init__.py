"""One method a file: what it is, its paper, its formula, its defaults."""

from attn_control.processors.control import Control
from attn_control.processors.head_gate import HeadGate
from attn_control.processors.nag import NAG
from attn_control.processors.registry import CONTROLS, build_control
from attn_control.processors.seg import SEG
from attn_control.processors.skip_layers import SkipLayers
from attn_control.processors.soft_pag import SoftPAG

__all__ = [
    "CONTROLS",
    "NAG",
    "SEG",
    "Control",
    "HeadGate",
    "SkipLayers",
    "SoftPAG",
    "build_control",
]
