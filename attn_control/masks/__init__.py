"""Which query tokens may read which key tokens, listed by blocks. Knows no model and no module."""

from attn_control.masks.block import BlockMask

__all__ = ["BlockMask"]
