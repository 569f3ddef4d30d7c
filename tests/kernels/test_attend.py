"""attend against a float64 softmax over dense masks: outputs, lse and gradients."""

from __future__ import annotations

import pytest
import torch
from attend_oracle import blocks_of, case, softmax, worst

from attn_control.kernels import attend

EXECUTORS = ("reference", "torch")
# Heads that share a mask or do not, grouped keys, batches, regions of text, blocks of many sizes.
SHAPES = {
    "ragged": {},
    "shared by heads": {"shared": (True, True), "heads": 3, "kv_heads": 3},
    "grouped": {"heads": 6, "kv_heads": 2, "batch": 2},
    "grouped, shared": {"heads": 4, "kv_heads": 1, "shared": (True, True)},
    "by batch row": {"batch": 2, "shared": (False, False)},
    "by batch row, shared by heads": {"batch": 2, "shared": (False, True)},
    "text regions": {"q_regions": (96, 7, 96), "k_regions": (13, 150, 33)},
    "flat blocks": {"block": (16, 64), "density": 0.2},
    "tall blocks": {"block": (128, 32), "q_regions": (300,)},
    "few keys": {"q_regions": (200,), "k_regions": (5,)},
    "dense enough to share tiles": {"density": 0.95, "q_regions": (700,), "k_regions": (900,)},
}


def plain_error(x, allowed, scale):
    """What torch's own attention in the same precision is off by."""
    group = x.q.shape[1] // x.k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (x.k, x.v))
    mask = allowed.expand(*x.q.shape[:3], x.k.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(x.q, k, v, mask, scale=scale)
    return worst(out, softmax(x.q, x.k, x.v, allowed, scale)[0])


@pytest.mark.parametrize("impl", EXECUTORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_lse(impl, shape):
    for seed in range(3):
        x = case(seed, **SHAPES[shape])
        scale = x.q.shape[-1] ** -0.5
        out, lse = attend(x.q, x.k, x.v, x.plan, impl=impl)
        expected, mass = softmax(x.q, x.k, x.v, x.dense, scale)
        assert worst(out, expected) <= 2 * max(plain_error(x, x.dense, scale), 5e-7)
        assert lse.dtype == torch.float32 and worst(lse, mass) <= 2e-6
        empty = ~x.dense.any(-1).expand(lse.shape)
        assert empty.any() and not empty.all()
        assert (out[empty] == 0).all() and (lse[empty] == float("-inf")).all()


@pytest.mark.parametrize("impl", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(impl, dtype):
    for seed in range(4):
        x = case(seed, dtype=dtype, density=0.7, q_regions=(400,), dim=64)
        out, lse = attend(x.q, x.k, x.v, x.plan, impl=impl, scale=0.2)
        expected, mass = softmax(x.q, x.k, x.v, x.dense, 0.2)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert worst(out, expected) <= 2 * plain_error(x, x.dense, 0.2) + 1e-15
        # The kernel's exponential has 20 bits where its weights have 8 or 11.
        assert worst(lse, mass) <= (2e-6 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dim", [8, 24, 40, 72, 80, 128, 160, 256])
def test_head_dims(dim):
    x = case(dim, dim=dim)
    out, _ = attend(x.q, x.k, x.v, x.plan, impl="torch")
    assert worst(out, softmax(x.q, x.k, x.v, x.dense, dim**-0.5)[0]) <= 2e-6


def gradients(out, lse, inputs, seed, through_lse):
    g = torch.Generator().manual_seed(seed)
    loss = (out.double() * torch.randn(out.shape, generator=g).double()).sum()
    if through_lse:
        weight = torch.randn(lse.shape, generator=g).double()
        loss = loss + (torch.where(lse.isinf(), 0.0, lse.double()) * weight).sum()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("impl", EXECUTORS)
@pytest.mark.parametrize("through_lse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(impl, through_lse, shape):
    x = case(7, **SHAPES[shape])
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, x.v))
    found = gradients(*attend(*inputs, x.plan, impl=impl), inputs, 1, through_lse)
    twins = tuple(t.detach().double().requires_grad_() for t in inputs)
    truth = softmax(*twins, x.dense, x.q.shape[-1] ** -0.5)
    for mine, theirs in zip(found, gradients(*truth, twins, 1, through_lse), strict=True):
        assert mine.isfinite().all()
        assert worst(mine, theirs) <= 5e-6 * max(1.0, theirs.abs().max().item())
    empty = ~x.dense.any(-1).expand(x.q.shape[:3])
    assert (found[0][empty] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(dtype):
    x = case(2, dtype=dtype, q_regions=(900,), k_regions=(600,), density=0.7, dim=64, kv_heads=1)
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, x.v))
    found = gradients(*attend(*inputs, x.plan, impl="torch"), inputs, 1, False)
    twins = tuple(t.detach().double().requires_grad_() for t in inputs)
    truth = gradients(*softmax(*twins, x.dense, 0.125), twins, 1, False)
    k, v = (t.repeat_interleave(2, 1) for t in inputs[1:])
    stock = torch.nn.functional.scaled_dot_product_attention(
        inputs[0], k, v, x.dense.expand(1, 2, 900, 600)
    )
    plain = gradients(stock, None, inputs, 1, False)
    for mine, theirs, right in zip(found, plain, truth, strict=True):
        assert worst(mine, right) <= 2 * worst(theirs, right)


MASKS = {
    "keys": lambda g, b, h, q, k: torch.rand(b, 1, 1, k, generator=g) < 0.6,
    "by head": lambda g, b, h, q, k: torch.rand(1, h, q, k, generator=g) < 0.6,
    "queries": lambda g, b, h, q, k: torch.rand(q, 1, generator=g) < 0.8,
    "one row of keys": lambda g, b, h, q, k: torch.rand(k, generator=g) < 0.8,
    "added": lambda g, b, h, q, k: torch.randn(b, 1, q, k, generator=g),
    "added to keys": lambda g, b, h, q, k: torch.randn(1, 1, 1, k, generator=g),
    "added, some -inf": lambda g, b, h, q, k: torch.where(
        torch.rand(b, h, q, k, generator=g) < 0.6, 0.5, float("-inf")
    ),
    "all true": lambda g, b, h, q, k: torch.ones(b, 1, 1, k, dtype=torch.bool),
}


@pytest.mark.parametrize("impl", ["auto", *EXECUTORS])
@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_the_models_own_mask(impl, planned, name):
    x = case(3, batch=2, heads=4, kv_heads=2, density=0.6)
    sizes = (2, 4, x.q.shape[2], x.k.shape[2])
    mask = MASKS[name](torch.Generator().manual_seed(4), *sizes)
    allowed, added = (mask, None) if mask.dtype == torch.bool else (~mask.isneginf(), mask)
    added = None if added is None else added.masked_fill(~allowed, 0.0)
    if planned:
        allowed = allowed & x.dense
    allowed = allowed.expand(sizes)
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, x.v))
    out, lse = attend(*inputs, x.plan if planned else None, mask=mask, impl=impl)
    twins = tuple(t.detach().double().requires_grad_() for t in inputs)
    expected = softmax(*twins, allowed, 0.25, added)
    assert worst(out, expected[0]) <= 2e-6 and worst(lse, expected[1]) <= 4e-6
    truth = gradients(*expected, twins, 5, True)
    for mine, right in zip(gradients(out, lse, inputs, 5, True), truth, strict=True):
        assert worst(mine, right) <= 2e-5


@pytest.mark.parametrize("need_lse", [False, True])
@pytest.mark.parametrize("impl", ["auto", *EXECUTORS])
def test_density_one_is_dense_attention(impl, need_lse):
    x = case(0, heads=4, kv_heads=2)
    plan = blocks_of(torch.ones(1, 1, 150, 210, dtype=torch.bool), 32, 32)
    dense = torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v, enable_gqa=True)
    for given in (plan, None):
        out, lse = attend(x.q, x.k, x.v, given, impl=impl, need_lse=need_lse)
        assert worst(out, dense) <= 1e-6
        assert (lse is not None) == need_lse


def test_every_density_is_exact_under_auto():
    for tenths in range(1, 11):
        x = case(tenths, density=tenths / 10, q_regions=(260,))
        out, _ = attend(x.q, x.k, x.v, x.plan)
        assert worst(out, softmax(x.q, x.k, x.v, x.dense, 0.25)[0]) <= 2e-6


def test_no_keys_at_all():
    q, k = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 2, 0, 8)
    for impl in ("auto", *EXECUTORS):
        out, lse = attend(q, k, k, impl=impl)
        assert (out == 0).all() and (lse == float("-inf")).all()
        assert (torch.autograd.grad(out.sum(), q)[0] == 0).all()
    x = case(0)
    nothing = blocks_of(torch.zeros_like(x.dense), 32, 32)
    out, lse = attend(x.q, x.k, x.v, nothing)
    assert (out == 0).all() and (lse == float("-inf")).all()
