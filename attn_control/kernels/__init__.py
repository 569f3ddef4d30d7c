"""Tensor code of attention. Knows no diffusers and no Session."""

from attn_control.kernels.attention import attend
from attn_control.kernels.blur import Blur, gaussian
from attn_control.kernels.choose import Choice, explain
from attn_control.kernels.epilogues import Blend, Gain, Gates, Region
from attn_control.kernels.nag import Extrapolate
from attn_control.kernels.paths import PATHS
from attn_control.kernels.permute import Permute
from attn_control.kernels.probing import probe
from attn_control.kernels.targets import TARGETS, Target

__all__ = [
    "PATHS",
    "TARGETS",
    "Blend",
    "Blur",
    "Choice",
    "Extrapolate",
    "Gain",
    "Gates",
    "Permute",
    "Region",
    "Target",
    "attend",
    "explain",
    "gaussian",
    "probe",
]
