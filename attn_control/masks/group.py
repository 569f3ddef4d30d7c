"""GroupMask: which groups of tokens may read which, as two vectors of numbers and some words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_control.errors import AttnControlError
from attn_control.masks import bits
from attn_control.masks.block import FIRST_TILE, OFF, WHOLE, BlockMask
from attn_control.masks.bounds import bounds_of
from attn_control.masks.settle import settle

MOST = 64
"""Atoms that keys may have: bits of a word."""
BLOCK = 128
"""Tokens a block, on both sides, where no blocks are given."""


@dataclass(frozen=True, eq=False, repr=False)
class GroupMask:
    """Query i may read key j if bit ``k_atom[j]`` of ``allow[q_atom[i]]`` is set.

    An *atom* is a set of tokens that every rule treats alike, so that regions, subjects and
    references, overlapping or not, come down to one small number a token (the pair table that
    LAMIC, arXiv 2508.00477, and IR-Diffusion, arXiv 2411.19261, write out token by token). Memory
    is in tokens; a query may be left without keys, and then has 0 as its output.

    Args:
        q_atom: int8 or int16 (q_len,), or (batch, q_len) where rows differ: places in ``allow``.
        k_atom: int8 or int16 (k_len,) or (batch, k_len): 0 to 63.
        allow: int64 or uint64 (atoms of queries,): the bits, each the number of an atom of keys.
        blocks: pairs need its leave too; ``block_mask & group_mask`` sets it.

    Raises:
        AttnControlError: shapes, dtypes, devices or numbers that do not fit.
    """

    q_atom: Tensor
    k_atom: Tensor
    allow: Tensor
    blocks: BlockMask | None = None

    def __post_init__(self) -> None:
        if self.allow.dtype == torch.uint64:
            object.__setattr__(self, "allow", self.allow.view(torch.int64))
        if self.allow.dtype != torch.int64 or self.allow.dim() != 1 or not len(self.allow):
            raise AttnControlError(
                "GroupMask: expected allow as int64 or uint64 words (atoms of queries,), got "
                f"{_name(self.allow)}"
            )
        for side, most, why in (
            ("q", len(self.allow), f"allow has {len(self.allow)} words"),
            ("k", MOST, f"a word has {MOST} bits; rules that treat tokens alike need fewer atoms"),
        ):
            atoms = getattr(self, f"{side}_atom")
            if atoms.dtype not in (torch.int8, torch.int16) or atoms.dim() not in (1, 2):
                raise AttnControlError(
                    f"GroupMask: expected {side}_atom as int8 or int16 (tokens,) or (batch,"
                    f" tokens), got {_name(atoms)}"
                )
            if atoms.device != self.allow.device:
                raise AttnControlError(
                    f"GroupMask: {side}_atom is on {atoms.device}, allow on {self.allow.device}"
                )
            object.__setattr__(self, f"{side}_atom", atoms.short().view(-1, atoms.shape[-1]))
            wrong = (atoms < 0) | (atoms >= most)
            if wrong.any():
                place = wrong.nonzero()[0].tolist()
                raise AttnControlError(
                    f"GroupMask: {side}_atom of token {place[-1]} is {int(atoms[tuple(place)])},"
                    f" not in 0..{most - 1}: {why}"
                )
        sizes = {"q_atom": len(self.q_atom), "k_atom": len(self.k_atom)}
        if self.blocks is not None:
            sizes["blocks"] = self.blocks.batch
            self._check(self.blocks)
        if len(set(sizes.values()) - {1}) > 1:
            raise AttnControlError(f"GroupMask: batches do not combine: {sizes}")

    def _check(self, blocks: BlockMask) -> None:
        if (blocks.q_len, blocks.k_len) != (self.q_len, self.k_len):
            raise AttnControlError(
                f"GroupMask: blocks are for {blocks.q_len} queries and {blocks.k_len} keys, atoms"
                f" for {self.q_len} and {self.k_len}"
            )
        if blocks.device != self.device:
            raise AttnControlError(f"GroupMask: blocks on {blocks.device}, atoms on {self.device}")

    def __repr__(self) -> str:
        within = "" if self.blocks is None else f" within {self.blocks}"
        return (
            f"GroupMask({self.batch} x {self.q_len} x {self.k_len} tokens, {len(self.allow)} words"
            f"{within}, {self.device})"
        )

    @classmethod
    def from_table(cls, table: Tensor, q_atom: Tensor, k_atom: Tensor) -> GroupMask:
        """From bool (atoms of queries, atoms of keys): who may read whom."""
        if table.dtype != torch.bool or table.dim() != 2 or table.shape[1] > MOST:
            raise AttnControlError(
                "GroupMask.from_table: expected a bool table (atoms of queries, at most "
                f"{MOST} atoms of keys), got {_name(table)}"
            )
        bit = torch.arange(table.shape[1], device=table.device)
        return cls(q_atom, k_atom, (table.long() << bit).sum(-1))

    # ---- what follows from the fields

    @property
    def q_len(self) -> int:
        return self.q_atom.shape[1]

    @property
    def k_len(self) -> int:
        return self.k_atom.shape[1]

    @property
    def batch(self) -> int:
        kept = 1 if self.blocks is None else self.blocks.batch
        return max(len(self.q_atom), len(self.k_atom), kept)

    @property
    def heads(self) -> int:
        return 1 if self.blocks is None else self.blocks.heads

    @property
    def device(self) -> torch.device:
        return self.allow.device

    @cached_property
    def table(self) -> Tensor:
        """bool (atoms of queries, 64): the bits of the words."""
        return (self.allow[:, None] >> torch.arange(MOST, device=self.device)) & 1 != 0

    def to(self, device: torch.device | str) -> GroupMask:
        """The same mask on another device; itself where it is there already."""
        if torch.empty(0, device=device).device == self.device:
            return self
        tensors = {n: getattr(self, n).to(device) for n in ("q_atom", "k_atom", "allow")}
        blocks = None if self.blocks is None else self.blocks.to(device)
        return replace(self, **tensors, blocks=blocks)

    def density(self) -> float:
        """Share of all query-key pairs that is on, over batch and heads."""
        if self.blocks is not None:
            return self.lowered.density()
        share = []
        for atoms, most in ((self.q_atom, len(self.allow)), (self.k_atom, MOST)):
            tokens = torch.zeros(len(atoms), most, dtype=torch.float64, device=self.device)
            tokens.scatter_add_(1, atoms.long(), torch.ones_like(atoms, dtype=torch.float64))
            share.append(tokens / atoms.shape[1])
        return float((share[0] @ self.table.double() * share[1]).sum(-1).mean())

    def to_dense(self, *, limit: int = 1 << 28) -> Tensor:
        """bool (batch, heads, q_len, k_len): for tests, refused above ``limit`` elements."""
        if self.batch * self.q_len * self.k_len > limit:
            raise AttnControlError(
                f"GroupMask.to_dense: {self.batch} x {self.q_len} x {self.k_len} elements, more"
                f" than limit={limit}; kernels read the words instead"
            )
        words = self.allow[self.q_atom.long()][:, None, :, None]
        found = (words >> self.k_atom.long()[:, None, None, :]) & 1 != 0
        return found if self.blocks is None else found & self.blocks.to_dense(limit=limit)

    def __and__(self, other: BlockMask) -> GroupMask:
        """Pairs that are on in both, exactly."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        return replace(self, blocks=other if self.blocks is None else self.blocks & other)

    __rand__ = __and__

    # ---- as blocks

    @cached_property
    def lowered(self) -> BlockMask:
        """The very same pairs as blocks and bit tiles: of `blocks`' grid, or of 128 tokens.

        Where atoms lie scattered nearly all blocks have tiles: see `sorted`.
        """
        grid: dict[str, Any] = dict(
            q_block=BLOCK, k_block=BLOCK, q_regions=(self.q_len,), k_regions=(self.k_len,)
        )
        if self.blocks is not None:
            block = -(-self.blocks.k_block // 32) * 32  # bits come in words
            if block != self.blocks.k_block:
                return replace(self, blocks=self.blocks.regrid(k_block=block)).lowered
            grid = self.blocks.grid
        sides = []
        for atoms, side in ((self.q_atom, "q"), (self.k_atom, "k")):
            block = grid[f"{side}_block"]
            bounds = torch.tensor(bounds_of(grid[f"{side}_regions"], block), device=self.device)
            pieces = tiled(atoms, bounds[:-1], bounds.diff(), block)
            # Blocks with the same atoms in the same places share their tiles.
            kinds, number = torch.unique(pieces.flatten(0, 1), dim=0, return_inverse=True)
            sides.append((kinds, number.view(pieces.shape[:2])))
        (queries, reader), (keys, read) = sides
        some, every = meet(self.table, present(queries, len(self.allow)), present(keys, MOST))
        place = (some & ~every).nonzero(as_tuple=True)
        code = torch.where(every, WHOLE, OFF).int()
        code[place] = torch.arange(len(place[0]), device=self.device).int() + FIRST_TILE
        tiles = [
            bits.pack(self._pairs(queries[rows], keys[columns]))
            for rows, columns in zip(*(x.split(bits.CHUNK) for x in place), strict=True)
        ]
        cells = code[reader[:, :, None], read[:, None, :]][:, None]
        mask = settle(cells, torch.cat(tiles), **grid)
        return mask if self.blocks is None else self.blocks & mask

    @cached_property
    def sorted(self) -> Sorted:
        """The same pairs with tokens next to their like, so that nearly all blocks are on or off as
        a whole; in the order that there is where `blocks` has a say, which depends on it.
        """
        if self.blocks is not None:
            return Sorted(self.lowered, None, None)
        (q_atom, q_order), (k_atom, k_order) = map(by_atom, (self.q_atom, self.k_atom))
        if q_order is None and k_order is None:
            return Sorted(self.lowered, None, None)
        return Sorted(replace(self, q_atom=q_atom, k_atom=k_atom).lowered, q_order, k_order)

    def _pairs(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool (blocks, q_block, k_block) of atoms, -1 past the end of a short block."""
        words = torch.where(queries < 0, 0, self.allow[queries.clamp(min=0).long()])
        on = (words[:, :, None] >> keys.clamp(min=0).long()[:, None, :]) & 1 != 0
        return on & (keys >= 0)[:, None, :]


class Sorted(NamedTuple):
    """mask: of places; q_order, k_order: int64 (batch | 1, tokens), which token stands at each
    place, None for each its own.
    """

    mask: BlockMask
    q_order: Tensor | None
    k_order: Tensor | None


def by_atom(atoms: Tensor) -> tuple[Tensor, Tensor | None]:
    """Atoms (batch, tokens) in order, and int64 (batch, tokens), the order: None if they were."""
    if not (atoms.diff(dim=-1) < 0).any():
        return atoms, None
    found, order = atoms.sort(dim=-1, stable=True)
    return found, order


def tiled(atoms: Tensor, start: Tensor, length: Tensor, width: int) -> Tensor:
    """int16 (batch, tiles, width): atoms (batch, tokens) of tiles that begin at ``start`` (tiles,)
    and are ``length`` long; -1 past that.
    """
    place = torch.arange(width, device=atoms.device)
    at = (start[:, None] + place).clamp(max=atoms.shape[1] - 1)
    return torch.where(place < length[:, None], atoms[:, at.long()], -1)


def present(tiles: Tensor, count: int) -> Tensor:
    """float32 (..., count): which of so many atoms are in each tile (..., width) of `tiled`."""
    found = torch.zeros(*tiles.shape[:-1], count + 1, device=tiles.device)
    return found.scatter_(-1, tiles.long() + 1, 1.0)[..., 1:]


def meet(table: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """bool (..., rows, columns): whether some pair of a tile of rows and one of columns is on, and
    whether all are; of what `present` found. table: bool (atoms of rows, atoms of columns).
    """
    found = [rows @ part.float() @ columns.mT for part in (table, ~table)]
    return found[0] > 0, found[1] == 0


def _name(given: Tensor) -> str:
    return f"{str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}"
