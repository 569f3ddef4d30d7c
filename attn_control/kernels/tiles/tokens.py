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
        tokens = self.total * self.size
        if tokens < len(x):
            x = x[self.start : self.start + tokens]
        return x.view(self.total, self.size * x.shape[1])


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
    def blocks(self) -> Blocks | None:
        """The blocks of one region that they are, if they are: nearly always, and quickest."""
        part = self.parts[0] if len(self.parts) == 1 else None
        return part if isinstance(part, Blocks) else None

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
        if (blocks := self.blocks) is not None:
            rows = blocks.rows(x)
            buffer = scratch.get(name, (blocks.count, rows.shape[1]), x.dtype)
            torch.index_select(rows, 0, blocks.index, out=buffer)
            return buffer.view(self.total, x.shape[1])
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
    count = len(blocks)
    if not count:
        return Tokens((), 0)
    # Blocks cover all tokens without a gap: a run of tokens is a run of numbers.
    gaps = (blocks[1:] - blocks[:-1] > 1).nonzero()[0]
    if len(gaps) < FEW:
        begins, ends = [0, *(gaps + 1).tolist()], [*gaps.tolist(), count - 1]
        runs = tuple(
            Run(int(grid.bounds[blocks[begin]]), int(grid.bounds[blocks[end] + 1]))
            for begin, end in zip(begins, ends, strict=True)
        )
        return Tokens(runs, sum(map(len, runs)))
    # Whole blocks of one region are gathered together; the short one at its end is copied.
    borders = np.searchsorted(blocks, grid.firsts) if len(grid.origin) > 1 else np.zeros(1, int)
    parts: list[Run | Blocks] = []
    for (begin, whole, first), low, high in zip(
        grid.origin, borders.tolist(), [*borders[1:].tolist(), count], strict=True
    ):
        own = blocks[low:high] - first if first else blocks[low:high]
        short = high > low and int(own[-1]) >= whole
        if len(own) > short:
            index = torch.from_numpy(own[:-1] if short else own)
            parts.append(Blocks(begin, grid.size, whole, len(index), index))
        if short:
            parts.append(Run(begin + whole * grid.size, int(grid.bounds[blocks[high - 1] + 1])))
    return Tokens(tuple(parts), sum(map(len, parts)))


@dataclass(frozen=True, eq=False)
class Grid:
    """The blocks of one side of a mask.

    bounds: int64 (blocks + 1,), tokens; size: of a whole block; origin: for each region its first
        token, its whole blocks and its first block's number; firsts: int64, those numbers alone.
    """

    bounds: NDArray[np.int64]
    size: int
    origin: tuple[tuple[int, int, int], ...]
    firsts: NDArray[np.int64]

    @classmethod
    def of(cls, bounds: Tensor, size: int, regions: tuple[int, ...]) -> Grid:
        edges = bounds.cpu().numpy().astype(np.int64)
        starts = np.cumsum((0, *regions[:-1]))
        number = np.searchsorted(edges, starts)
        origin = tuple(
            (int(start), length // size, int(first))
            for start, length, first in zip(starts, regions, number, strict=True)
        )
        return cls(edges, size, origin, number)

    @cached_property
    def widths(self) -> NDArray[np.int64]:
        return np.diff(self.bounds)

    @property
    def tokens(self) -> int:
        return int(self.bounds[-1])
