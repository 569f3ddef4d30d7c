"""Tensor code of attention. Knows no diffusers and no Session."""

from attn_control.kernels.epilogues import Blend, Gain, Region

__all__ = ["Blend", "Gain", "Region"]
