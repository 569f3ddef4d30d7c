"""From a block mask to the tiles that will run: compiled once a mask, precision and direction."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_control.kernels.tiles.bias import Bias, Tiles, bias_of
from attn_control.kernels.tiles.costs import costs
from attn_control.kernels.tiles.cut import Cut, Tile
from attn_control.kernels.tiles.idle import idle
from attn_control.kernels.tiles.tokens import Blocks, Grid, Run, Tokens, gather
from attn_control.masks.block import OFF, WHOLE, BlockMask


@dataclass(frozen=True, eq=False)
class Task:
    """One softmax: tokens ``rows`` of one side over ``across`` of the other."""

    rows: Run
    across: Tokens
    bias: Bias | None


@dataclass(frozen=True, eq=False)
class Group:
    """Tasks over one run of rows, done by one worker: the first has all of these rows; the others
    have some each, none twice, and what they find is folded into its result.
    """

    rows: Run
    tasks: tuple[Task, ...]
    cost: float

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
    if turned:
        rows, across, cells = across, rows, cells.swapaxes(-1, -2)
    tiles = Tiles(mask, turned)
    price = costs(dtype, turned)
    lists: list[list[Lists]] = []
    for heads in cells:
        lists.append([])
        for table in heads:
            table = np.ascontiguousarray(table)
            heights, widths = (grid.widths.astype(np.float64) for grid in (rows, across))
            cut = Cut(table != OFF, table == WHOLE, heights, widths, price)
            make = _Maker(table, rows, across, tiles)
            lists[-1].append(tuple(make.group(tile) for tile in cut.tiles()))
    return Schedule(tuple(map(tuple, lists)), rows.tokens, across.tokens, idle(mask))


@dataclass(frozen=True, eq=False)
class _Maker:
    """Tiles of one table made into tasks."""

    table: NDArray[np.int32]
    rows: Grid
    across: Grid
    tiles: Tiles

    def group(self, tile: Tile) -> Group:
        codes = self.table[tile.first : tile.last]
        run = self._run(tile)
        if tile.rest is None:
            return Group(run, (self._task(run, codes),), tile.cost)
        shared = (codes == WHOLE).all(0)
        first = self._task(run, np.where(shared, codes, OFF))
        others = self._others(tile.rest, np.where(shared, OFF, codes), tile.first)
        return Group(run, (first, *others), tile.cost)

    def _others(self, rest: Sequence[Tile], codes: NDArray[np.int32], first: int) -> list[Task]:
        tasks = []
        for tile in rest:
            task = self._task(self._run(tile), codes[tile.first - first : tile.last - first])
            if task.across.total:
                tasks.append(task)
        return tasks

    def _run(self, tile: Tile) -> Run:
        bounds = self.rows.bounds
        return Run(int(bounds[tile.first]), int(bounds[tile.last]))

    def _task(self, run: Run, codes: NDArray[np.int32]) -> Task:
        columns = np.flatnonzero((codes != OFF).any(0))
        codes = codes[:, columns]
        across = gather(columns, self.across)
        if not (codes != WHOLE).any() or not across.total:
            return Task(run, across, None)
        at = np.searchsorted(self.rows.bounds, run.start)
        heights = self.rows.widths[at : at + len(codes)]
        widths = self.across.widths[columns]
        bias = bias_of(self.tiles, codes, (heights, self.rows.size), (widths, self.across.size))
        return Task(run, across, bias)
