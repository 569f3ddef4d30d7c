"""The backward kernels, run as Python, against gradients of a float64 softmax."""

from __future__ import annotations

import random

import pytest
import torch
from attend_oracle import case, softmax, worst

from attn_control.kernels.triton.run import attend_triton

SMALL = {"q_regions": (70,), "k_regions": (90,)}
SHAPES = {
    "ragged": {},
    "grouped, by batch row": {"heads": 4, "kv_heads": 2, "batch": 2, "shared": (False, False)},
    "grouped, shared": {"heads": 3, "kv_heads": 1, "batch": 2, "shared": (True, True)},
    "text regions": {"q_regions": (40, 7, 40), "k_regions": (13, 70, 33)},
    "flat blocks": {"block": (16, 64), "density": 0.6},
    "tall blocks, several programs each": {"block": (64, 32), "q_regions": (100,)},
    "features that are no power of two": {"dim": 40},
}


def gradients(out, lse, inputs, through_lse):
    g = torch.Generator().manual_seed(1)
    loss = (out.double() * torch.randn(out.shape, generator=g).double()).sum()
    if through_lse:
        weight = torch.randn(lse.shape, generator=g).double()
        loss = loss + (torch.where(lse.isinf(), 0.0, lse.double()) * weight).sum()
    return torch.autograd.grad(loss, inputs)


def held(x, scale, through_lse=True, allowed=None, mask=None, added=None, **orders):
    """Gradients of the inputs, within what float32 loses of the true ones."""
    allowed = x.dense if allowed is None else allowed
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, x.v))
    found = gradients(*attend_triton(*inputs, x.plan, mask, scale, **orders), inputs, through_lse)
    twins = tuple(t.detach().double().requires_grad_() for t in inputs)
    truth = gradients(*softmax(*twins, allowed, scale, added), twins, through_lse)
    for mine, theirs in zip(found, truth, strict=True):
        assert mine.isfinite().all()
        assert worst(mine, theirs) <= 5e-6 * max(1.0, theirs.abs().max().item())
    empty = ~allowed.any(-1).expand(x.q.shape[:3])
    assert empty.any() and (found[0][empty] == 0).all()
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape):
    held(case(7, **{**SMALL, **SHAPES[shape]}), 0.25)


@pytest.mark.parametrize("seed", range(12))
def test_random_plans(seed):
    """Values and gradients; blocks, regions, groups, sharing, density and head dim are drawn."""
    draw = random.Random(seed)
    kv_heads, group = draw.randint(1, 2), draw.randint(1, 3)

    def regions():
        # The first is longer than any block, so that the second block of queries, which the case
        # empties, is not the only one.
        return (draw.randint(70, 90), *(draw.randint(1, 40) for _ in range(draw.randint(0, 2))))

    x = case(
        seed,
        batch=draw.randint(1, 2),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=draw.choice([4, 16, 24, 32]),
        q_regions=regions(),
        k_regions=regions(),
        block=(draw.choice([16, 24, 32, 48, 64]), draw.choice([32, 64, 96])),
        shared=(draw.random() < 0.5, draw.random() < 0.5),
        density=draw.uniform(0.2, 1.0),
    )
    scale = draw.uniform(0.1, 0.5)
    out, lse = attend_triton(x.q, x.k, x.v, x.plan, None, scale)
    expected, mass = softmax(x.q, x.k, x.v, x.dense, scale)
    assert worst(out, expected) <= 3e-6 and worst(lse, mass) <= 3e-6
    held(x, scale)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_of_the_output_alone_at_any_scale(scale):
    held(case(8, **SMALL), scale, through_lse=False)


def test_under_the_models_own_mask():
    x = case(9, batch=2, density=0.6, **SMALL)
    g = torch.Generator().manual_seed(4)
    keys = torch.rand(2, 1, 1, 90, generator=g) < 0.6
    held(x, 0.25, allowed=x.dense & keys, mask=keys)
    added = torch.randn(1, 2, 70, 90, generator=g)
    held(x, 0.25, mask=added, added=added)


def test_with_row_orders():
    x = case(10, heads=4, kv_heads=2, **SMALL)
    g = torch.Generator().manual_seed(2)
    q_order = torch.stack([torch.randperm(70, generator=g) for _ in range(4)]).int()[None]
    k_order = torch.stack([torch.randperm(90, generator=g) for _ in range(2)]).int()[None]
    dense = torch.zeros_like(x.dense)
    for head in range(4):
        rows, columns = q_order[0, head].long(), k_order[0, head // 2].long()
        dense[0, head, rows[:, None], columns] = x.dense[0, head]
    held(x, 0.25, allowed=dense, q_order=q_order, k_order=k_order)


def test_half_precision():
    shape = {"block": (64, 64), "q_regions": (150,), "k_regions": (200,), "heads": 1, "kv_heads": 1}
    x = case(2, dtype=torch.float16, dim=64, density=0.7, **shape)
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, x.v))
    found = gradients(*attend_triton(*inputs, x.plan, None, 0.125), inputs, False)
    twins = tuple(t.detach().double().requires_grad_() for t in inputs)
    truth = gradients(*softmax(*twins, x.dense, 0.125), twins, False)
    mask = x.dense.expand(1, 1, 150, 200)
    stock = torch.nn.functional.scaled_dot_product_attention(*inputs, mask)
    plain = gradients(stock, None, inputs, False)
    for mine, theirs, right in zip(found, plain, truth, strict=True):
        assert worst(mine, right) <= 2 * worst(theirs, right)


def test_the_same_bits_each_time():
    x = case(11, heads=4, kv_heads=1, **SMALL)
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, x.v))
    twice = [gradients(*attend_triton(*inputs, x.plan, None, 0.25), inputs, True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
