"""Extra branches, and how predictions combine.

A pipeline's classifier-free guidance ``f(n, c) = n + s (c - n)`` is affine with coefficients that
sum to 1, hence ``f(n + d, c + d) = f(n, c) + d``: adding the same difference to every row that the
denoiser returns guides by exactly that difference, whatever the pipeline does with the rows
afterwards (batched, split or no guidance).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_control.errors import AttnControlError


def difference(
    cond: Tensor,
    perturbed: Tensor,
    scale: float,
    *,
    parallel: float = 1.0,
    limit: float | None = None,
    rescale: float = 0.0,
    learned: bool = False,
) -> Tensor:
    """``scale * (cond - perturbed)``, shaped like both: (cond rows, ...).

    Args:
        parallel: share kept of the component along ``cond`` (APG, arXiv 2410.02416, with 0).
        limit: largest norm relative to that of ``cond``, per row.
        rescale: share of ``cond + difference`` that is scaled back to the standard deviation of
            ``cond``, per row (arXiv 2305.08891, on the conditional prediction alone).
        learned: the second half of the channels is a variance, which is not guided.
    """
    if learned:
        half = cond.shape[1] // 2
        delta = difference(
            cond[:, :half], perturbed[:, :half], scale,
            parallel=parallel, limit=limit, rescale=rescale,
        )  # fmt: skip
        return torch.cat([delta, torch.zeros_like(cond[:, half:])], dim=1)
    delta = scale * (cond - perturbed)
    if parallel != 1:
        c, d = cond.flatten(1).float(), delta.flatten(1).float()
        along = (d * c).sum(1) / (c * c).sum(1).clamp(min=1e-12)
        delta = delta - (1 - parallel) * _rows(along, delta) * cond
    if limit is not None:
        size = delta.flatten(1).float().norm(dim=1) / cond.flatten(1).float().norm(dim=1).clamp(
            min=1e-12
        )
        delta = delta * _rows((limit / size.clamp(min=1e-12)).clamp(max=1.0), delta)
    if rescale:
        guided = cond + delta
        spread = cond.flatten(1).float().std(1) / guided.flatten(1).float().std(1).clamp(min=1e-12)
        delta = guided * _rows(rescale * spread + (1 - rescale), delta) - cond
    return delta


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """One value a row, shaped to scale a prediction."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def add_to_rows(sample: Tensor, delta: Tensor) -> Tensor:
    """Add a difference of the cond rows to all rows of a prediction, branch by branch.

    Args:
        sample: (branches * cond rows, ...), branch-major as pipelines stack them.
        delta: (cond rows, ...).

    Raises:
        AttnControlError: the rows of the prediction are no multiple of the cond rows.
    """
    branches, rest = divmod(sample.shape[0], delta.shape[0])
    if rest or sample.shape[1:] != delta.shape[1:]:
        raise AttnControlError(
            f"guidance: a difference of shape {tuple(delta.shape)} does not fit a prediction of"
            f" {tuple(sample.shape)}"
        )
    return sample + (delta if branches == 1 else delta.repeat(branches, *[1] * (delta.ndim - 1)))
