"""Line: text in one line, which part of it is the prompt, and which of it asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attn_control.call import Layout
from attn_control.errors import AttnControlError
from attn_control.masks.block import BlockMask
from attn_control.masks.bounds import bounds_of
from attn_control.masks.place import suited

REGIONS = ("prompt", "response")
"""The regions of a text that may have a budget each."""
_REGION = {"prompt": "prompt", "response": "response", "canvas": "response", "pad": None}


@dataclass(frozen=True)
class Cut:
    """Tokens in a line, cut into blocks that begin anew at each region.

    regions: tokens of each; block: tokens a block.
    """

    regions: tuple[int, ...]
    block: int

    @property
    def length(self) -> int:
        return sum(self.regions)


@dataclass(frozen=True)
class Line:
    """The keys of a call on text, and which of them are its queries too.

    parts: (name, tokens) of the keys, in order: "prompt", "response", "canvas" (what is being
    written, where a cache holds all else), "pad" (room in a cache that nobody reads), or "text"
    where the prompt's length is not known. first, queries: the queries are the keys first ..
    first + queries - 1; they begin where a part does and end where one ends.
    """

    parts: tuple[tuple[str, int], ...]
    first: int
    queries: int

    @classmethod
    def fits(cls, layout: Layout) -> bool:
        """Whether all tokens of a call are text."""
        return all(s.grid is None and s.role in ("text", "pad") for s in (*layout.q, *layout.k))

    @classmethod
    def of(cls, layout: Layout) -> Line:
        """Raises AttnControlError where the queries are not some of the keys."""
        parts = tuple((s.name, s.length) for s in layout.k)
        if layout.is_self:
            return cls(parts, 0, layout.q_len)
        mine = [s for s in layout.k if (s.name, s.length) == (layout.q[0].name, layout.q_len)]
        if len(layout.q) > 1 or len(mine) != 1:
            raise AttnControlError("its queries are not among its keys")
        return cls(parts, mine[0].start, layout.q_len)

    @property
    def length(self) -> int:
        """Of the keys."""
        return sum(tokens for _, tokens in self.parts)

    @property
    def tokens(self) -> dict[str, int]:
        """Keys of each region; those whose region is not known are "text"."""
        found: dict[str, int] = {}
        for region, tokens in self.runs:
            if region is not None:
                found[region] = tokens
        return found

    @property
    def runs(self) -> list[tuple[str | None, int]]:
        """(region, tokens) in the order of the keys, neighbours of one region as one; None for keys
        that nobody reads.
        """
        found: list[tuple[str | None, int]] = []
        for name, tokens in self.parts:
            region = _REGION.get(name, name)
            if found and found[-1][0] == region:
                found[-1] = region, found[-1][1] + tokens
            else:
                found.append((region, tokens))
        return found

    def block(self, given: int | None) -> int:
        """Tokens a block: as given, or what suits the length."""
        return suited(self.length) if given is None else given

    def cuts(self, block: int) -> tuple[Cut, Cut]:
        """Blocks of the queries and of the keys: those of the queries are some of the keys'."""
        keys = tuple(tokens for _, tokens in self.parts)
        edges = [sum(keys[:n]) for n in range(len(keys) + 1)]
        inside = [n for n, edge in enumerate(edges[:-1]) if self.first <= edge < self._last]
        return Cut(tuple(keys[n] for n in inside), block), Cut(keys, block)

    @property
    def _last(self) -> int:
        return self.first + self.queries

    def near(self, block: int, reach: int) -> BlockMask:
        """What each block of queries reads in any case: itself, and the ``reach - 1`` blocks about
        it as `tiles_mask` has it: an even reach leans to the left, and none is cut off at an end.
        """
        asking, keys = self.cuts(block)
        rows = len(bounds_of(asking.regions, block)) - 1
        edges = bounds_of(keys.regions, block).tolist()
        unread = self.parts[-1][1] if self.parts[-1][0] == "pad" else 0
        usable = edges.index(self.length - unread)
        own = torch.arange(rows) + edges.index(self.first)
        width = min(reach, usable)
        start = (own - width // 2).clamp(0, usable - width)
        column = torch.arange(len(edges) - 1)
        table = (column >= start[:, None]) & (column < start[:, None] + width)
        return BlockMask.from_table(
            table[None], block_size=block, q_regions=asking.regions, k_regions=keys.regions
        )

    def refuse_unknown(self, who: str, budgets: Mapping[str, object]) -> None:
        """Raises AttnControlError for budgets of regions that this text is not known to have."""
        if "text" in self.tokens:
            raise AttnControlError(
                f"{who}: budgets of {' and '.join(budgets)} need to know where the prompt ends,"
                " which only the pipeline tells: attach to the whole pipeline, and call it"
            )
