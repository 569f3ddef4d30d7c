"""Chosen columns of the probabilities, and their gradients, against a float64 softmax."""

from __future__ import annotations

import random

import pytest
import torch
from attend_oracle import case, softmax, worst

from attn_control.errors import AttnControlError
from attn_control.kernels import attend, probe
from attn_control.kernels.triton.probe import key_columns
from attn_control.masks import GroupMask


def probabilities(q, k, allowed, scale, added=None):
    """The float64 softmax itself: its output with the identity as values."""
    one = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:2], -1, -1)
    return softmax(q, k, one, allowed, scale, added)[0]


def groups(seed, x):
    """Two atoms of queries, of which one reads nothing but even keys; and that as a dense mask."""
    queries, keys = torch.arange(x.q.shape[2]), torch.arange(x.k.shape[2])
    high = 40 if seed % 2 else 1
    plan = GroupMask(
        (queries % 2).short(), (keys % 2 * high).short(), torch.tensor([1, 1 | 1 << high])
    )
    return plan, (queries % 2 == 1)[:, None] | (keys % 2 == 0)


@pytest.mark.parametrize("seed", range(8))
def test_random_plans(seed):
    """Blocks, groups, both or neither; the model's mask; grouped keys; any number of columns."""
    draw = random.Random(seed)
    kv_heads, batch = draw.randint(1, 2), draw.randint(1, 2)
    x = case(
        seed,
        batch=batch,
        heads=2 * kv_heads,
        kv_heads=kv_heads,
        dim=draw.choice([8, 24]),
        q_regions=(draw.randint(70, 90), draw.randint(1, 40)),
        k_regions=(draw.randint(40, 60), draw.randint(1, 40)),
        block=(draw.choice([24, 32, 96]), draw.choice([32, 64])),
        shared=(draw.random() < 0.5, draw.random() < 0.5),
        density=0.8,
    )
    plan, allowed = (x.plan, x.dense) if seed % 4 else (None, torch.ones(1, 1, 1, 1).bool())
    if draw.random() < 0.6:
        words, reads = groups(seed, x)
        plan, allowed = words if plan is None else plan & words, allowed & reads
    g = torch.Generator().manual_seed(seed)
    mask = added = None
    if draw.random() < 0.5:
        mask = added = torch.randn(1, 1, x.q.shape[2], x.k.shape[2], generator=g)
    elif draw.random() < 0.5:
        mask = torch.rand(batch, 1, 1, x.k.shape[2], generator=g) < 0.8
        allowed = allowed & mask
    keys = torch.randint(x.k.shape[2], (draw.choice([1, 17, 70]),), generator=g)
    scale = draw.choice([0.3, -0.2])
    _, lse = attend(x.q, x.k, x.v, plan, mask=mask, scale=scale, impl="reference")
    expected = probabilities(x.q, x.k, allowed, scale, added)[..., keys]
    assert (expected == 0).any() or plan is None
    for impl in ("torch", "triton"):
        found = probe(x.q, x.k, lse, keys, plan, mask=mask, scale=scale, impl=impl)
        assert found.dtype == torch.float32 and worst(found, expected) <= 1e-6
        assert ((found == 0) == (expected == 0)).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradients_are_those_of_the_softmax(impl):
    """With attend's lse they go through all keys, though few are looked at."""
    x = case(2, heads=4, kv_heads=2, dim=8, q_regions=(70,), k_regions=(50,))
    keys = [3, 49, 3, 20]
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k))
    _, lse = attend(x.q, x.k, x.v, x.plan, impl="reference")
    found = probe(x.q, x.k, lse, keys, x.plan, impl=impl)
    twins = tuple(t.detach().double().requires_grad_() for t in inputs)
    truth = probabilities(*twins, x.dense, 8**-0.5)[..., keys]
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()
    assert worst(found, truth) <= 1e-6
    grads = (
        torch.autograd.grad((p * weight).sum(), t) for p, t in ((found, inputs), (truth, twins))
    )
    for mine, theirs in zip(*grads, strict=True):
        assert mine.isfinite().all() and theirs.abs().max() > 0.01
        assert worst(mine, theirs) <= 2e-6


def test_views_and_half_precision():
    x = case(3, dim=16, dtype=torch.float16, q_regions=(70,), k_regions=(50,))
    q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k))
    _, lse = attend(q, k, x.v, x.plan, impl="reference")
    expected = probabilities(q, k, x.dense, 0.25)[..., [0, 9]]
    assert worst(probe(q, k, lse, [0, 9], x.plan, impl="triton"), expected) <= 1e-6


def test_no_keys_chosen():
    x = case(3, q_regions=(70,), k_regions=(50,))
    lse = torch.zeros(1, 2, 70)
    for impl in ("torch", "triton"):
        assert probe(x.q, x.k, lse, [], x.plan, impl=impl).shape == (1, 2, 70, 0)


def test_the_operator_keeps_its_promises():
    x = case(4, dim=8, q_regions=(40,), k_regions=(50,))
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, torch.zeros(1, 2, 40)))
    keys = torch.tensor([1, 30], dtype=torch.int32)
    bounds = torch.tensor([0, 40], dtype=torch.int32)
    mask = torch.ones(1, 1, 1, 50, dtype=torch.bool)
    given = None, None, None, mask, None, None, None
    torch.library.opcheck(key_columns, (*inputs, keys, 0.25, bounds, [*given]))


WRONG = {
    "probe: expected lse as float32": dict(lse=torch.zeros(1, 2, 69)),
    "probe: keys has 50, which is not in 0..49": dict(keys=[1, 50]),
    "probe: keys has -1": dict(keys=torch.tensor([-1])),
    "one row of integers, got float32": dict(keys=[0.5]),
    "a finite number as scale": dict(scale=float("nan")),
    "as impl, got 'flex'": dict(impl="flex"),
    "probe: impl='triton' has no float64": dict(
        q=torch.zeros(1, 2, 70, 8).double(), k=torch.zeros(1, 2, 50, 8).double(), impl="triton"
    ),
    "probe: plan is for 70 queries and 50 keys": dict(k=torch.zeros(1, 2, 51, 8)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_refused(message):
    x = case(0, dim=8, q_regions=(70,), k_regions=(50,))
    given = dict(q=x.q, k=x.k, lse=torch.zeros(1, 2, 70), keys=[1], plan=x.plan)
    with pytest.raises(AttnControlError, match=message):
        probe(**{**given, **WRONG[message]})
