"""The yardstick computes attention, so that being as lean as it is means something."""

from __future__ import annotations

import math

import pytest
import torch
from attend_oracle import softmax, worst

from attn_control.kernels.triton import dense
from attn_control.kernels.triton.tune import wide


@pytest.mark.parametrize("dim", [16, 24])
def test_forward_and_backward(dim):
    g = torch.Generator().manual_seed(dim)
    q, k, v, grad = (torch.randn(2, 3, 64, dim, generator=g) for _ in range(4))
    out, dq, dk, dv = (torch.full_like(q, math.nan) for _ in range(4))
    lse, scale = torch.empty(2, 3, 64), 0.25
    sizes = {"DIM": dim, "WIDE": wide(dim), "M": 32, "N": 16, "PRECISION": "ieee"}
    numbers = (3, 64, 64, scale * math.log2(math.e))

    def strides(*tensors):
        return [step for x in tensors for step in x.stride()[:3]]

    dense.dense_forward[2, 6](q, k, v, out, lse, *strides(q, k, v, out), *numbers, **sizes)
    twins = [x.double().requires_grad_() for x in (q, k, v)]
    right, mass = softmax(*twins, torch.ones(64, 64, dtype=torch.bool), scale)
    assert worst(out, right) <= 2e-6 and worst(lse, mass) <= 2e-6
    delta = (out * grad).sum(-1)
    read = (q, k, v, grad, delta, lse * math.log2(math.e))
    dense.dense_of_queries[2, 6](*read, dq, *strides(q, k, v, grad, dq), *numbers, **sizes)
    dense.dense_of_keys[2, 6](*read, dk, dv, *strides(q, k, v, grad, dk), *numbers, **sizes)
    slopes = torch.autograd.grad(right, twins, grad.double())
    for mine, its in zip((dq, dk, dv), slopes, strict=True):
        assert worst(mine, its) <= 1e-5
