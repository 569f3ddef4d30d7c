"""What attention is blended with: closed forms of the perturbed output, O(tokens) beside one
attention.

Each takes the selected rows and heads of a call (q, k, v as (batch, heads, tokens, head_dim), keys
and values already repeated for grouped queries) with a query range, and returns (batch, heads,
range, head_dim). Identities: HeadHunter, arXiv 2506.10978; PAG, 2403.17377; SEG, 2408.00760;
derivations in docs/methods/guidance.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_control.kernels.scores import diagonal, log_mass

_sdpa = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Block:
    """One block of a call: queries of ``span`` against all keys.

    text: half-open ranges of the keys that are not image; used by the image-to-image variants.
    out: the unperturbed output of the same block.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    mask: Tensor | None
    scale: float | None
    span: tuple[int, int]
    text: tuple[tuple[int, int], ...]

    @property
    def own(self) -> Tensor:
        """The values at the queries' own positions."""
        return self.v[:, :, self.span[0] : self.span[1]]


Target = Callable[[Block], Tensor]


def identity(b: Block) -> Tensor:
    """Each query attends only to itself: ``A' = I``, so ``O' = V``."""
    return b.own


def uniform(b: Block) -> Tensor:
    """Each query attends to every key that it may see alike: ``O' = mean(V)``."""
    return _shared(torch.zeros_like(b.q[:, :, :1]), b)


def mean_query(b: Block) -> Tensor:
    """Every query is the mean query: SEG's limit of infinite blur."""
    wide = torch.promote_types(b.q.dtype, torch.float32)
    return _shared(b.q.to(wide).mean(dim=2, keepdim=True).to(b.q.dtype), b)


def text_or_self_softmax(b: Block) -> Tensor:
    """Image-to-image scores cut off the diagonal, the softmax taken anew over {self} and text."""
    out, mass = _text(b)
    w = torch.sigmoid(_self(b) - mass)[..., None]
    return w * b.own.float() + (1 - w) * out


def text_or_self_mass(b: Block) -> Tensor:
    """Image-to-image mass moved onto the diagonal, text mass unchanged."""
    out, mass = _text(b)
    own = 1 - torch.exp(mass - log_mass(b.q, b.k, b.scale, b.mask))[..., None]
    return own * b.own.float() + (1 - own) * out


def _self(b: Block) -> Tensor:
    """Each query's score with its own key, under the mask."""
    start, stop = b.span
    scores = diagonal(b.q, b.k[:, :, start:stop], b.scale)
    if b.mask is None:
        return scores
    own = b.mask[..., start:stop]
    own = own[..., 0, :] if own.shape[-2] == 1 else own.diagonal(dim1=-2, dim2=-1)
    return scores.masked_fill(~own, float("-inf")) if own.dtype == torch.bool else scores + own


def _text(b: Block) -> tuple[Tensor, Tensor]:
    """Attention to text keys alone, float32, and its log-mass."""
    k = torch.cat([b.k[:, :, i:j] for i, j in b.text], dim=2)
    v = torch.cat([b.v[:, :, i:j] for i, j in b.text], dim=2)
    mask = None if b.mask is None else torch.cat([b.mask[..., i:j] for i, j in b.text], dim=-1)
    out = _sdpa(b.q, k, v, attn_mask=mask, scale=b.scale)
    return out.float(), log_mass(b.q, k, b.scale, mask)


def _shared(query: Tensor, b: Block) -> Tensor:
    """The output of one query (batch, heads, 1, head_dim) that stands for all; computed once,
    unless the mask differs by query.
    """
    if b.mask is not None and b.mask.shape[-2] != 1:
        query = query.expand_as(b.q)
    return _sdpa(query, b.k, b.v, attn_mask=b.mask, scale=b.scale).expand_as(b.own)


def self_weight(b: Block) -> Tensor:
    """``a_ii``, each query's attention to itself: float32 (batch, heads, range, 1), at most 1."""
    return torch.exp(_self(b) - log_mass(b.q, b.k, b.scale, b.mask)).clamp(max=1.0)[..., None]


TARGETS: dict[str, Target] = {
    "identity": identity,
    "uniform": uniform,
    "mean_query": mean_query,
    "ii_softmax": text_or_self_softmax,
    "ii_mass": text_or_self_mass,
}
