"""Bit tiles: which query of a block may read which key of a block, 32 keys a word.

A tile is int32 (q_block, words): bit ``j % 32`` of word ``j // 32`` of row i is the pair (i, j).
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 512
"""Tiles unpacked at once: a tile of 128 x 128 is 2 KiB packed and 16 KiB as booleans."""


def words(k_block: int) -> int:
    """Words a row: bits past ``k_block`` are padding, and 0."""
    return -(-k_block // 32)


def _octets(tiles: Tensor) -> Tensor:
    """uint8, four a word. The copy has regular strides, which a view of another width needs and
    ``contiguous()`` does not give to axes of length 0 or 1.
    """
    return tiles.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def pack(pairs: Tensor) -> Tensor:
    """Bool (..., keys) to int32 (..., words(keys)); keys that fill no word are followed by 0."""
    short = -pairs.shape[-1] % 32
    if short:
        pairs = torch.cat([pairs, pairs.new_zeros(*pairs.shape[:-1], short)], -1)
    place = torch.arange(8, dtype=torch.uint8, device=pairs.device)
    octets = pairs.unflatten(-1, (-1, 8)).to(torch.uint8) << place
    packed = octets.sum(-1, dtype=torch.uint8)
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int32)


def unpack(tiles: Tensor, keys: int) -> Tensor:
    """The inverse of `pack`: int32 (..., words) to bool (..., keys)."""
    place = torch.arange(8, dtype=torch.uint8, device=tiles.device)
    octets = _octets(tiles).unsqueeze(-1) >> place
    return (octets & 1).bool().flatten(-2)[..., :keys]


def popcount(tiles: Tensor) -> Tensor:
    """Pairs that are on, int64 (tiles,)."""
    place = torch.arange(8, device=tiles.device)
    ones = ((torch.arange(256, device=tiles.device)[:, None] >> place) & 1).sum(-1)
    counted = [ones[_octets(chunk).flatten(1).long()].sum(-1) for chunk in tiles.split(CHUNK)]
    return torch.cat(counted) if counted else tiles.new_zeros(0, dtype=torch.int64)


def transposed(tiles: Tensor, k_block: int) -> Tensor:
    """Keys become queries: int32 (tiles, q_block, .) to (tiles, k_block, words(q_block))."""
    if not len(tiles):
        return tiles.new_zeros(0, k_block, words(tiles.shape[1]))
    return torch.cat([pack(unpack(chunk, k_block).mT) for chunk in tiles.split(CHUNK)])


def deduplicate(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Each tile once, in order of first appearance: (distinct tiles, int64 number of each)."""
    seen: dict[bytes, int] = {}
    number, first = [], []
    for position, tile in enumerate(tiles.cpu().numpy()):
        key = tile.tobytes()
        if key not in seen:
            seen[key] = len(seen)
            first.append(position)
        number.append(seen[key])
    kept = torch.tensor(first, dtype=torch.int64, device=tiles.device)
    return tiles[kept], torch.tensor(number, dtype=torch.int64, device=tiles.device)
