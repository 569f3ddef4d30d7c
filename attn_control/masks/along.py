"""One relation on blocks: which pairs of blocks it leaves off, fills, or fills in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from attn_control.masks.bits import words
from attn_control.masks.relations import Relation

SHORT = 1 << 21
"""Pairs of places of a relation up to which a table of them is cheaper than intervals."""
CHUNK = 256
"""Tiles made at once."""


Found = tuple[np.ndarray, np.ndarray, Callable[[np.ndarray, np.ndarray], np.ndarray]]
"""Of classes of queries and keys: which are visited, which filled, and the tiles of given pairs."""


class Along(NamedTuple):
    """Blocks with the same places are of one class; there are few.

    q, k: (blocks,) class of each block.
    codes: int32 (classes of queries, classes of keys): 0 off, 1 whole, 2 + n tile n.
    tiles: uint32 (tiles, q_block, words): short blocks are taken as if they repeated their last
        token.
    """

    q: np.ndarray
    k: np.ndarray
    codes: np.ndarray
    tiles: np.ndarray


def along(relation: Relation, q_places: np.ndarray, k_places: np.ndarray) -> Along:
    """Exact, from the places (blocks, tokens a block) of queries and keys."""
    q_first, q_class = _classes(q_places)
    k_first, k_class = (q_first, q_class) if k_places is q_places else _classes(k_places)
    x, y = q_places[q_first], k_places[k_first]
    if relation.queries * relation.keys <= SHORT:
        visits, fills, rows = _by_table(relation, x, y)
    else:
        visits, fills, rows = _by_intervals(relation, x, y)
    codes = fills.astype(np.int32)
    place = np.argwhere(visits & ~fills)
    seen: dict[bytes, int] = {}
    kept: list[np.ndarray] = []
    for start in range(0, len(place), CHUNK):
        a, b = place[start : start + CHUNK].T
        tiles = rows(a, b)
        for row, column, tile in zip(a, b, tiles, strict=True):
            key = tile.tobytes()
            if key not in seen:
                seen[key] = len(kept)
                kept.append(tile)
            codes[row, column] = 2 + seen[key]
    shape = 0, x.shape[1], words(y.shape[1])
    return Along(q_class, k_class, codes, np.stack(kept) if kept else np.zeros(shape, np.uint32))


def packed(pairs: np.ndarray) -> np.ndarray:
    """bool (..., keys) to uint32 (..., words)."""
    short = -pairs.shape[-1] % 32
    if short:
        pairs = np.concatenate([pairs, np.zeros((*pairs.shape[:-1], short), bool)], -1)
    octets = np.packbits(np.ascontiguousarray(pairs), axis=-1, bitorder="little")
    return octets.view(np.uint32)


def _classes(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(an example of each class, the class of each block)."""
    seen: dict[bytes, int] = {}
    number = [seen.setdefault(row.tobytes(), len(seen)) for row in places]
    first = np.unique(number, return_index=True)[1]
    return first, np.array(number)


def _by_table(relation: Relation, x: np.ndarray, y: np.ndarray) -> Found:
    """Rows of each class of keys for every place of a query, then gathered for those of a class."""
    table = relation.table()
    if (x == x[:, :1]).all() and (y == y[:, :1]).all():  # an axis on which no block extends
        fills = table[x[:, 0]][:, y[:, 0]]
        return fills, fills, lambda a, b: packed(fills[a, b])  # never asked: nothing is in part
    rows = np.stack([table[:, keys] for keys in y], 1)  # (queries, classes of keys, keys)
    some, each = rows.any(-1), rows.all(-1)
    bits = packed(rows)
    member = np.zeros((len(x), relation.queries), np.float32)
    member[np.arange(len(x))[:, None], x] = 1
    visits = member @ some.astype(np.float32) > 0
    fills = member @ (~each).astype(np.float32) == 0
    return visits, fills, lambda a, b: bits[x[a], b[:, None]]


def _by_intervals(relation: Relation, x: np.ndarray, y: np.ndarray) -> Found:
    """Where an interval may reach from the least start to the greatest stop of a class of queries,
    and surely reaches from the greatest start to the least stop.
    """
    low, high = y.min(1), y.max(1)
    visits = np.zeros((len(x), len(y)), bool)
    fills = np.zeros_like(visits)
    for start, stop in zip(relation.start[:, x], relation.stop[:, x], strict=True):
        visits |= (low < stop.max(1)[:, None]) & (high >= start.min(1)[:, None])
        if relation.phase is None:
            fills |= (low >= start.max(1)[:, None]) & (high < stop.min(1)[:, None])

    def rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return packed(relation.reads(x[a][:, :, None], y[b][:, None, :]))

    return visits, fills, rows
