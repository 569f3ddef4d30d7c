"""The model's own mask, cut to a tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_control.kernels.tiles.schedule import Task
from attn_control.kernels.tiles.scratch import Scratch
from attn_control.kernels.tiles.softmax import NONE, wide
from attn_control.kernels.tiles.tokens import Run, Tokens


@dataclass(frozen=True, eq=False)
class Given:
    """mask: bool (True: may attend) or additive, (batch or 1, heads or 1, queries or 1, keys or 1);
    turned: tasks are of keys over queries.
    """

    mask: Tensor | None
    dtype: torch.dtype
    device: torch.device
    turned: bool = False

    @property
    def by_head(self) -> bool:
        return self.mask is not None and self.mask.shape[1] != 1

    def bias(self, task: Task, batch: int, head: int, scratch: Scratch) -> Tensor | None:
        """Of a task: block mask and model's mask together, broadcastable to (queries, keys)."""
        listed = None if task.bias is None else task.bias.tensor(scratch).to(self.device)
        if self.turned and listed is not None:
            listed = listed.T.contiguous()  # the kernel reads rows of keys
        if self.mask is None:
            return listed
        both: tuple[Run | Tokens, Run | Tokens] = (task.rows, task.across)
        queries, keys = both[::-1] if self.turned else both
        piece = self.mask[batch if self.mask.shape[0] > 1 else 0, head if self.by_head else 0]
        piece = _pick(_pick(piece, 0, queries), 1, keys)
        if piece.dtype == torch.bool:
            piece = piece.new_zeros(piece.shape, dtype=self.dtype).masked_fill_(~piece, NONE)
        return piece.to(self.dtype) if listed is None else listed + piece


def _pick(mask: Tensor, dim: int, tokens: Run | Tokens) -> Tensor:
    """These tokens of a mask (queries or 1, keys or 1); a 1 goes on standing for all."""
    if mask.shape[dim] == 1:
        return mask
    if isinstance(tokens, Tokens):
        if tokens.run is None:
            return mask.index_select(dim, tokens.index.to(mask.device))
        tokens = tokens.run
    return mask.narrow(dim, tokens.start, len(tokens))


def given(mask: Tensor | None, q: Tensor, turned: bool = False) -> Given:
    """Of any mask that is broadcastable to four dimensions; one that is True throughout is none."""
    if mask is not None and mask.dtype == torch.bool and bool(mask.all()):
        mask = None
    if mask is not None:
        mask = mask.detach()[(None,) * (4 - mask.dim())]
    return Given(mask, wide(q.dtype), q.device, turned)
