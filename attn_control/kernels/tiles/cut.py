"""Cutting the rows of a block table into tiles, so that attention over them costs least.

Neighbouring block rows share a tile where that is cheaper: with the union of what they read, and a
bias where they differ. Or they share only what all of them read, and each reads the rest alone;
the two results are then folded into one softmax. Tiles are aligned powers of two of block rows, so
that the best choice follows bottom up, for all rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attn_control.kernels.tiles.costs import Costs

Bool = NDArray[np.bool_]
Float = NDArray[np.float64]

TALLEST = 1024
"""Rows of a tile, at most: above 768 the kernel gets no quicker."""


@dataclass(frozen=True)
class Tile:
    """Block rows [first, last). shared: only what all of them read, `rest` has what they do not
    share; otherwise rest is None.
    """

    first: int
    last: int
    cost: float
    rest: tuple[Tile, ...] | None = None


def _pairs(x: NDArray, empty: bool | float) -> tuple[NDArray, NDArray]:
    """Even and odd rows; an odd number of rows gets an ``empty`` one more."""
    if len(x) % 2:
        x = np.concatenate([x, np.full((1, *x.shape[1:]), empty, x.dtype)])
    return x[0::2], x[1::2]


class Cut:
    """One table: ``on`` and ``whole`` bool (block rows, block columns), lengths of both."""

    def __init__(self, on: Bool, whole: Bool, heights: Float, widths: Float, costs: Costs) -> None:
        self.rows, self.costs, self.widths = len(on), costs, widths
        self.on, self.whole, self.heights = [on], [whole], [heights]
        most = heights.max(initial=1)
        while len(self.on[-1]) > 1 and most * 2 ** len(self.on) <= TALLEST:
            a, b = _pairs(self.on[-1], False)
            self.on.append(a | b)
            a, b = _pairs(self.whole[-1], True)
            self.whole.append(a & b)
            a, b = _pairs(self.heights[-1], 0)
            self.heights.append(a + b)

    def _together(self, level: int, on: Bool, whole: Bool) -> Float:
        """Cost of each tile of a level, its rows taken together."""
        width = on.astype(np.float32) @ self.widths.astype(np.float32)
        runs = (on[:, 1:] & ~on[:, :-1]).sum(1) + on[:, 0]
        partial = (on & ~whole).any(1)
        return self.costs.of(self.heights[level], width.astype(np.float64), partial, runs)

    def _upward(self, on: Bool, whole: Bool, top: int, shares: list[Float]) -> list[_Level]:
        """The best of every tile up to level ``top``; ``shares``: cost of sharing, by level."""
        found: list[_Level] = []
        for level in range(top + 1):
            if level:
                a, b = _pairs(on, False)
                on = a | b
                a, b = _pairs(whole, True)
                whole = a & b
            together = self._together(level, on, whole)
            choices = [together]
            if level:
                a, b = _pairs(found[-1].cost, 0.0)
                choices.append(a + b)
            else:
                choices.append(np.full_like(together, np.inf))
            choices.append(shares[level] if shares else np.full_like(together, np.inf))
            table = np.stack(choices)
            found.append(_Level(table.argmin(0), table.min(0)))
        return found

    def _rest(self, level: int) -> tuple[Bool, Bool]:
        """What block rows read that not all rows of their tile of ``level`` read whole."""
        shared = self.whole[level] & self.on[level]
        shared = np.repeat(shared, 2**level, axis=0)[: self.rows]
        return self.on[0] & ~shared, self.whole[0] | shared

    def _share(self, level: int) -> Float:
        """Cost of each tile of a level, where its rows share only what all of them read whole."""
        heights = self.heights[level]
        common = self.on[level] & self.whole[level]
        width = (common.astype(np.float32) @ self.widths.astype(np.float32)).astype(np.float64)
        runs = (common[:, 1:] & ~common[:, :-1]).sum(1) + common[:, 0]
        first = self.costs.of(heights, width, np.zeros(len(width), bool), runs)
        on, whole = self._rest(level)
        rest = self._upward(on, whole, level, [])[-1].cost
        # One fold for each block row at most; taken as so many, which slightly overstates it.
        fold = self.costs.fold * 2**level + self.costs.row * heights
        return np.where((width > 0) & (rest > 0), first + rest + fold, np.inf)

    def tiles(self) -> list[Tile]:
        """The cheapest tiles that together hold all rows."""
        top = len(self.on) - 1
        shares = [self._share(level) for level in range(top + 1)]
        levels = self._upward(self.on[0], self.whole[0], top, shares)
        below: dict[int, list[_Level]] = {}
        found: list[Tile] = []

        def walk(levels: list[_Level], level: int, at: int, into: list[Tile]) -> None:
            if at << level >= self.rows:
                return
            choice, cost = int(levels[level].choice[at]), float(levels[level].cost[at])
            first, last = at << level, min((at + 1) << level, self.rows)
            if choice == 1:
                walk(levels, level - 1, 2 * at, into)
                walk(levels, level - 1, 2 * at + 1, into)
            elif choice == 0:
                into.append(Tile(first, last, cost))
            else:
                if level not in below:
                    below[level] = self._upward(*self._rest(level), level, [])
                rest: list[Tile] = []
                walk(below[level], level, at, rest)
                into.append(Tile(first, last, cost, tuple(rest)))

        for at in range(len(levels[top].cost)):
            walk(levels, top, at, found)
        return found


@dataclass(frozen=True)
class _Level:
    """Of each tile of a level: 0 together, 1 in two halves, 2 shared; and the cost of that."""

    choice: NDArray[np.int64]
    cost: Float
