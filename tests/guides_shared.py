"""The combine of guided predictions, row by row in numpy, from the papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def run(model: Any, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


def combine(
    cond: Tensor,
    perturbed: Tensor,
    scale: float,
    parallel: float = 1.0,
    limit: float | None = None,
    rescale: float = 0.0,
) -> Tensor:
    rows = []
    for c, p in zip(cond.double().numpy(), perturbed.double().numpy(), strict=True):
        d = scale * (c - p)
        along = (d * c).sum() / (c * c).sum() * c
        d = (d - along) + parallel * along
        if limit is not None and np.linalg.norm(d) > limit * np.linalg.norm(c):
            d = d * limit * np.linalg.norm(c) / np.linalg.norm(d)
        guided = c + d
        factor = c.std(ddof=1) / guided.std(ddof=1)
        rows.append(rescale * factor * guided + (1 - rescale) * guided)
    return torch.tensor(np.stack(rows))
