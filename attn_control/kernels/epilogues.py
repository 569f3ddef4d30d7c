"""Changes of an attention output that need no attention map: O(tokens x head_dim) each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_control.call import Call, Step
from attn_control.errors import AttnControlError
from attn_control.kernels.paths import PATHS
from attn_control.kernels.targets import Block, Target, identity

Slices = tuple[slice, slice, slice]
Span = tuple[int, int | None]


@dataclass(frozen=True)
class Region:
    """Which elements of (batch, heads, tokens, head_dim) may change; all others keep their bits.

    rows: half-open batch range, or None for every row; heads: sorted head numbers; spans: half-open
    token ranges, with None for the end.
    """

    rows: tuple[int, int] | None
    heads: tuple[int, ...]
    spans: tuple[Span, ...]

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


def _columns(per_head: Tensor, heads: slice, like: Tensor) -> Tensor:
    """Values (heads,) or (rows, heads) of the region as (1 or rows, heads, 1, 1)."""
    picked = per_head[..., heads].to(like.device)
    return (picked if picked.ndim == 2 else picked[None])[:, :, None, None]


@dataclass(frozen=True, eq=False)
class Gates:
    """The strengths of heads [first, last) of one layer, read anew at each call from a tensor that
    may change.

    gates: (layers, all heads) or (rows, layers, all heads); may require grad.
    """

    gates: Tensor
    layer: int
    first: int
    last: int

    def __call__(self) -> Tensor:
        return self.gates[..., self.layer, self.first : self.last]


@dataclass(frozen=True, eq=False)
class Blend:
    """``(1 - u) O + u O_target`` on a region, along a path; in float32 at least.

    Because ``A -> A V`` is linear, the linear path equals ``((1 - u) A + u A_target) V`` exactly
    (SoftPAG, arXiv 2506.10978, Eq. 7).

    Attributes:
        u: float (heads of the region,) or (rows, heads of the region), or gates; negative values
            sharpen.
        target: the output of the perturbed attention.
        path: from attention to identity: "linear", "slerp" or "chord" (see ``kernels.paths``).
        text: half-open ranges of the keys that are no image, for targets that need them.
        cap: where u is negative, the largest norm of the new output relative to the old, per token.
        own_keys: whether query i and key i must be the same token, as for the identity.
    """

    region: Region
    u: Tensor | Gates
    target: Target = identity
    path: str = "linear"
    text: tuple[tuple[int, int], ...] = ()
    cap: float | None = None
    own_keys: bool = True

    def prepare(self, step: Step) -> None:
        """Before each forward: targets that change with the step."""
        prepare = getattr(self.target, "prepare", None)
        if prepare is not None:
            prepare(step)

    def __call__(self, out: Tensor, call: Call) -> Tensor:
        if self.own_keys and call.q.shape[2] != call.k.shape[2]:
            raise AttnControlError(
                f"SoftPAG: {call.site.label} attends from {call.q.shape[2]} queries to"
                f" {call.k.shape[2]} keys; the identity needs query i and key i to be the same"
                " token"
            )
        strengths = self.u() if isinstance(self.u, Gates) else self.u
        repeats = out.shape[1] // call.v.shape[1]
        k = call.k if repeats == 1 else call.k.repeat_interleave(repeats, dim=1)
        v = call.v if repeats == 1 else call.v.repeat_interleave(repeats, dim=1)

        def change(old: Tensor, index: Slices, heads: slice) -> Tensor:
            rows, which, tokens = index
            span = (tokens.start or 0, out.shape[2] if tokens.stop is None else tokens.stop)
            mask = cut_mask(call.mask, rows, which, span)
            block = Block(
                call.q[index],
                k[rows, which],
                v[rows, which],
                old,
                mask,
                call.scale,
                span,
                self.text,
            )
            wide = old.to(torch.promote_types(old.dtype, torch.float32))
            u = _columns(strengths, heads, old).to(wide.dtype)
            new = PATHS[self.path](wide, self.target(block).to(wide.dtype), u, block)
            if self.cap is not None:
                grown = new.norm(dim=-1, keepdim=True) / wide.norm(dim=-1, keepdim=True).clamp(
                    min=1e-12
                )
                new = torch.where(u < 0, new * (self.cap / grown).clamp(max=1.0), new)
            return new

        return _apply(out, self.region, change)


def cut_mask(
    mask: Tensor | None, rows: slice, heads: slice, span: tuple[int, int]
) -> Tensor | None:
    """The part of a mask that a block sees; dimensions of size 1 go on standing for all."""
    if mask is None:
        return None
    if mask.ndim == 2:  # keys by row, as some processors give it
        mask = mask[:, None, None]
    elif mask.ndim == 3:
        mask = mask[:, None]
    cuts = (rows, heads, slice(*span))
    for dim, cut in enumerate(cuts):
        if mask.shape[dim] != 1:
            mask = mask[(slice(None),) * dim + (cut,)]
    return mask


@dataclass(frozen=True, eq=False)
class Gain:
    """``gain * O`` on a region. gain: float32 (heads of the region,)."""

    region: Region
    gain: Tensor

    def __call__(self, out: Tensor, call: Call) -> Tensor:
        def change(old: Tensor, index: Slices, heads: slice) -> Tensor:
            wide = torch.promote_types(old.dtype, torch.float32)
            return old.to(wide) * _columns(self.gain, heads, old)

        return _apply(out, self.region, change)
