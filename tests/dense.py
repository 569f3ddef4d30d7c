"""Dense float64 attention maps, from the papers' formulas: the oracle of every closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_map(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale), float64 (batch, heads, queries, keys)."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double()) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.double()
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


def perturbed_map(
    op: str, a: Tensor, q: Tensor, k: Tensor, scale: float, image: slice, text: slice
) -> Tensor:
    """The paper's perturbed map A' of each op, for u = 1."""
    n = a.shape[-1]
    eye = torch.eye(n, dtype=torch.float64).expand_as(a)
    if op == "identity":
        return eye
    if op == "uniform":
        return torch.full_like(a, 1 / n)
    if op == "mean_query":
        return attention_map(q.double().mean(2, keepdim=True).expand_as(q), k, scale)
    inside = torch.zeros(n, n, dtype=torch.bool)
    inside[image, image] = True
    off_diagonal = inside & ~torch.eye(n, dtype=torch.bool)
    if op == "ii_softmax":
        return attention_map(q, k, scale, mask=~off_diagonal)
    if op == "ii_mass":
        moved = (a * inside).sum(-1)
        return torch.where(inside, torch.zeros_like(a), a) + eye * moved[..., None]
    raise AssertionError(op)


def slerp_rows(a: Tensor, u: float) -> Tensor:
    """Great-circle path between sqrt(A) and sqrt(I), row by row, squared."""
    root, target = a.sqrt(), torch.eye(a.shape[-1], dtype=torch.float64).expand_as(a)
    theta = torch.arccos((root * target).sum(-1, keepdim=True).clamp(-1, 1))
    point = (torch.sin((1 - u) * theta) * root + torch.sin(u * theta) * target) / torch.sin(theta)
    return point**2


def chord_rows(a: Tensor, u: float) -> Tensor:
    """Straight line between sqrt(A) and sqrt(I), normalised on the sphere, squared."""
    line = (1 - u) * a.sqrt() + u * torch.eye(a.shape[-1], dtype=torch.float64).expand_as(a)
    return (line / line.norm(dim=-1, keepdim=True)) ** 2


def blurred(picture: Tensor, grid: tuple[int, int, int], sigma: float) -> Tensor:
    """Queries (batch, heads, frames * height * width, dim), each the Gaussian mean of its frame's,
    pixel by pixel; weights sum to one at the border too.
    """
    _, height, width = grid
    frames = picture.double().unflatten(2, grid)
    ys, xs = torch.arange(height).double(), torch.arange(width).double()
    out = torch.empty_like(frames)
    for y in range(height):
        for x in range(width):
            far = (ys - y)[:, None] ** 2 + (xs - x)[None] ** 2
            weight = torch.exp(-far / (2 * sigma**2))
            weight = (weight / weight.sum())[..., None]
            out[:, :, :, y, x] = (frames * weight).sum((3, 4))
    return out.flatten(2, 4)
