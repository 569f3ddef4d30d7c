"""Groups of tokens in attend, with executors that know blocks alone: sorted, run, put back."""

from __future__ import annotations

import pytest
import torch
from attend_oracle import case, softmax, worst

from attn_control.kernels import attend, explain, probe
from attn_control.masks import GroupMask


def scattered(seed, batch):
    """300 queries, 260 keys; atom 0 of the queries reads nothing."""
    g = torch.Generator().manual_seed(seed)
    x = case(seed, batch=2, heads=4, kv_heads=2, q_regions=(300,), k_regions=(260,))
    q_atom = torch.randint(3, (batch[0], 300), generator=g)
    k_atom = torch.randint(2, (batch[1], 260), generator=g)
    reads = torch.tensor([[False, False], [True, False], [False, True]])
    plan = GroupMask.from_table(reads, q_atom.short(), k_atom.short())
    return x, plan, reads[q_atom[:, :, None], k_atom[:, None, :]][:, None]


MASKS = {
    "none": lambda g: None,
    "keys": lambda g: torch.rand(2, 1, 1, 260, generator=g) < 0.7,
    "added": lambda g: torch.randn(300, 260, generator=g),
    "queries": lambda g: torch.rand(1, 4, 300, 1, generator=g) < 0.7,
}


@pytest.mark.parametrize("batch", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients(name, batch):
    x, plan, allowed = scattered(1, batch)
    mask = MASKS[name](torch.Generator().manual_seed(2))
    added = mask if mask is not None and mask.dtype != torch.bool else None
    if mask is not None and added is None:
        allowed = allowed & mask
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, x.v))
    twins = tuple(t.detach().double().requires_grad_() for t in inputs)
    out, lse = attend(*inputs, plan, mask=mask, impl="torch")
    expected, mass = softmax(*twins, allowed.expand(2, 4, 300, 260), 0.25, added)
    assert worst(out, expected) <= 2e-6 and worst(lse, mass) <= 2e-6
    found = torch.autograd.grad((out**2).sum(), inputs)
    truth = torch.autograd.grad((expected**2).sum(), twins)
    for mine, theirs in zip(found, truth, strict=True):
        assert worst(mine, theirs) <= 1e-5 * max(1.0, theirs.abs().max().item())


def test_what_is_computed_follows_the_groups():
    """One pair in eight is on; as the tokens lie, all blocks have some."""
    atoms = torch.arange(2048, dtype=torch.int16) % 8
    q = torch.zeros(1, 1, 2048, 8)
    choice = explain(q, q, GroupMask(atoms, atoms, 1 << torch.arange(8)))
    assert choice.impl == "torch" and choice.visited == 1 / 8 and choice.computed < 1 / 4


def test_auto_and_no_lse():
    x, plan, allowed = scattered(3, (1, 1))
    out, lse = attend(x.q, x.k, x.v, plan, need_lse=False)
    assert lse is None and worst(out, softmax(x.q, x.k, x.v, allowed, 0.25)[0]) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_probe(dtype):
    x, plan, allowed = scattered(4, (2, 1))
    q, k, v = (t.to(dtype) for t in (x.q, x.k, x.v))
    both = x.plan & plan
    _, lse = attend(q, k, v, both, impl="reference")
    found = probe(q, k, lse, [0, 17, 259], both)
    one = torch.eye(260).expand(2, 2, 260, 260)
    expected = softmax(q, k, one, allowed & x.dense, 0.25)[0][..., [0, 17, 259]]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert worst(found, expected) <= 2e-6 and (expected > 0.01).any()
    assert ((found == 0) == (expected == 0)).all()
