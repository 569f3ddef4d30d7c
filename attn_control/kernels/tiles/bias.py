"""Additive biases of tiles: 0 where a query may read a key, -inf where it may not."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_control.kernels.tiles.scratch import Scratch
from attn_control.masks.block import FIRST_TILE, WHOLE, BlockMask

KEPT_BYTES, STACK_BYTES = 64 << 20, 32 << 20
"""Biases that one schedule keeps, those beyond are made anew each time; and unpacked tiles."""


def _octets() -> Tensor:
    """float32 (256, 8): what the eight pairs of a byte, lowest bit first, add to their scores."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return torch.where(bits.bool(), 0.0, float("-inf"))


class Tiles:
    """A mask's pool, seen from its queries or, ``turned``, from its keys: (tile, row, column)."""

    def __init__(self, mask: BlockMask, turned: bool) -> None:
        self.pool = mask.pool.cpu().contiguous()
        self.keys, self.turned = mask.k_block, turned
        if sys.byteorder != "little":  # torch has no build for another
            raise NotImplementedError("bit tiles are read byte by byte, lowest first")
        self._table = _octets()
        self.kept = 0
        self.patterns: dict[tuple[object, ...], Bias] = {}

    def keep(self, size: int) -> bool:
        """Whether there is room to keep a bias of so many bytes; it is then taken."""
        if self.kept + size > KEPT_BYTES:
            return False
        self.kept += size
        return True

    @cached_property
    def stack(self) -> Tensor | None:
        """float32 (rows, kinds, columns): of every kind of block, by its code; None: too many."""
        kinds = FIRST_TILE + len(self.pool)
        if kinds * self.pool.shape[1] * self.keys * 4 > STACK_BYTES:
            return None
        return self.unpack(np.arange(kinds, dtype=np.int32)).transpose(0, 1).contiguous()

    def unpack(self, codes: NDArray[np.int32]) -> Tensor:
        """float32 (codes, rows, columns): the bias of each kind of block."""
        rows, columns = self.pool.shape[1], self.keys
        size = (columns, rows) if self.turned else (rows, columns)
        found = torch.empty(len(codes), *size)
        found[torch.from_numpy(codes == WHOLE)] = 0.0
        found[torch.from_numpy(codes < WHOLE)] = float("-inf")
        listed = codes >= FIRST_TILE
        if listed.any():
            packed = self.pool[torch.from_numpy(codes[listed] - FIRST_TILE).long()]
            octets = packed.view(torch.uint8).flatten().int()
            tiles = torch.nn.functional.embedding(octets, self._table)
            tiles = tiles.view(len(packed), rows, -1)[..., :columns]
            found[torch.from_numpy(listed)] = tiles.mT if self.turned else tiles
        return found


@dataclass(eq=False)
class Bias:
    """Of one tile: ``codes`` int32 (row blocks, column blocks), as `BlockMask.cells` has them.

    rows, columns: of the blocks laid side by side at full size, which are there; None: all.
    uses: how many tiles have it. One that is used but once is not kept before its mask is seen to
    be used again: fresh memory costs more than the bias itself.
    """

    tiles: Tiles
    codes: NDArray[np.int32]
    rows: Tensor | None
    columns: Tensor | None
    uses: int = 0
    _asked: int = 0
    _held: Tensor | None = field(default=None, repr=False)

    def tensor(self, scratch: Scratch) -> Tensor:
        """float32 (rows, columns): read-only, and until the next call only; it may be shared, or
        lie in a buffer of the worker's.
        """
        if self._held is not None:
            return self._held
        stack, number = self.tiles.stack, self.codes
        if stack is None:
            kinds, at = np.unique(self.codes, return_inverse=True)
            stack = self.tiles.unpack(kinds).transpose(0, 1).contiguous()
            number = at.reshape(self.codes.shape).astype(np.int32)
        full = (number.shape[0], stack.shape[0], number.shape[1], stack.shape[2])
        made = scratch.get("bias", full, torch.float32)
        for row, codes in enumerate(torch.from_numpy(number)):
            torch.index_select(stack, 1, codes, out=made[row])
        made = made.view(full[0] * full[1], full[2] * full[3])
        if self.rows is not None:
            made = made.index_select(0, self.rows)
        if self.columns is not None:
            made = made.index_select(1, self.columns)
        self._asked += 1
        if max(self.uses, self._asked) > 1 and self.tiles.keep(made.nbytes):
            self._held = made = made.clone()
        return made


def bias_of(
    tiles: Tiles,
    codes: NDArray[np.int32],
    rows: tuple[NDArray[np.int64], int],
    columns: tuple[NDArray[np.int64], int],
) -> Bias:
    """The bias of a tile, shared with all tiles that have the same.

    rows, columns: lengths of the blocks of a side, and of a whole one.
    """
    key = (codes.shape, codes.tobytes(), rows[0].tobytes(), columns[0].tobytes())
    found = tiles.patterns.get(key)
    if found is None:
        found = Bias(tiles, codes.copy(), _present(*rows), _present(*columns))
        tiles.patterns[key] = found
    found.uses += 1
    return found


def _present(lengths: NDArray[np.int64], size: int) -> Tensor | None:
    """Places that are there, of blocks laid side by side at ``size`` tokens each; None: all."""
    if (lengths == size).all():
        return None
    return torch.from_numpy(np.flatnonzero(np.arange(size) < lengths[:, None]))
