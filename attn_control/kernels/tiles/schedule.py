"""From a block mask to the tiles that will run: compiled once a mask, precision and direction."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_control.kernels.tiles.bias import Bias, Tiles, bias_of
from attn_control.kernels.tiles.costs import PIECE, costs
from attn_control.kernels.tiles.cut import Tile, cut
from attn_control.kernels.tiles.idle import idle
from attn_control.kernels.tiles.tokens import Blocks, Grid, Run, Tokens, gather
from attn_control.masks.block import OFF, WHOLE, BlockMask


@dataclass(frozen=True, eq=False)
class Task:
    """One softmax: tokens ``rows`` of one side over ``across`` of the other.

    pieces: the same in parts of ``across``, to be folded, where its bias is too large at once.
    """

    rows: Run
    across: Tokens
    bias: Bias | None
    pieces: tuple[Task, ...] = ()


@dataclass(frozen=True, eq=False)
class Group:
    """Tasks over one run of rows, done by one worker: the first has all of these rows; the others
    have some each, none twice, and what they find is folded into its result.
    """

    rows: Run
    tasks: tuple[Task, ...]
    cost: float

    @property
    def parts(self) -> list[Task]:
        """Tasks, those in pieces piece by piece."""
        return [part for task in self.tasks for part in task.pieces or (task,)]

    @property
    def pairs(self) -> int:
        return sum(len(task.rows) * task.across.total for task in self.tasks)


Lists = tuple[Group, ...]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Groups of each batch row and head; a mask that is shared has them once.

    rows, across: tokens of the two sides. Tiles are of queries over keys, or, for backward, of keys
        over queries.
    idle: queries and keys that take no part, see `idle`.
    """

    lists: tuple[tuple[Lists, ...], ...]
    rows: int
    across: int
    idle: tuple[Tensor | None, Tensor | None] = (None, None)

    def of(self, batch: int, head: int) -> Lists:
        heads = self.lists[batch if len(self.lists) > 1 else 0]
        return heads[head if len(heads) > 1 else 0]

    @property
    def shared(self) -> bool:
        """Whether all heads have the same groups."""
        return len(self.lists[0]) == 1

    @cached_property
    def all(self) -> list[Group]:
        return [group for heads in self.lists for groups in heads for group in groups]

    @cached_property
    def gathers(self) -> bool:
        """Whether any tile gathers blocks, for which tokens have to be contiguous."""
        return any(
            isinstance(part, Blocks)
            for group in self.all
            for task in group.tasks
            for part in task.across.parts
        )

    @cached_property
    def computed(self) -> float:
        """Share of all pairs that is computed."""
        lists = sum(len(heads) for heads in self.lists)
        return sum(group.pairs for group in self.all) / (lists * self.rows * self.across)

    @cached_property
    def cost(self) -> float:
        """Predicted time over that of dense attention."""
        lists = sum(len(heads) for heads in self.lists)
        return sum(group.cost for group in self.all) / (lists * self.rows * self.across)


def dense(rows: int, across: int) -> Schedule:
    """Everything, in tiles as tall as pays; for calls without a block mask."""
    tall = 1024
    every = Tokens((Run(0, across),) if across else (), across)
    groups = []
    for start in range(0, rows, tall):
        run = Run(start, min(start + tall, rows))
        groups.append(Group(run, (Task(run, every, None),), float(len(run) * across)))
    return Schedule(((tuple(groups),),), rows, across)


_KEPT: weakref.WeakKeyDictionary[BlockMask, dict[tuple[torch.dtype, bool], Schedule]]
_KEPT = weakref.WeakKeyDictionary()
_LOCK = Lock()


def schedule(mask: BlockMask, dtype: torch.dtype, backward: bool = False) -> Schedule:
    """The tiles of a mask: of queries over keys, or for backward of keys over queries.

    It is kept as long as the mask object lives, whose tensors must therefore not be written to.
    """
    with _LOCK:
        kept = _KEPT.setdefault(mask, {})
        found = kept.get((dtype, backward))
    if found is None:
        found = _compile(mask, dtype, backward)
        with _LOCK:
            kept[dtype, backward] = found
    return found


def _compile(mask: BlockMask, dtype: torch.dtype, turned: bool) -> Schedule:
    rows = Grid.of(mask.q_bounds, mask.q_block, mask.q_regions)
    across = Grid.of(mask.k_bounds, mask.k_block, mask.k_regions)
    cells = mask.cells().cpu().numpy()
    unused = idle(mask, cells)
    if turned:
        rows, across, cells = across, rows, cells.swapaxes(-1, -2)
    tables = np.ascontiguousarray(cells.reshape(-1, *cells.shape[2:]))
    heights, widths = (grid.widths.astype(np.float64) for grid in (rows, across))
    found = cut(tables != OFF, tables == WHOLE, heights, widths, costs(dtype, turned))
    make = _Maker(rows, across, Tiles(mask, turned), rows.bounds.tolist())
    made = [
        tuple(make.group(tile, table) for tile in tiles)
        for table, tiles in zip(tables, found, strict=True)
    ]
    heads = mask.heads
    lists = tuple(tuple(made[at : at + heads]) for at in range(0, len(made), heads))
    return Schedule(lists, rows.tokens, across.tokens, unused)


@dataclass(frozen=True, eq=False)
class _Maker:
    """Tiles made into tasks. starts: where each block row begins, and the end of the last."""

    rows: Grid
    across: Grid
    tiles: Tiles
    starts: list[int]

    def group(self, tile: Tile, table: NDArray[np.int32]) -> Group:
        """Of a tile of this table, as `BlockMask.cells` has it."""
        first = self._task(tile, table)
        others = (self._task(part, table) for part in tile.rest)
        tasks = (first, *(task for task in others if task.across.total))
        return Group(first.rows, tasks, tile.cost)

    def _task(self, tile: Tile, table: NDArray[np.int32]) -> Task:
        columns = tile.on.nonzero()[0]
        if not tile.partial:
            run = Run(self.starts[tile.first], self.starts[tile.last])
            return Task(run, gather(columns, self.across), None)
        task = self._partial(tile, table, columns)
        parts = -(-len(task.rows) * task.across.total // PIECE)
        if parts < 2:
            return task
        shares = np.array_split(columns, min(parts, len(columns)))
        return replace(task, pieces=tuple(self._partial(tile, table, share) for share in shares))

    def _partial(self, tile: Tile, table: NDArray[np.int32], columns: NDArray[np.int64]) -> Task:
        """Of some columns of a tile."""
        run = Run(self.starts[tile.first], self.starts[tile.last])
        across, codes = gather(columns, self.across), table[tile.first : tile.last, columns]
        if not (codes != WHOLE).any():
            return Task(run, across, None)
        heights, widths = self.rows.widths[tile.first : tile.last], self.across.widths[columns]
        bias = bias_of(self.tiles, codes, (heights, self.rows.size), (widths, self.across.size))
        return Task(run, across, bias)
