"""Memory that a worker uses again and again: fresh pages cost more than the copies into them."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

CPU = torch.device("cpu")


class Scratch:
    """Named buffers, each as large as the largest that was asked for."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._views: dict[tuple[object, ...], Tensor] = {}

    def get(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> Tensor:
        """A buffer of this shape; what it holds is left over from before."""
        found = self._views.get((name, shape, dtype, device))
        if found is not None:
            return found
        size = prod(shape)
        held = self._held.get((name, dtype, device))
        if held is None or len(held) < size:
            self._views.clear()  # views keep a buffer alive that nothing else needs
            held = torch.empty(size, dtype=dtype, device=device)
            self._held[name, dtype, device] = held
        found = self._views[name, shape, dtype, device] = held[:size].view(shape)
        return found
