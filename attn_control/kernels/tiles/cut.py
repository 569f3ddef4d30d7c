"""Cutting the rows of block tables into tiles, so that attention over them costs least.

Neighbouring block rows share a tile where that is cheaper: with the union of what they read, and a
bias where they differ. Or they share only what all of them read, and each reads the rest alone;
the two results are then folded into one softmax. Tiles are aligned powers of two of block rows, so
that the best choice follows bottom up, for all rows of all heads at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attn_control.kernels.tiles.costs import Costs

Bool = NDArray[np.bool_]
Float = NDArray[np.float64]

TALLEST = 1024
"""Rows of a tile, at most: above 768 the kernel gets no quicker."""
CELLS = 1 << 20
"""Of the tables that are cut at once, or one table."""
TOGETHER, APART, SHARED = range(3)


@dataclass(frozen=True)
class Tile:
    """Block rows [first, last), which read the block columns ``on``, not all of them whole where
    it is ``partial``. With a rest, ``on`` is what all rows read whole, and `rest` what they do not
    share.
    """

    first: int
    last: int
    cost: float
    on: Bool
    partial: bool
    rest: tuple[Tile, ...] = ()


def cut(
    on: Bool, whole: Bool, heights: Float, widths: Float, costs: Costs
) -> Iterator[tuple[Tile, ...]]:
    """For each table in turn the cheapest tiles that together hold all its rows.

    on, whole: (tables, block rows, block columns); heights, widths: tokens of both.
    """
    few = max(1, CELLS // (on.shape[1] * on.shape[2]))
    for start in range(0, len(on), few):
        tables = slice(start, start + few)
        yield from _Cut(on[tables], whole[tables], heights, widths, costs).tiles()


@dataclass(frozen=True)
class _Level:
    """Of each tile of 2^level rows of each table: (tables, tiles), the first two with columns."""

    on: Bool
    whole: Bool
    partial: Bool
    choice: NDArray[np.int64]
    cost: Float


def _pairs(x: NDArray, empty: bool | float) -> tuple[NDArray, NDArray]:
    """Even and odd tiles; an odd number of them gets an ``empty`` one more."""
    if x.shape[1] % 2:
        x = np.concatenate([x, np.full((len(x), 1, *x.shape[2:]), empty, x.dtype)], 1)
    return x[:, 0::2], x[:, 1::2]


def _runs(on: Bool) -> NDArray[np.int64]:
    """Of neighbouring columns."""
    return np.count_nonzero(on[..., 1:] & ~on[..., :-1], -1) + on[..., 0]


class _Cut:
    def __init__(self, on: Bool, whole: Bool, heights: Float, widths: Float, costs: Costs) -> None:
        self.rows, self.costs, self.widths = on.shape[1], costs, widths.astype(np.float32)
        self.heights = [heights[None]]
        most = heights.max(initial=1)
        while self.heights[-1].shape[1] > 1 and most * 2 ** len(self.heights) <= TALLEST:
            a, b = _pairs(self.heights[-1], 0)
            self.heights.append(a + b)
        # Sharing at a level asks for what its rows have in common: everything is merged once first.
        merged = [(on, whole)]
        for _ in self.heights[1:]:
            merged.append(_merged(*merged[-1]))
        self.common = [one & every for one, every in merged]
        self.below = [self._upward(self._rest(on, whole, n), n) for n in range(len(merged))]
        shares = [self._share(level) for level in range(len(merged))]
        self.levels = self._upward((on, whole), len(merged) - 1, shares)

    def _width(self, on: Bool) -> Float:
        return (on.astype(np.float32) @ self.widths).astype(np.float64)

    def _upward(
        self, tables: tuple[Bool, Bool], top: int, shares: list[Float] | None = None
    ) -> list[_Level]:
        """The best of every tile up to level ``top``; ``shares``: cost of sharing, by level."""
        on, whole = tables
        found: list[_Level] = []
        for level in range(top + 1):
            if level:
                on, whole = _merged(on, whole)
            partial = (on & ~whole).any(-1)
            cost = self.costs.of(self.heights[level], self._width(on), partial, _runs(on))
            choice = np.full(cost.shape, TOGETHER)
            if level:
                a, b = _pairs(found[-1].cost, 0.0)
                choice, cost = _cheaper(choice, cost, APART, a + b)
            if shares is not None:
                choice, cost = _cheaper(choice, cost, SHARED, shares[level])
            found.append(_Level(on, whole, partial, choice, cost))
        return found

    def _rest(self, on: Bool, whole: Bool, level: int) -> tuple[Bool, Bool]:
        """What block rows read that not all rows of their tile of ``level`` read whole."""
        common = np.repeat(self.common[level], 2**level, axis=1)[:, : self.rows]
        return on & ~common, whole | common

    def _share(self, level: int) -> Float:
        """Cost of each tile of a level, where its rows share only what all of them read whole."""
        heights, common = self.heights[level], self.common[level]
        width, rest = self._width(common), self.below[level][-1].cost
        first = self.costs.of(heights, width, np.zeros(width.shape, bool), _runs(common))
        # One fold for each block row at most; taken as so many, which slightly overstates it.
        fold = self.costs.fold * 2**level + self.costs.row * heights
        return np.where((width > 0) & (rest > 0), first + rest + fold, np.inf)

    def tiles(self) -> Iterator[tuple[Tile, ...]]:
        """Of each table."""
        top = len(self.levels) - 1
        for table in range(len(self.levels[0].cost)):
            found: list[Tile] = []
            for at in range(self.levels[top].cost.shape[1]):
                self._walk(self.levels, table, top, at, found)
            yield tuple(found)

    def _walk(
        self, levels: list[_Level], table: int, level: int, at: int, into: list[Tile]
    ) -> None:
        first, last = at << level, min((at + 1) << level, self.rows)
        if first >= self.rows:
            return
        here, place = levels[level], (table, at)
        choice, cost = here.choice[place], float(here.cost[place])
        if choice == APART:
            self._walk(levels, table, level - 1, 2 * at, into)
            self._walk(levels, table, level - 1, 2 * at + 1, into)
        elif choice == TOGETHER:
            into.append(Tile(first, last, cost, here.on[place], bool(here.partial[place])))
        else:
            rest: list[Tile] = []
            self._walk(self.below[level], table, level, at, rest)
            common = self.common[level][place]
            into.append(Tile(first, last, cost, common, False, tuple(rest)))


def _merged(on: Bool, whole: Bool) -> tuple[Bool, Bool]:
    """Of two tiles each: what either reads, and what both read whole."""
    (a, b), (c, d) = _pairs(on, False), _pairs(whole, True)
    return a | b, c & d


def _cheaper(
    choice: NDArray[np.int64], cost: Float, other: int, price: Float
) -> tuple[NDArray[np.int64], Float]:
    less = price < cost
    return np.where(less, other, choice), np.where(less, price, cost)
