"""Which tokens a tile reads, and how they are brought together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_control.kernels.tiles.scratch import Scratch

FEW = 3
"""Runs up to which copies of slices are cheaper than one gather of blocks."""


@dataclass(frozen=True)
class Run:
    """Tokens [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Blocks:
    """``count`` blocks of ``size`` tokens each, ``index`` (int64) of a grid of ``total`` that
    begins at ``start``.
    """

    start: int
    size: int
    total: int
    count: int
    index: Tensor

    def __len__(self) -> int:
        return self.count * self.size

    def rows(self, x: Tensor) -> Tensor:
        """(tokens, dim), contiguous, as a view with a block a row."""
        stop = self.start + self.total * self.size
        return x[self.start : stop].view(self.total, self.size * x.shape[1])


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens in ascending order, as parts that torch copies quickly."""

    parts: tuple[Run | Blocks, ...]
    total: int

    @cached_property
    def run(self) -> Run | None:
        """The one run that they are, if they are: then nothing has to be copied."""
        part = self.parts[0] if len(self.parts) == 1 else None
        return part if isinstance(part, Run) else None

    @cached_property
    def index(self) -> Tensor:
        """int64 (total,): their numbers."""
        found = [
            torch.arange(part.start, part.stop)
            if isinstance(part, Run)
            else (part.start + part.index[:, None] * part.size + torch.arange(part.size)).flatten()
            for part in self.parts
        ]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)

    def take(self, x: Tensor, scratch: Scratch, name: str) -> Tensor:
        """Their rows of x (tokens, dim): a view of x, or of a buffer of the worker's."""
        if (run := self.run) is not None:
            return x[run.start : run.stop]
        if x.device.type != "cpu":
            return x.index_select(0, self.index.to(x.device))
        buffer = scratch.get(name, (self.total, x.shape[1]), x.dtype)
        done = 0
        for part in self.parts:
            into = buffer[done : done + len(part)]
            if isinstance(part, Run):
                into.copy_(x[part.start : part.stop])
            else:
                rows = part.rows(x)
                torch.index_select(rows, 0, part.index, out=into.view(-1, rows.shape[1]))
            done += len(part)
        return buffer

    def add(self, into: Tensor, rows: Tensor) -> None:
        """``into[tokens] += rows``, for into (tokens, dim), contiguous, of the wider type."""
        done = 0
        rows = rows.to(into.dtype)
        for part in self.parts:
            given = rows[done : done + len(part)]
            if isinstance(part, Run):
                into[part.start : part.stop].add_(given)
            else:
                target = part.rows(into)
                at = part.index.to(into.device)
                target.index_add_(0, at, given.reshape(-1, target.shape[1]))
            done += len(part)


def gather(blocks: NDArray[np.int64], grid: Grid) -> Tokens:
    """The tokens of these blocks, whose numbers ascend."""
    if not len(blocks):
        return Tokens((), 0)
    starts, stops = grid.bounds[blocks], grid.bounds[blocks + 1]
    total = int((stops - starts).sum())
    ends = np.flatnonzero(np.append(starts[1:] != stops[:-1], True))
    begins = np.append(0, ends[:-1] + 1)
    if len(ends) <= FEW:
        runs = zip(starts[begins].tolist(), stops[ends].tolist(), strict=True)
        return Tokens(tuple(Run(*run) for run in runs), total)
    # Whole blocks of one region are gathered together; the short one at its end is copied.
    region = grid.region[blocks]
    parts: list[Run | Blocks] = []
    for number in np.unique(region):
        begin, count, first = grid.origin[number]
        own = blocks[region == number] - first
        whole = own[own < count]
        if len(whole):
            index = torch.from_numpy(whole)
            parts.append(Blocks(begin, grid.size, count, len(whole), index))
        if len(whole) < len(own):
            parts.append(Run(begin + count * grid.size, int(grid.bounds[first + own[-1] + 1])))
    return Tokens(tuple(parts), total)


@dataclass(frozen=True, eq=False)
class Grid:
    """The blocks of one side of a mask.

    bounds: int64 (blocks + 1,), tokens; size: of a whole block; region: int64 (blocks,), whose it
        is; origin: for each region its first token, its whole blocks and its first block's number.
    """

    bounds: NDArray[np.int64]
    size: int
    region: NDArray[np.int64]
    origin: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, bounds: Tensor, size: int, regions: tuple[int, ...]) -> Grid:
        edges = bounds.cpu().numpy().astype(np.int64)
        starts = np.cumsum((0, *regions[:-1]))
        number = np.searchsorted(edges, starts)
        origin = tuple(
            (int(start), length // size, int(first))
            for start, length, first in zip(starts, regions, number, strict=True)
        )
        region = np.searchsorted(number, np.arange(len(edges) - 1), side="right") - 1
        return cls(edges, size, region, origin)

    @property
    def widths(self) -> NDArray[np.int64]:
        return np.diff(self.bounds)

    @property
    def tokens(self) -> int:
        return int(self.bounds[-1])
