"""Changes of an attention output that need no attention map: O(tokens x head_dim) each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_control.call import Call

Slices = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Region:
    """Which elements of (batch, heads, tokens, head_dim) an epilogue may change; all others keep
    their bits.

    rows: half-open batch range, or None for every row; heads: sorted head numbers; spans: half-open
        token
    ranges, with None for the end.
    """

    rows: tuple[int, int] | None
    heads: tuple[int, ...]
    spans: tuple[tuple[int, int | None], ...]

    def runs(self) -> list[tuple[int, int]]:
        """Heads as half-open runs: slices cost far less than a gather and a scatter."""
        runs: list[tuple[int, int]] = []
        for head in self.heads:
            if runs and runs[-1][1] == head:
                runs[-1] = (runs[-1][0], head + 1)
            else:
                runs.append((head, head + 1))
        return runs

    def slices(self) -> Iterator[tuple[Slices, slice]]:
        """Index of each block of the region, and which of the region's heads it holds."""
        rows = slice(*self.rows) if self.rows else slice(None)
        done = 0
        for first, last in self.runs():
            for start, stop in self.spans:
                yield (
                    (rows, slice(first, last), slice(start, stop)),
                    slice(done, done + last - first),
                )
            done += last - first


def _apply(
    out: Tensor, region: Region, change: Callable[[Tensor, Slices, slice], Tensor]
) -> Tensor:
    new = out.clone()
    for index, heads in region.slices():
        new[index] = change(out[index], index, heads).to(out.dtype)
    return new


@dataclass(frozen=True, eq=False)
class Blend:
    """``(1 - u) O + u V`` on a region: attention blended with the identity, without the attention
    map.

    Because ``A -> A V`` is linear, this equals ``((1 - u) A + u I) V`` exactly (SoftPAG, arXiv
    2506.10978, Eq. 7). u: float32 (heads of the region,). Computed in float32 at least, returned in
    the dtype of the output.
    """

    region: Region
    u: Tensor

    def __call__(self, out: Tensor, call: Call) -> Tensor:
        v = call.v
        if v.shape[1] != out.shape[1]:
            v = v.repeat_interleave(out.shape[1] // v.shape[1], dim=1)
        u = self.u.to(out.device)[None, :, None, None]

        def change(block: Tensor, index: Slices, heads: slice) -> Tensor:
            wide = torch.promote_types(block.dtype, torch.float32)
            return torch.lerp(block.to(wide), v[index].to(wide), u[:, heads].to(wide))

        return _apply(out, self.region, change)


@dataclass(frozen=True, eq=False)
class Gain:
    """``gain * O`` on a region. gain: float32 (heads of the region,)."""

    region: Region
    gain: Tensor

    def __call__(self, out: Tensor, call: Call) -> Tensor:
        gain = self.gain.to(out.device)[None, :, None, None]

        def change(block: Tensor, index: Slices, heads: slice) -> Tensor:
            return block.to(torch.promote_types(block.dtype, torch.float32)) * gain[:, heads]

        return _apply(out, self.region, change)
