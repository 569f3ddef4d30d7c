"""One method a file: what it is, its paper, its formula, its defaults."""

from attn_control.policy import StepPolicy
from attn_control.processors.auto_sparse import AutoSparse
from attn_control.processors.control import Control
from attn_control.processors.head_gate import HeadGate
from attn_control.processors.nag import NAG
from attn_control.processors.neighborhood import NeighborhoodAttention
from attn_control.processors.radial import RadialAttention
from attn_control.processors.registry import CONTROLS, SPARSE, build_control
from attn_control.processors.reshaped import ReshapedAttention
from attn_control.processors.seg import SEG
from attn_control.processors.selected import SelectedAttention
from attn_control.processors.skip_layers import SkipLayers
from attn_control.processors.soft_pag import SoftPAG
from attn_control.processors.spatial_temporal import SpatialTemporalAttention
from attn_control.processors.tile import TileAttention

__all__ = [
    "CONTROLS",
    "NAG",
    "SEG",
    "SPARSE",
    "AutoSparse",
    "Control",
    "HeadGate",
    "NeighborhoodAttention",
    "RadialAttention",
    "ReshapedAttention",
    "SelectedAttention",
    "SkipLayers",
    "SoftPAG",
    "SpatialTemporalAttention",
    "StepPolicy",
    "TileAttention",
    "build_control",
]
