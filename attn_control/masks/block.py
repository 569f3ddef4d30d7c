"""BlockMask: which query tokens may read which key tokens, listed by blocks of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attn_control.masks import bits, check
from attn_control.masks.bounds import bounds_of, check_regions

OFF, WHOLE, FIRST_TILE = 0, 1, 2
"""What an entry of `BlockMask.cells` says; tile n of the pool is FIRST_TILE + n."""
CHUNK = 1 << 17
"""Cells looked at at once."""


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Kept blocks, per batch row and head: memory is in blocks, never in tokens squared.

    Args:
        q_block, k_block: tokens a block; ``k_block`` is a multiple of 32 wherever there are tiles.
        q_regions, k_regions: lengths of runs of tokens, in order. The grid of blocks restarts at
            each, so that no block straddles two (video and text, or two frames); the last block of
            a region may be short.
        count: int32 (batch, heads, q_blocks), kept key blocks; batch and heads may be 1: shared.
        index: int32 (batch, heads, q_blocks, most), which, ascending; past ``count`` 0, no meaning.
        tile: int32 like ``index``: -1 where the whole block is on, else the number of a bit tile.
        pool: int32 (tiles, q_block, ceil(k_block / 32)): bit ``j % 32`` of word ``j // 32`` of row
            i tells whether query i of the block reads its key j. Each tile once; past the end of a
            short block 0; never all 0, never all 1 as far as the block goes.

    Raises:
        AttnControlError: shapes, dtypes or devices that do not fit. What the lists hold is looked
            at by `validate`, which constructors of user-given data call.
    """

    q_block: int
    k_block: int
    q_regions: tuple[int, ...]
    k_regions: tuple[int, ...]
    count: Tensor
    index: Tensor
    tile: Tensor
    pool: Tensor

    def __post_init__(self) -> None:
        for side in "qk":
            given = getattr(self, f"{side}_regions"), getattr(self, f"{side}_block")
            object.__setattr__(self, f"{side}_regions", check_regions("BlockMask", side, *given))
        check.shapes(self)

    def __repr__(self) -> str:
        return (
            f"BlockMask({self.batch} x {self.heads} lists of {self.q_len} x {self.k_len} tokens, "
            f"{self.q_blocks} x {self.k_blocks} blocks of {self.q_block} x {self.k_block}, "
            f"{len(self.pool)} tiles, {self.device})"
        )

    # ---- what follows from the fields

    @property
    def q_len(self) -> int:
        return sum(self.q_regions)

    @property
    def k_len(self) -> int:
        return sum(self.k_regions)

    @property
    def q_blocks(self) -> int:
        return len(bounds_of(self.q_regions, self.q_block)) - 1

    @property
    def k_blocks(self) -> int:
        return len(bounds_of(self.k_regions, self.k_block)) - 1

    @property
    def batch(self) -> int:
        return self.count.shape[0]

    @property
    def heads(self) -> int:
        return self.count.shape[1]

    @property
    def device(self) -> torch.device:
        return self.count.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.count, self.index, self.tile, self.pool))

    @cached_property
    def q_bounds(self) -> Tensor:
        """int32 (q_blocks + 1,): block b covers query tokens [q_bounds[b], q_bounds[b + 1])."""
        return torch.tensor(bounds_of(self.q_regions, self.q_block), device=self.device)

    @cached_property
    def k_bounds(self) -> Tensor:
        """int32 (k_blocks + 1,), as `q_bounds`."""
        return torch.tensor(bounds_of(self.k_regions, self.k_block), device=self.device)

    @property
    def grid(self) -> dict[str, Any]:
        """Block sizes and regions, as the constructors take them."""
        return {n: getattr(self, n) for n in ("q_block", "k_block", "q_regions", "k_regions")}

    @property
    def listed(self) -> Tensor:
        """bool like ``index``: the entries that mean something."""
        slot = torch.arange(self.index.shape[-1], device=self.device)
        return slot < self.count.unsqueeze(-1)

    def cells(self) -> Tensor:
        """int32 (batch, heads, q_blocks, k_blocks): 0 off, 1 whole, 2 + n tile n of the pool."""
        table = torch.zeros(
            self.batch, self.heads, self.q_blocks, self.k_blocks, dtype=torch.int32
        ).to(self.device)
        few = max(1, CHUNK // self.index.shape[-1])
        parts = (x.flatten(0, 2).split(few) for x in (table, self.index, self.tile, self.listed))
        for rows, index, tile, listed in zip(*parts, strict=True):
            # Entries past count point at block 0: added as 0, they change nothing.
            rows.scatter_add_(-1, index.long(), (tile + FIRST_TILE) * listed)
        return table

    @property
    def table(self) -> Tensor:
        """bool (heads, q_blocks, k_blocks), with the batch in front if there is more than one:
        which blocks are visited.
        """
        kept = self.cells().ne(OFF)
        return kept[0] if self.batch == 1 else kept

    # ---- constructors

    @classmethod
    def from_cells(
        cls,
        cells: Tensor,
        pool: Tensor | None = None,
        *,
        q_block: int,
        k_block: int,
        q_regions: Sequence[int],
        k_regions: Sequence[int],
    ) -> BlockMask:
        """From a table as `cells` returns it, and the pool that it refers to."""
        rows = cells.flatten(0, 2)
        count = rows.ne(OFF).sum(-1)
        most = max(1, int(count.max()))
        index = torch.zeros(len(rows), most, dtype=torch.int32, device=rows.device)
        tile = torch.full_like(index, -1)
        few = max(1, CHUNK // rows.shape[1])  # rows at once: their places are int64
        for part, kept, into, tiles in zip(
            *(x.split(few) for x in (rows, count, index, tile)), strict=True
        ):
            row, column = part.nonzero(as_tuple=True)  # rows in order, columns ascending
            slot = torch.arange(len(row), device=rows.device) - (kept.cumsum(0) - kept)[row]
            into[row, slot] = column.int()
            tiles[row, slot] = part[row, column] - FIRST_TILE
        shape = cells.shape[:3]
        if pool is None:
            pool = index.new_zeros(0, q_block, bits.words(k_block))
        return cls(
            q_block,
            k_block,
            tuple(q_regions),
            tuple(k_regions),
            count.int().view(shape),
            index.view(*shape, most),
            tile.view(*shape, most),
            pool,
        )

    @classmethod
    def from_table(
        cls,
        table: Tensor,
        *,
        block_size: int | tuple[int, int] = 128,
        q_len: int | None = None,
        k_len: int | None = None,
        q_regions: Sequence[int] | None = None,
        k_regions: Sequence[int] | None = None,
    ) -> BlockMask:
        """Whole blocks, from a bool table of which to visit. See `tables.from_table`."""
        from attn_control.masks.tables import from_table

        return from_table(table, block_size, q_len, k_len, q_regions, k_regions)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device; itself where it is there already."""
        if torch.empty(0, device=device).device == self.device:
            return self
        moved = {
            name: getattr(self, name).to(device) for name in ("count", "index", "tile", "pool")
        }
        return replace(self, **moved)

    # ---- how much is on

    def visited(self) -> Tensor:
        """int64 (batch, heads): query-key pairs in the blocks that are visited."""
        return self._weigh(visited=True)

    def elements(self) -> Tensor:
        """int64 (batch, heads): query-key pairs that are on."""
        return self._weigh(visited=False)

    def _weigh(self, visited: bool) -> Tensor:
        rows, columns = self.q_bounds.long().diff(), self.k_bounds.long().diff()
        pairs = rows[:, None] * columns[self.index.long()]
        if not visited and len(self.pool):
            inside = bits.popcount(self.pool)[self.tile.clamp(min=0).long()]
            pairs = torch.where(self.tile < 0, pairs, inside)
        return (pairs * self.listed).sum((-1, -2))

    def density(self) -> float:
        """Share of all query-key pairs that is on, over batch and heads."""
        return float(self.elements().double().mean()) / (self.q_len * self.k_len)

    def visited_density(self) -> float:
        """Share of all query-key pairs that lies in visited blocks: what a kernel computes."""
        return float(self.visited().double().mean()) / (self.q_len * self.k_len)

    def waste(self) -> float:
        """Pairs computed for each pair that is on: 1 where no block is visited in vain."""
        return self.visited_density() / (self.density() or float("nan"))

    def is_fully_block_sparse(self) -> bool:
        """Whether each visited block is on as a whole, so that no kernel has to mask inside one."""
        return bool(((self.tile < 0) | ~self.listed).all())

    # ---- each in a file of its own

    def validate(self, *, rows: bool = True, own: bool = True) -> BlockMask:
        """Look at what the lists hold; returns the mask itself. See `check.validate`."""
        check.validate(self, rows=rows, own=own)
        return self

    def to_dense(self, *, limit: int = 1 << 28) -> Tensor:
        """bool (batch, heads, q_len, k_len): for tests, refused above ``limit`` elements."""
        from attn_control.masks.dense import to_dense

        return to_dense(self, limit)

    def __or__(self, other: BlockMask) -> BlockMask:
        from attn_control.masks.combine import union

        return union(self, other) if isinstance(other, BlockMask) else NotImplemented

    def __and__(self, other: BlockMask) -> BlockMask:
        from attn_control.masks.combine import intersection

        return intersection(self, other) if isinstance(other, BlockMask) else NotImplemented

    def transpose(self) -> BlockMask:
        """Keys become queries: what the gradients of keys and values are computed by."""
        from attn_control.masks.combine import transpose

        return transpose(self)

    def coarsen(self, q: int = 2, k: int | None = None) -> BlockMask:
        """Whole blocks q x k times as large, on where any block within was: a superset."""
        from attn_control.masks.combine import coarsen

        return coarsen(self, q, q if k is None else k)

    def regrid(
        self,
        *,
        q_block: int | None = None,
        k_block: int | None = None,
        q_regions: Sequence[int] | None = None,
        k_regions: Sequence[int] | None = None,
    ) -> BlockMask:
        """The very same pairs on another grid of blocks, through bit tiles."""
        from attn_control.masks.regrid import regrid

        return regrid(
            self,
            q_block or self.q_block,
            k_block or self.k_block,
            q_regions or self.q_regions,
            k_regions or self.k_regions,
        )

    @classmethod
    def from_flex(cls, mask: Any) -> BlockMask:
        """From torch's own BlockMask, its ``mask_mod`` read out block by block."""
        from attn_control.masks.flex import from_flex

        return from_flex(mask)

    def to_flex(self) -> Any:
        """As torch's own BlockMask, always with a ``mask_mod``. See `flex.to_flex`."""
        from attn_control.masks.flex import to_flex

        return to_flex(self)
