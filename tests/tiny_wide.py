"""What the proofs of a layout need to know of a tiny model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from tiny import _spread

TEXT = 5


@dataclass(frozen=True)
class Tiny:
    """A tiny real model, one call of it, and how its inputs stand.

    Attributes:
        make, call: the model; keyword arguments for a batch of 2.
        sites: sites to perturb: label and module name.
        patch: (frames, height, width) of a patch; (1, 1, 1) for packed tokens.
        dims: dimensions of (frames, height, width) in the sample; empty for packed tokens.
        grid: (frames, height, width) in tokens.
        before: frames of a reference that stand before the video.
        texts: argument and where its tokens begin within the text, in the layout's order.
        quiet: pattern of refiners, whose attention is silenced to see tokens one by one.
        mixes: text is mixed before the first block in a way that cannot be silenced.
        first: labels of the blocks at which layouts are proved.
    """

    make: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    sites: tuple[tuple[str, str], ...]
    patch: tuple[int, int, int] = (1, 2, 2)
    dims: tuple[int, ...] = (2, 3)
    grid: tuple[int, int, int] = (1, 4, 4)
    before: int = 0
    texts: tuple[tuple[str, int], ...] = (("encoder_hidden_states", 0),)
    quiet: str = ""
    mixes: bool = False
    first: tuple[int, ...] = (0,)

    def make_quiet(self) -> Any:
        """The model without what mixes tokens before its first block."""
        model = self.make()
        for name, module in model.named_modules():
            if self.quiet and re.match(self.quiet, name) and hasattr(module, "processor"):
                for parameter in module.to_out.parameters():
                    torch.nn.init.zeros_(parameter)
        return model

    def poked(self, call: dict[str, Any], token: int) -> dict[str, Any]:
        """The call with one token of the picture or video changed."""
        x = call["hidden_states"].clone()
        frames, height, width = self.grid
        place = (self.before + token // (height * width), token // width % height, token % width)
        if not self.dims:
            x[:, token] += 1.0
            return call | {"hidden_states": x}
        index: list[Any] = [slice(None)] * x.ndim
        sizes = (place, self.patch) if len(self.dims) == 3 else (place[1:], self.patch[1:])
        for dim, at, size in zip(self.dims, *sizes, strict=True):
            index[dim] = at * size
        x[tuple(index)] += 1.0
        return call | {"hidden_states": x}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(cls: str, **config: Any) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(0)
        return _spread(getattr(diffusers, cls)(**config))

    return build


def ids(height: int, width: int, columns: int = 3) -> torch.Tensor:
    found = torch.zeros(height, width, columns)
    found[..., 1] += torch.arange(height)[:, None]
    found[..., 2] += torch.arange(width)[None]
    return found.reshape(height * width, columns)


def time(value: float = 500.0) -> torch.Tensor:
    return torch.full((2,), value)
