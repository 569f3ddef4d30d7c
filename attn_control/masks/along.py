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


OfPairs = Callable[[np.ndarray, np.ndarray], np.ndarray]
Found = tuple[np.ndarray, np.ndarray, OfPairs, OfPairs]
"""Of classes of queries and keys: which are visited, which are filled. Of given pairs of classes:
what is equal only if their tiles are, and the tiles.
"""


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
    q_first, q_class = _distinct(q_places)
    k_first, k_class = (q_first, q_class) if k_places is q_places else _distinct(k_places)
    x, y = q_places[q_first], k_places[k_first]
    short = relation.queries * relation.keys <= SHORT
    visits, fills, alike, rows = (_by_table if short else _by_intervals)(relation, x, y)
    codes = fills.astype(np.int32)
    a, b = (visits & ~fills).nonzero()
    example, same = _distinct(alike(a, b))
    kept: dict[bytes, int] = {}
    tiles, code = [], np.zeros(len(example), np.int32)
    for start in range(0, len(example), CHUNK):
        some = example[start : start + CHUNK]
        for at, tile in enumerate(rows(a[some], b[some]), start):
            key = tile.tobytes()
            if key not in kept:
                kept[key] = len(kept)
                tiles.append(tile)
            code[at] = 2 + kept[key]
    codes[a, b] = code[same]
    shape = 0, x.shape[1], words(y.shape[1])
    return Along(q_class, k_class, codes, np.stack(tiles) if tiles else np.zeros(shape, np.uint32))


def packed(pairs: np.ndarray) -> np.ndarray:
    """bool (..., keys) to uint32 (..., words)."""
    short = -pairs.shape[-1] % 32
    if short:
        pairs = np.concatenate([pairs, np.zeros((*pairs.shape[:-1], short), bool)], -1)
    octets = np.packbits(np.ascontiguousarray(pairs), axis=-1, bitorder="little")
    return octets.view(np.uint32)


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(an example of each distinct row, the number of each row's)."""
    seen: dict[bytes, int] = {}
    number = np.array([seen.setdefault(row.tobytes(), len(seen)) for row in keys], np.int64)
    return np.unique(number, return_index=True)[1], number


def _by_table(relation: Relation, x: np.ndarray, y: np.ndarray) -> Found:
    """Rows of each class of keys for every place of a query, then gathered for those of a class."""
    table = relation.table()
    if (x == x[:, :1]).all() and (y == y[:, :1]).all():  # an axis on which no block extends
        fills = table[x[:, 0]][:, y[:, 0]]
        return fills, fills, _each_its_own, lambda a, b: packed(fills[a, b])  # asked for nothing
    rows = np.stack([table[:, keys] for keys in y], 1)  # (queries, classes of keys, keys)
    some, each = rows.any(-1), rows.all(-1)
    bits = packed(rows)
    member = np.zeros((len(x), relation.queries), np.float32)
    member[np.arange(len(x))[:, None], x] = 1
    visits = member @ some.astype(np.float32) > 0
    fills = member @ (~each).astype(np.float32) == 0
    return visits, fills, _each_its_own, lambda a, b: bits[x[a], b[:, None]]


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
    x_form, y_form = (_distinct(places - places[:, :1])[1] for places in (x, y))

    def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Classes of one form, equally far apart; else, where the intervals lie to the keys."""
        if relation.moves:
            return np.stack([x_form[a], y_form[b], y[b, 0] - x[a, 0]], 1)
        base = low[b, None]
        keys = [y_form[b, None]]
        for start, stop in zip(relation.start, relation.stop, strict=True):
            keys += [np.clip(e[x[a]] - base, 0, high[b, None] - base + 1) for e in (start, stop)]
        if relation.phase is not None:
            keys.append((relation.phase[x[a]] - base) % relation.step)
        return np.concatenate(keys, 1)

    def rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return packed(relation.reads(x[a][:, :, None], y[b][:, None, :]))

    return visits, fills, alike, rows


def _each_its_own(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.arange(len(a))
