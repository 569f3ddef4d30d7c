"""The forward kernel, run as Python, against a float64 softmax over dense masks."""

from __future__ import annotations

import pytest
import torch
from attend_oracle import case, softmax, worst

from attn_control.errors import AttnControlError
from attn_control.kernels.triton.run import attend_triton

SMALL = {"q_regions": (70,), "k_regions": (90,)}
SHAPES = {
    "ragged": {},
    "grouped, by batch row": {"heads": 4, "kv_heads": 2, "batch": 2, "shared": (False, False)},
    "shared by heads": {"batch": 2, "shared": (False, True), "heads": 3, "kv_heads": 1},
    "shared by all": {"batch": 2, "shared": (True, True)},
    "text regions": {"q_regions": (40, 7, 40), "k_regions": (13, 70, 33)},
    "flat blocks": {"block": (16, 64), "density": 0.6},
    "tall blocks, several programs each": {"block": (64, 32), "q_regions": (100,)},
    "sizes that are no power of two": {"block": (24, 96), "k_regions": (150,), "density": 0.7},
    "few keys": {"k_regions": (5,), "density": 0.9},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_lse(shape):
    x = case(0, **{**SMALL, **SHAPES[shape]})
    out, lse = attend_triton(x.q, x.k, x.v, x.plan, None, 0.25)
    expected, mass = softmax(x.q, x.k, x.v, x.dense, 0.25)
    assert out.dtype == torch.float32 and lse.dtype == torch.float32
    assert worst(out, expected) <= 2e-6 and worst(lse, mass) <= 2e-6
    empty = ~x.dense.any(-1).expand(lse.shape)
    assert empty.any() and not empty.all()
    assert (out[empty] == 0).all() and (lse[empty] == float("-inf")).all()
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dim", [8, 40, 72, 128, 256])
def test_head_dims(dim):
    x = case(dim, dim=dim, **SMALL)
    out, _ = attend_triton(x.q, x.k, x.v, x.plan, None, dim**-0.5)
    assert worst(out, softmax(x.q, x.k, x.v, x.dense, dim**-0.5)[0]) <= 2e-6


def test_half_precision():
    """float16 alone: the interpreter multiplies bits of bfloat16."""
    x = case(1, dtype=torch.float16, block=(128, 128), q_regions=(200,), k_regions=(300,), dim=64)
    out, lse = attend_triton(x.q, x.k, x.v, x.plan, None, 0.125)
    expected, mass = softmax(x.q, x.k, x.v, x.dense, 0.125)
    allowed = x.dense.expand(1, 2, 200, 300)
    plain = torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v, allowed)
    assert out.dtype == torch.float16
    assert worst(out, expected) <= 2 * worst(plain, expected)
    assert worst(lse, mass) <= 1e-5


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale):
    x = case(4, **SMALL)
    out, lse = attend_triton(x.q, x.k, x.v, x.plan, None, scale)
    expected, mass = softmax(x.q, x.k, x.v, x.dense, scale)
    assert worst(out, expected) <= 5e-6 and worst(lse, mass) <= 5e-6


def test_no_plan():
    x = case(5, q_regions=(70,), k_regions=(150,), heads=4, kv_heads=2)
    out, lse = attend_triton(x.q, x.k, x.v, None, None, 0.25)
    expected, mass = softmax(x.q, x.k, x.v, torch.ones(1, 1, 70, 150, dtype=torch.bool), 0.25)
    assert worst(out, expected) <= 2e-6 and worst(lse, mass) <= 2e-6


def test_scores_far_above_what_exp_takes():
    x = case(6, **SMALL)
    out, lse = attend_triton(x.q * 100, x.k, x.v, x.plan, None, 1.0)
    expected, mass = softmax(x.q * 100, x.k, x.v, x.dense, 1.0)
    assert mass.max() > 500 and worst(out, expected) <= 1e-4
    assert worst(lse / 500, mass / 500) <= 2e-6


def orders(seed, x, per_head=True):
    g = torch.Generator().manual_seed(seed)
    found = []
    for tokens, heads in ((x.q.shape[2], x.q.shape[1]), (x.k.shape[2], x.k.shape[1])):
        lists = [torch.randperm(tokens, generator=g) for _ in range(heads if per_head else 1)]
        found.append(torch.stack(lists).int()[None])
    return found


@pytest.mark.parametrize("per_head", [True, False])
def test_row_orders(per_head):
    """The mask speaks of places; what stands there is read, and written, where it lies."""
    x = case(7, heads=4, kv_heads=2, **SMALL)
    q_order, k_order = orders(1, x, per_head)
    out, lse = attend_triton(x.q, x.k, x.v, x.plan, None, 0.25, q_order=q_order, k_order=k_order)
    dense = torch.zeros(1, 4, 70, 90, dtype=torch.bool)
    for head in range(4):
        rows = q_order[0, head if per_head else 0].long()
        columns = k_order[0, head // 2 if per_head else 0].long()
        dense[0, head, rows[:, None], columns] = x.dense[0, head]
    expected, mass = softmax(x.q, x.k, x.v, dense, 0.25)
    assert worst(out, expected) <= 2e-6 and worst(lse, mass) <= 2e-6


MASKS = {
    "keys": lambda g: torch.rand(2, 1, 1, 90, generator=g) < 0.6,
    "queries": lambda g: torch.rand(70, 1, generator=g) < 0.8,
    "added by head": lambda g: torch.randn(1, 2, 70, 90, generator=g),
    "added, some -inf": lambda g: torch.where(
        torch.rand(2, 2, 70, 90, generator=g) < 0.6, 0.5, float("-inf")
    ),
}


@pytest.mark.parametrize(
    ("name", "planned"), [*((name, True) for name in MASKS), ("added, some -inf", False)]
)
def test_the_models_own_mask(name, planned):
    x = case(8, batch=2, density=0.6, **SMALL)
    mask = MASKS[name](torch.Generator().manual_seed(4))
    out, lse = attend_triton(x.q, x.k, x.v, x.plan if planned else None, mask, 0.25)
    allowed, added = (mask, None) if mask.dtype == torch.bool else (~mask.isneginf(), mask)
    added = None if added is None else added.masked_fill(~allowed, 0.0)
    allowed = allowed & x.dense if planned else allowed
    expected, mass = softmax(x.q, x.k, x.v, allowed.expand(2, 2, 70, 90), 0.25, added)
    assert worst(out, expected) <= 2e-6 and worst(lse, mass) <= 4e-6


def test_views_in_any_layout_and_the_same_bits_each_time():
    x = case(9, **SMALL)
    plain, _ = attend_triton(x.q, x.k, x.v, x.plan, None, 0.25)
    joined = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v)]
    turned = [t.mT.contiguous().mT for t in (x.q, x.k, x.v)]
    for views in (joined, turned):
        assert torch.equal(attend_triton(*views, x.plan, None, 0.25)[0], plain)


def test_no_keys_at_all():
    q, k = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 2, 0, 8)
    out, lse = attend_triton(q, k, k, None, None, 1.0)
    assert (out == 0).all() and (lse == float("-inf")).all()
    assert (torch.autograd.grad(out.sum(), q)[0] == 0).all()


WRONG = {
    "no float64": lambda x: dict(q=x.q.double(), k=x.k.double(), v=x.v.double()),
    "no bfloat16 in triton's interpreter": lambda x: dict(
        q=x.q.bfloat16(), k=x.k.bfloat16(), v=x.v.bfloat16()
    ),
    "goes up to head_dim 256, got 264": lambda x: dict(
        zip("qkv", (torch.zeros(1, 2, 70, 264),) * 3, strict=True)
    ),
    "q_order of shape": lambda x: dict(q_order=torch.zeros(1, 1, 9, dtype=torch.int32)),
    "k_order as int32": lambda x: dict(k_order=torch.zeros(1, 1, 90, dtype=torch.int64)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_refused(message):
    x = case(0, **SMALL)
    given = {**dict(q=x.q, k=x.k, v=x.v, plan=None, mask=None, scale=1.0), **WRONG[message](x)}
    with pytest.raises(AttnControlError, match=message):
        attend_triton(**given)
