"""Processors as users write them: some can be watched, some cannot. A module of their own, because
the package looks at the module that a processor's class comes from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _project(attn: Any, hidden: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    context = hidden if context is None else context
    parts = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
    q, k, v = (p.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in parts)
    return q, k, v


class Plain:
    """Calls ``F.scaled_dot_product_attention``: seen."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any
    ) -> Tensor:
        out = self.attend(*_project(attn, hidden_states, encoder_hidden_states))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class Matmul(Plain):
    """Writes the softmax out: unseen."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


class FullName(Plain):
    """Reaches the function through ``torch``: unseen."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


class Slotted:
    """Cannot take another class."""

    __slots__ = ("secret",)

    def __call__(self, attn: nn.Module, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


class Parametrised(nn.Module):
    """A processor that is a module with weights, as adapters are."""

    def __init__(self, gain: float = 1.5) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any
    ) -> Tensor:
        q, k, v = _project(attn, hidden_states, encoder_hidden_states)
        out = F.scaled_dot_product_attention(q, k, v * self.gain)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))
