"""Memory: what controls keep from one denoiser call to the next, and when it is forgotten."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MOST = 16
"""Shared things at once: one a control and geometry."""


@dataclass
class Kept:
    """What one refresh left behind, of one control at one softmax and branch.

    level: of the sampler, None where it is not known. tensors: by name. extra: anything else,
    such as the masks that were chosen. like: shapes, dtype and device it is good for.
    """

    level: int | None
    like: Hashable
    tensors: dict[str, Tensor] = field(default_factory=dict)
    extra: Any = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Memory:
    """Of one denoiser. Forgotten are: an entry whose shapes, dtype or device no longer fit, when it
    is asked for; a thread's last run, when it begins another; everything, by `clear`.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, Hashable], Kept] = {}
        self._runs: dict[int, int] = {}  # by thread: each may be in a run of its own
        self._shared: dict[Hashable, Any] = {}
        self.peak = 0

    def begin(self, run: int) -> None:
        """A call of this run is about to happen in this thread."""
        before = self._runs.get(threading.get_ident())
        if before == run:
            return
        self._runs[threading.get_ident()] = run
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] != before}

    def get(self, run: int, key: Hashable, like: Hashable) -> Kept | None:
        """What was kept under the key in this run, if it still fits."""
        found = self._kept.get((run, key))
        if found is not None and found.like != like:
            del self._kept[run, key]
            return None
        return found

    def keep(self, run: int, key: Hashable, kept: Kept) -> None:
        kept.tensors = {name: tensor.detach() for name, tensor in kept.tensors.items()}
        self._kept[run, key] = kept
        self.peak = max(self.peak, self.nbytes)

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What all sites share, such as one mask for all layers; made once."""
        if key not in self._shared:
            if len(self._shared) == MOST:
                self._shared.pop(next(iter(self._shared)))
            with torch.inference_mode(False):
                self._shared[key] = make()
        return self._shared[key]

    def clear(self) -> None:
        self._kept.clear()
        self._runs.clear()
        self._shared.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are kept."""
        return sum(kept.nbytes for kept in self._kept.values())
