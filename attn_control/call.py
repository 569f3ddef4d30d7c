"""Site, Layout, Step and Call: the words in which every method is written.

Shapes are canonical: (batch, heads, tokens, head_dim). Nothing here knows a model, a method or
    diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_control.errors import AttnControlError

SLOTS = ("joint", "self", "cross", "self2")
ROLES = ("text", "image", "video", "reference", "subject", "register", "pad")


@dataclass(frozen=True)
class Site:
    """One attention module of one model.

    Attributes:
        name: qualified module name inside its model, as in ``named_modules()``; what files store.
        model: the pipeline component it belongs to: "transformer", "transformer_2", "unet", or a
            "controlnet" ("controlnet_1" of several), which stands beside the denoiser.
        layer: block index over the whole model in execution order (joint blocks first, then
            single).
        slot: which attention of the block: "joint", "self", "cross" or "self2".
        heads, kv_heads, head_dim: the geometry of its softmax calls.
        module: the module itself. It may be called (``to_k``, ``norm_k``); its weights are not
            read, because offload, quantisation and LoRA put them elsewhere.
    """

    name: str
    model: str
    layer: int
    slot: str
    heads: int
    kv_heads: int
    head_dim: int
    module: Any = field(repr=False, compare=False)

    @property
    def label(self) -> str:
        """The short name that selectors use, e.g. ``L3.cross``."""
        return f"L{self.layer}.{self.slot}"

    @property
    def beside(self) -> bool:
        """Whether its model helps the denoiser: selectors take it by its component's name only."""
        return self.model.startswith("controlnet")


@dataclass(frozen=True)
class Segment:
    """Tokens with one role in a row. ``grid``: (frames, height, width) where they are spatial."""

    name: str
    role: str
    start: int
    length: int
    grid: tuple[int, int, int] | None = None

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Layout:
    """What the tokens of a call are, in order. In cross-attention the keys are other tokens."""

    q: tuple[Segment, ...]
    k: tuple[Segment, ...]

    @classmethod
    def joint(cls, *parts: tuple[str, int, tuple[int, int, int] | None]) -> Layout:
        """Queries and keys are the same tokens, given as (role, length, grid) in order."""
        segments, start = [], 0
        for role, length, grid in parts:
            if not length:
                continue
            segments.append(Segment(role, role, start, length, grid))
            start += length
        return cls(tuple(segments), tuple(segments))

    @classmethod
    def cross(cls, query: Layout, key: Layout) -> Layout:
        return cls(query.q, key.q)

    @property
    def q_len(self) -> int:
        return sum(segment.length for segment in self.q)

    @property
    def k_len(self) -> int:
        return sum(segment.length for segment in self.k)

    @property
    def is_self(self) -> bool:
        """Query i and key i are the same token, so that "attend only to yourself" has a meaning."""
        return self.q == self.k

    def span(self, tokens: str) -> tuple[tuple[int, int], ...]:
        """Query ranges [a, b) of ``tokens``: "all" or a role; "image" also takes video tokens."""
        if tokens == "all":
            return ((0, self.q_len),)
        roles = {"image", "video"} if tokens in ("image", "video") else {tokens}
        return tuple((s.start, s.stop) for s in self.q if s.role in roles)


@dataclass(frozen=True)
class Softmax:
    """One of the softmaxes that a processor call makes, in their order.

    Attributes:
        layout: its tokens; None where they are not known.
        rows: the batch rows that it holds, half-open; None for all.
    """

    layout: Layout | None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Step:
    """Where the sampler is at one denoiser call.

    Attributes:
        run_id: number of this sampling run; 0 where no sampler is known.
        index, total: position in the scheduler's timesteps and their number; None on a bare model.
        sigma: noise level, in the scheduler's own units; None where the scheduler has none.
        branch: of every batch row: "cond", "uncond", "perturbed:<id>" or "other:<name>".
        level, levels: position among the run's distinct timesteps, and their number: a solver that
            calls the model twice at one timestep stays at one level. None as ``index`` is.
    """

    run_id: int
    index: int | None
    total: int | None
    sigma: float | None
    branch: tuple[str, ...]
    level: int | None = None
    levels: int | None = None

    @property
    def progress(self) -> float | None:
        """``index / total`` in [0, 1), or None when the sampler is not known."""
        if self.index is None or not self.total:
            return None
        return self.index / self.total

    def rows(self, branch: str) -> tuple[int, int] | None:
        """Half-open range of the rows of a branch, or None if there are none."""
        found = [row for row, name in enumerate(self.branch) if name == branch]
        if not found:
            return None
        if found[-1] - found[0] + 1 != len(found):
            raise AttnControlError(
                f"rows of branch {branch!r} are not contiguous: got {self.branch}, expected one"
                " block of rows"
            )
        return found[0], found[-1] + 1


@dataclass
class Call:
    """One softmax attention about to run, with everything a plan may need.

    q: (batch, heads, q_tokens, head_dim); k, v: (batch, kv_heads, k_tokens, head_dim); mask: as the
        model gave it; causal: whether it asked for a causal mask instead; besides: what else it
        does to its scores or weights, in words, "" for nothing.
    ``original(heads)`` runs the untouched diffusers call, with the user's backend and parallel
    configuration, of all heads (None) or of some; it returns (batch, those heads, q_tokens,
    head_dim).
    """

    site: Site
    part: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    original: Callable[..., Tensor]
    causal: bool = False
    besides: str = ""


def heads_of(x: Tensor | None, heads: tuple[int, ...], total: int, dim: int) -> Tensor | None:
    """Some heads of a tensor: of queries, of keys that fewer heads share, or of a mask.

    heads: ascending; total: heads of the queries; dim: where heads stand. Dimensions of size 1, and
    masks without one, stand for all.
    """
    if x is None or x.ndim < 4 or x.shape[dim] == 1:
        return x
    shared = total // x.shape[dim]
    index = torch.tensor([head // shared for head in heads], device=x.device)
    return x.index_select(dim, index)


def rows_in(sample: Any) -> int:
    """Rows of a batch that is one tensor, or a list with a tensor a row."""
    return len(sample) if isinstance(sample, list) else int(sample.shape[0])


def tensor_in(sample: Any) -> Tensor:
    """A tensor of the batch, for its device and type."""
    while isinstance(sample, list):
        sample = sample[-1]
    return sample


def _inside(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def sample_of(output: Any) -> Tensor:
    """The prediction inside what a denoiser returned: a tuple, a ``ModelOutput`` or a tensor. A
    list with a tensor a row is stacked.
    """
    sample = _inside(output)
    if not isinstance(sample, list):
        return sample
    if len({row.shape for row in sample}) > 1:
        shapes = [tuple(row.shape) for row in sample]
        raise AttnControlError(f"attach: expected pictures of one size in a batch, got {shapes}")
    return torch.stack(sample)


def with_sample(output: Any, sample: Tensor) -> Any:
    """The same container with another prediction in it."""
    if isinstance(output, torch.Tensor):
        return sample
    inside = list(sample.unbind(0)) if isinstance(_inside(output), list) else sample
    if isinstance(output, tuple):
        return (inside, *output[1:])
    output.sample = inside
    return output
