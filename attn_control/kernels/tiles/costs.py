"""What attention over a tile costs on a CPU, so that tiles can be chosen before anything runs.

The unit is one query-key pair inside a long dense softmax of the same precision. The numbers are
tables, not measured at run time: decisions, and with them the bits of a result, must not depend on
how busy the machine is. They come from torch's CPU flash kernel, single-threaded, on a Zen 5
(AVX-512) and, for "amx", on a Xeon with AMX tiles; `benchmarks/sparse_cpu.py` shows what they are
worth on the machine at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
PIECE = 1 << 22
"""Pairs of a bias that is made at once: a wider one is made, and its keys read, piece by piece, so
that it need not go through memory.
"""


@dataclass(frozen=True)
class Costs:
    """All in pairs.

    rows: (height of a tile, cost of one of its pairs), ascending; the kernel cuts queries into 32,
        from 192 rows on into 64, from 768 on into 256, and a longer cut is a better product.
    chunk: of each 512 tokens, or part of them, that a row reads: what a round of the kernel takes
        beside its products.
    few: what a pair costs more where the tile's other side has fewer than 768 tokens (backward).
    bias: of a pair that has an additive bias, more: it is made, and read once.
    call: of starting a kernel; gather: of starting a gather; token: of gathering one token.
    fold: of adding a tile's result to another's; row: of a row of it.
    """

    rows: tuple[tuple[int, float], ...]
    chunk: float = 25.0
    few: float = 1.0
    bias: float = 0.12
    call: float = 7e3
    gather: float = 4e3
    token: float = 11.0
    fold: float = 5e3
    row: float = 10.0

    def of(self, height: Array, width: Array, partial: Any, runs: Any) -> Array:
        """Cost of tiles ``height`` x ``width`` tokens, whose keys lie in ``runs`` runs; where
        ``partial``, some pairs are masked.
        """
        at, rate = zip(*self.rows, strict=True)
        pair = np.interp(height, at, rate) + self.bias * partial
        pair = pair * np.where(width < 768, self.few, 1.0)
        gather = np.where(runs > 1, self.gather + self.token * width, 0.0)
        row = width * pair + np.ceil(width / 512) * self.chunk
        more = partial * (np.ceil(height * width / PIECE) - 1).clip(0)  # pieces
        whole = height * row + self.call + gather
        whole += more * (self.call + self.fold + self.row * height)
        return np.where((height > 0) & (width > 0), whole, 0.0)


FORWARD = {
    "plain": Costs(
        ((16, 1.2), (32, 1.1), (64, 1.07), (128, 1.045), (192, 1.02), (767, 1.02), (768, 0.96))
    ),
    # A pair takes a quarter of the time, so that everything around it weighs four times as much.
    "amx": Costs(
        ((32, 1.81), (64, 1.37), (128, 1.2), (256, 1.06), (512, 0.98)),
        chunk=0.0,
        bias=0.15,
        call=2.5e4,
        gather=1.5e4,
        token=30.0,
        fold=6e4,
        row=40.0,
    ),
}
# Backward runs by tiles of keys (see backward.py); ``few`` then speaks of queries.
BACKWARD = {
    "plain": Costs(
        ((32, 1.12), (64, 1.055), (128, 1.01), (256, 1.0)),
        chunk=0.0,
        few=1.03,
        bias=0.1,
        token=16.0,
        fold=4e3,
        row=2.0,
    ),
    "half": Costs(
        ((32, 1.95), (64, 1.76), (128, 1.33), (256, 1.16), (512, 1.04), (1024, 1.0)),
        chunk=0.0,
        few=1.3,
        bias=0.1,
        token=16.0,
        fold=4e3,
        row=2.0,
    ),
}


def costs(dtype: torch.dtype, backward: bool) -> Costs:
    """The table for this precision on this machine."""
    half = dtype in (torch.bfloat16, torch.float16)
    if backward:
        return BACKWARD["half" if half else "plain"]
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return FORWARD["amx" if dtype == torch.bfloat16 and amx() else "plain"]
