"""What attend is held to: a float64 softmax over a dense mask, and block masks made from one.

The dense mask comes first, and the blocks, bits and lists are made of it here, so that neither the
oracle nor the masks share code with the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attn_control.masks.block import BlockMask

NONE = float("-inf")


def softmax(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and lse in float64; ``allowed`` bool, ``added`` additive, both broadcastable."""
    group = q.shape[1] // k.shape[1]
    k = torch.stack([k[:, head // group] for head in range(q.shape[1])], dim=1).double()
    v = torch.stack([v[:, head // group] for head in range(q.shape[1])], dim=1).double()
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), k) * scale
    if added is not None:
        scores = scores + added.double()
    allowed = allowed.expand(scores.shape)
    top = scores.detach().masked_fill(~allowed, NONE).amax(-1, keepdim=True)
    weights = (scores - torch.where(top == NONE, 0.0, top)).exp() * allowed
    total = weights.sum(-1, keepdim=True)
    there = total > 0
    out = torch.where(there, weights / torch.where(there, total, 1.0), 0.0) @ v
    lse = torch.where(there, torch.where(there, total, 1.0).log() + top, NONE)
    return out, lse[..., 0]


def edges(regions: tuple[int, ...], block: int) -> list[int]:
    """Where blocks begin and end, with a new grid in each region."""
    found, start = [0], 0
    for length in regions:
        found += [start + min(done + block, length) for done in range(0, length, block)]
        start += length
    return found


def blocks_of(
    dense: Tensor,
    q_block: int,
    k_block: int,
    q_regions: tuple[int, ...] | None = None,
    k_regions: tuple[int, ...] | None = None,
) -> BlockMask:
    """The BlockMask of bool (batch, heads, queries, keys)."""
    q_regions, k_regions = q_regions or (dense.shape[2],), k_regions or (dense.shape[3],)
    rows, columns = edges(q_regions, q_block), edges(k_regions, k_block)
    shape = (*dense.shape[:2], len(rows) - 1, len(columns) - 1)
    count = np.zeros(shape[:3], np.int32)
    index, tile = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    pool: dict[bytes, int] = {}
    truth = dense.numpy()
    for b, h, i in np.ndindex(*shape[:3]):
        for j in range(shape[3]):
            piece = truth[b, h, rows[i] : rows[i + 1], columns[j] : columns[j + 1]]
            if not piece.any():
                continue
            at = count[b, h, i]
            index[b, h, i, at], tile[b, h, i, at] = j, -1
            if not piece.all():
                bits = np.zeros((q_block, k_block), bool)
                bits[: piece.shape[0], : piece.shape[1]] = piece
                packed = np.packbits(bits, axis=1, bitorder="little").tobytes()
                tile[b, h, i, at] = pool.setdefault(packed, len(pool))
            count[b, h, i] += 1
    words = np.frombuffer(b"".join(pool), np.int32).reshape(len(pool), q_block, -(-k_block // 32))
    lists = (torch.from_numpy(x.copy()) for x in (count, index, tile, words))
    return BlockMask(q_block, k_block, q_regions, k_regions, *lists)


@dataclass
class Case:
    """Inputs of one call, with the truth as a dense mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    dense: Tensor
    plan: BlockMask


def case(
    seed: int,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 2,
    dim: int = 16,
    q_regions: tuple[int, ...] = (150,),
    k_regions: tuple[int, ...] = (210,),
    block: tuple[int, int] = (32, 32),
    shared: tuple[bool, bool] = (True, False),
    density: float = 0.4,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Random blocks, a part of them partly on, and some queries without a key.

    shared: whether all batch rows, and all heads, have one mask.
    """
    g = torch.Generator().manual_seed(seed)
    queries, keys = sum(q_regions), sum(k_regions)
    lists = (1 if shared[0] else batch, 1 if shared[1] else heads)
    rows, columns = edges(q_regions, block[0]), edges(k_regions, block[1])
    dense = torch.zeros(*lists, queries, keys, dtype=torch.bool)
    for b, h in np.ndindex(*lists):
        for i in range(len(rows) - 1):
            for j in range(len(columns) - 1):
                kind = torch.rand((), generator=g).item()
                piece = dense[b, h, rows[i] : rows[i + 1], columns[j] : columns[j + 1]]
                if kind < density * 0.6:
                    piece[:] = True
                elif kind < density:
                    piece[:] = torch.rand(piece.shape, generator=g) < 0.4
    dense[..., 3, :] = False  # one query of a block that has keys
    dense[..., rows[1] : rows[2], :] = False  # and a block of them
    q = torch.randn(batch, heads, queries, dim, generator=g).to(dtype)
    k, v = (torch.randn(batch, kv_heads, keys, dim, generator=g).to(dtype) for _ in range(2))
    return Case(q, k, v, dense, blocks_of(dense, *block, q_regions, k_regions))


def worst(a: Tensor, b: Tensor) -> float:
    """The largest difference; equal infinities differ by nothing."""
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape
    return float(torch.where(a == b, 0.0, (a - b).abs()).max())
