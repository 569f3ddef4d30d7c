"""Extra branches, and how predictions combine.

A pipeline's classifier-free guidance ``f(n, c) = n + s (c - n)`` is affine with coefficients that
sum to 1, hence ``f(n + d, c + d) = f(n, c) + d``: adding the same difference to every row that the
denoiser returns guides by exactly that difference, whatever the pipeline does with the rows
afterwards (batched, split or no guidance).
"""

from __future__ import annotations

from torch import Tensor

from attn_control.errors import AttnControlError


def difference(cond: Tensor, perturbed: Tensor, scale: float) -> Tensor:
    """``scale * (cond - perturbed)``; both of shape (cond rows, ...)."""
    return scale * (cond - perturbed)


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
