"""Masks written out token by token, in plain loops: what `attn_control.masks` is held against."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from attn_control.masks import BlockMask


def edges(regions, block) -> list[int]:
    """Where blocks begin and end."""
    found, start = [0], 0
    for length in regions:
        stop = start + length
        while start < stop:
            start = min(start + block, stop)
            found.append(start)
    return found


def word(bits) -> int:
    """32 booleans as a signed 32-bit int, the first the least."""
    value = sum(1 << place for place, bit in enumerate(bits) if bit)
    return value - (1 << 32) if value >= 1 << 31 else value


def listed(dense: Tensor, q_block, k_block, q_regions, k_regions) -> BlockMask:
    """The lists and tiles of a bool (batch, heads, q_len, k_len), one block after another."""
    q_edges, k_edges = edges(q_regions, q_block), edges(k_regions, k_block)
    pool: dict[tuple, int] = {}
    lists = {}
    batch, heads = dense.shape[:2]
    for b, h, row in itertools.product(range(batch), range(heads), range(len(q_edges) - 1)):
        kept = lists[b, h, row] = []
        for column in range(len(k_edges) - 1):
            part = dense[
                b, h, q_edges[row] : q_edges[row + 1], k_edges[column] : k_edges[column + 1]
            ]
            if part.all():
                kept.append((column, -1))
            elif part.any():
                whole = torch.zeros(q_block, -(-k_block // 32) * 32, dtype=torch.bool)
                whole[: part.shape[0], : part.shape[1]] = part
                tile = tuple(
                    tuple(word(line[at : at + 32]) for at in range(0, len(line), 32))
                    for line in whole.tolist()
                )
                kept.append((column, pool.setdefault(tile, len(pool))))
    most = max(1, *(len(kept) for kept in lists.values()))
    shape = batch, heads, len(q_edges) - 1
    index = torch.zeros(*shape, most, dtype=torch.int32)
    tile = torch.full_like(index, -1)
    count = torch.zeros(shape, dtype=torch.int32)
    for place, kept in lists.items():
        count[place] = len(kept)
        for slot, (column, number) in enumerate(kept):
            index[place][slot], tile[place][slot] = column, number
    words = -(-k_block // 32)
    tiles = torch.tensor(list(pool), dtype=torch.int32).view(len(pool), q_block, words)
    return BlockMask(q_block, k_block, q_regions, k_regions, count, index, tile, tiles)


def random_dense(seed, q_block, k_block, q_regions, k_regions, batch=1, heads=2) -> Tensor:
    """bool (batch, heads, q_len, k_len): a third of the blocks off, a third whole, the rest random
    pairs. Some blocks repeat others, so that tiles are shared.
    """
    random = np.random.default_rng(seed)
    q_edges, k_edges = edges(q_regions, q_block), edges(k_regions, k_block)
    dense = np.zeros((batch, heads, q_edges[-1], k_edges[-1]), bool)
    kinds = [random.random((q_block, k_block)) < share for share in (0.5, 0.02)]
    kinds += [np.zeros((q_block, k_block), bool), np.ones((q_block, k_block), bool)] * 2
    for b, h in itertools.product(range(batch), range(heads)):
        for row, column in itertools.product(range(len(q_edges) - 1), range(len(k_edges) - 1)):
            rows = slice(q_edges[row], q_edges[row + 1])
            columns = slice(k_edges[column], k_edges[column + 1])
            part = kinds[random.integers(len(kinds))]
            dense[b, h, rows, columns] = part[
                : rows.stop - rows.start, : columns.stop - columns.start
            ]
    return torch.from_numpy(dense)


def places(shape, tile=None) -> np.ndarray:
    """int (tokens, axes): where each token lies, in raster order, or tile by tile."""
    found = list(itertools.product(*map(range, shape)))
    if tile is not None:
        found.sort(key=lambda at: ([a // t for a, t in zip(at, tile, strict=True)], at))
    return np.array(found)


def with_text(dense: np.ndarray, before: int, after: int) -> np.ndarray:
    """Text reads and is read by all."""
    out = np.ones([n + before + after for n in dense.shape], bool)
    out[before : before + dense.shape[0], before : before + dense.shape[1]] = dense
    return out


def natten_reads(x: int, length: int, kernel: int, stride: int, dilation: int, causal: bool) -> set:
    """The keys that NATTEN lets query x of one axis read, by walking through its group."""
    group = [y for y in range(length) if (y - x) % dilation == 0]
    me = group.index(x)
    sharing = group[me - me % stride :][:stride]  # the queries that share a window
    if causal:
        end = group.index(sharing[-1])
        return {y for at, y in enumerate(group) if end - kernel < at <= me}
    leader = sharing[min(stride // 2, len(sharing) - 1)]
    window = [group.index(leader)]
    while len(window) < kernel:  # first to the left, then to the right, as far as there are keys
        left, right = window[0] - 1, window[-1] + 1
        leans_left = len(window) % 2 == 1
        if left >= 0 and (leans_left or right >= len(group)):
            window.insert(0, left)
        elif right < len(group):
            window.append(right)
        else:
            window.insert(0, left)
    return {group[at] for at in window}
