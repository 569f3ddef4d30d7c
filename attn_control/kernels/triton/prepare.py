"""What the kernels walk for a plan: made once for a device, a head dim and a precision."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attn_control.kernels.triton.lists import Met, lower, met, turned
from attn_control.kernels.triton.tune import Tiles, side, tiles
from attn_control.masks.block import BlockMask
from attn_control.masks.columns import entries
from attn_control.masks.group import GroupMask, by_atom

BLOCK = 128
"""Of the mask that stands for none."""


class Prepared(NamedTuple):
    """lists, numbers: as `op` takes them; q_order, k_order, words, q_atom, k_atom: as
    `launch.Extras` has them.
    """

    lists: list[Tensor]
    numbers: list[int]
    q_order: Tensor | None = None
    k_order: Tensor | None = None
    words: Tensor | None = None
    q_atom: Tensor | None = None
    k_atom: Tensor | None = None


@lru_cache(maxsize=64)
def everything(queries: int, keys: int) -> BlockMask:
    """The mask that stands for none."""
    blocks = -(-queries // BLOCK), -(-keys // BLOCK)
    table = torch.ones(1, *blocks, dtype=torch.bool)
    return BlockMask.from_table(table, block_size=BLOCK, q_len=queries, k_len=keys)


def prepared(
    plan: BlockMask | GroupMask,
    q: Tensor,
    group: int,
    needs_grad: bool,
    *,
    ordered: bool = False,
    biased: bool = False,
) -> Prepared:
    """Of a plan, for all kernels or for forward alone.

    group: query heads that share a key head; ordered: whether rows lie in orders of the caller's;
    biased: whether there is a mask of the model's own.
    """
    kept = plan.__dict__.setdefault("_triton", {})
    half = q.dtype != torch.float32
    key = (q.device, q.shape[3], half, group, needs_grad, ordered, biased)
    if key not in kept:
        kept[key] = _prepare(plan, *key)
    found: Prepared = kept[key]
    return found


@torch.compiler.disable
def _prepare(
    plan: BlockMask | GroupMask,
    device: torch.device,
    dim: int,
    half: bool,
    group: int,
    needs_grad: bool,
    ordered: bool,
    biased: bool,
) -> Prepared:
    plan = plan.to(device)
    sizes = tiles(dim, half, _target(device), biased)
    if isinstance(plan, BlockMask):
        return Prepared(*_lists(plan, None, True, sizes, group, needs_grad))
    places: tuple[Tensor, ...] = plan.q_atom, plan.k_atom
    blocks, orders = plan.blocks, (None, None)
    if blocks is None:
        # Nothing else depends on where tokens stand: together with their like they fill tiles that
        # are on or off as a whole.
        blocks = everything(plan.q_len, plan.k_len).to(device)
        places, found = zip(*map(by_atom, places), strict=True)
        orders = tuple(x if x is None else x.int()[:, None].contiguous() for x in found)
    sides = *places, plan.table
    made = _lists(blocks, sides, not ordered, sizes, group, needs_grad)
    return Prepared(*made, *orders, *words_of(plan))


def words_of(plan: GroupMask) -> tuple[Tensor, Tensor, Tensor]:
    """words, q_atom and k_atom, as `launch.Extras` has them."""
    halves = plan.allow.view(torch.int32).view(-1, 2)
    bits = 1 if int(plan.k_atom.max()) < 32 else 2
    return halves[:, :bits].contiguous(), plan.q_atom.int(), plan.k_atom.int()


def chosen(
    plan: BlockMask | GroupMask, keys: Tensor, values: tuple[int, ...] | None
) -> list[Tensor | None]:
    """What a plan says of chosen keys, for `probe`: where its blocks of queries begin; entries,
    places and pool of blocks, words and atoms of groups, or None for each.

    values: of the keys; with them it is made once, and kept with the plan.
    """
    if values is None:
        return _chosen(plan, keys)
    kept = plan.__dict__.setdefault("_probed", {})
    key = keys.device, values
    if key not in kept:
        kept[key] = _chosen(plan, keys)
    found: list[Tensor | None] = kept[key]
    return found


@torch.compiler.disable
def _chosen(plan: BlockMask | GroupMask, keys: Tensor) -> list[Tensor | None]:
    plan = plan.to(keys.device)
    groups = plan if isinstance(plan, GroupMask) else None
    blocks = plan.blocks if isinstance(plan, GroupMask) else plan
    atoms = (None, None, None) if groups is None else words_of(groups)
    if blocks is None:
        whole = everything(plan.q_len, plan.k_len).to(keys.device)
        return [whole.q_bounds, None, None, None, *atoms]
    entry, place = entries(blocks, keys)
    pool = blocks.pool if len(blocks.pool) else blocks.pool.new_zeros(1, blocks.q_block, 1)
    return [blocks.q_bounds, entry.contiguous(), place.int(), pool.contiguous(), *atoms]


def _lists(
    mask: BlockMask,
    groups: tuple[Tensor, Tensor, Tensor] | None,
    sure: bool,
    sizes: Tiles,
    group: int,
    needs_grad: bool,
) -> tuple[list[Tensor], list[int]]:
    """groups: atoms by place of queries and of keys, and the table; sure: as in `met`."""
    from attn_control.kernels.triton.launch import Walk
    from attn_control.kernels.triton.op import flatten

    by_keys = turned(mask) if needs_grad else mask
    made, lowered = [], {}
    for name in ("forward", "of_queries", "of_keys")[: 3 if needs_grad else 1]:
        of = by_keys if name == "of_keys" else mask
        tile = getattr(sizes, name)
        tile = tile._replace(m=side(of.q_block, tile.m), n=side(of.k_block, tile.n))
        key = name == "of_keys", tile.n
        if key not in lowered:
            passed: Met | None = None
            if groups is not None:
                rows, columns, table = (
                    groups if of is mask else (groups[1], groups[0], groups[2].mT)
                )
                passed = met(of, tile.n, rows, columns, table, sure)
            batch = mask.batch if passed is None else max(mask.batch, passed.batch)
            lowered[key] = lower(of, tile.n, group if name == "of_keys" else 1, passed), batch
        lists, batch = lowered[key]
        made.append(Walk(lists, batch, mask.heads, tile))
    return flatten(made)


def _target(device: torch.device) -> str:
    """As `tune.tiles` takes it; the interpreter has no registers to run out of."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
