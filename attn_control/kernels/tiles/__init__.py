"""``impl="torch"``: large query tiles over the keys that a mask keeps, one worker a core."""

from attn_control.kernels.tiles.run import attend_tiles

__all__ = ["attend_tiles"]
