"""Words of groups in the kernels, forward and backward, against a float64 softmax over the pairs
that the rules allow, written out one by one.
"""

from __future__ import annotations

import random

import pytest
import torch
from attend_oracle import blocks_of, case, softmax, worst

from attn_control.kernels import attend
from attn_control.kernels.triton.prepare import prepared
from attn_control.kernels.triton.run import attend_triton
from attn_control.masks import GroupMask


def rules(seed, queries, keys, *, batch=(1, 1), atoms=(5, 7), sort=False):
    """A GroupMask, and bool (batch, 1, queries, keys) made pair by pair; query 0 has no key."""
    draw = random.Random(seed)
    reads = [[draw.random() < 0.4 for _ in range(atoms[1])] for _ in range(atoms[0])]
    reads[0] = [False] * atoms[1]
    # Runs of tokens, and tokens among them that are of another atom.
    sides = []
    for tokens, count, rows in zip((queries, keys), atoms, batch, strict=True):
        found = []
        for _ in range(rows):
            runs = [draw.randrange(count) for _ in range(tokens // 20 + 1)]
            row = [
                runs[i // 20] if draw.random() < 0.9 else draw.randrange(count)
                for i in range(tokens)
            ]
            found.append(sorted(row) if sort else row)
        sides.append(found)
    for row in sides[0]:
        row[0] = 0
    truth = [
        [[reads[a][b] for b in sides[1][r % batch[1]]] for a in sides[0][r % batch[0]]]
        for r in range(max(batch))
    ]
    q_atom, k_atom = (torch.tensor(side, dtype=torch.int16) for side in sides)
    words = [sum(1 << b for b, on in enumerate(row) if on) for row in reads]
    words = torch.tensor([w - (1 << 64) if w >> 63 else w for w in words])
    return GroupMask(q_atom, k_atom, words), torch.tensor(truth)[:, None]


def held(x, plan, allowed, **given):
    """Outputs, lse and gradients, within what float32 loses of the true ones."""
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, x.v))
    twins = tuple(t.detach().double().requires_grad_() for t in inputs)
    out, lse = attend_triton(*inputs, plan, None, 0.25, **given)
    expected, mass = softmax(*twins, allowed, 0.25)
    assert worst(out, expected) <= 3e-6 and worst(lse, mass) <= 3e-6
    g = torch.Generator().manual_seed(1)
    weight, slope = (torch.randn(t.shape, generator=g).double() for t in (out, lse))

    def gradients(out, lse, inputs):
        through = torch.where(lse.isinf(), 0.0, lse.double())
        return torch.autograd.grad((out * weight).sum() + (through * slope).sum(), inputs)

    for mine, theirs in zip(
        gradients(out, lse, inputs), gradients(expected, mass, twins), strict=True
    ):
        assert worst(mine, theirs) <= 5e-6 * max(1.0, theirs.abs().max().item())
    empty = ~allowed.any(-1).expand(lse.shape)
    assert empty.any() and not empty.all() and (out[empty] == 0).all() and lse[empty].isinf().all()


SHAPES = {
    "one for all": {},
    "by batch row": {"batch": (2, 2)},
    "queries by batch row": {"batch": (2, 1)},
    "keys by batch row": {"batch": (1, 2)},
    "sorted": {"sort": True},
    "64 atoms": {"atoms": (9, 64)},
    "40 atoms": {"atoms": (40, 40)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_alone(shape):
    """Sorted by atom inside; two batch rows, grouped keys, ragged tails."""
    x = case(3, batch=2, heads=2, kv_heads=1, dim=8, q_regions=(70,), k_regions=(140,))
    plan, allowed = rules(5, 70, 140, **SHAPES[shape])
    held(x, plan, allowed.expand(2, 1, 70, 140))


def test_each_bit_is_its_own():
    """Query i reads key i alone, of 64, forward and backward."""
    atoms = torch.arange(64, dtype=torch.int16)
    plan = GroupMask(atoms, atoms, torch.ones(64, dtype=torch.int64) << torch.arange(64))
    q, k, v = (torch.randn(1, 1, 64, 8) for _ in range(3))
    v.requires_grad_()
    out, lse = attend_triton(q, k, v, plan, None, 0.25)
    assert torch.equal(out, v)
    assert worst(lse, (q.double() * k.double()).sum(-1) * 0.25) <= 2e-6
    weight = torch.randn(1, 1, 64, 8)
    (found,) = torch.autograd.grad((out * weight).sum(), v)
    assert worst(found, weight) <= 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_groups_within_blocks(seed):
    """Both have to allow a pair; blocks, regions, heads and sharing are drawn."""
    draw = random.Random(seed)
    kv_heads, group, batch = draw.randint(1, 2), draw.randint(1, 2), draw.randint(1, 2)
    x = case(
        seed,
        batch=batch,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=draw.choice([8, 16, 24]),
        q_regions=(draw.randint(50, 90), draw.randint(1, 30)),
        k_regions=(draw.randint(50, 90), draw.randint(1, 30)),
        block=(draw.choice([24, 32, 64]), draw.choice([32, 64])),
        shared=(draw.random() < 0.5, draw.random() < 0.5),
        density=0.9,
    )
    rows = draw.randint(1, batch), draw.randint(1, batch)
    plan, allowed = rules(seed, x.q.shape[2], x.k.shape[2], batch=rows, atoms=(4, 36))
    held(x, x.plan & plan, allowed & x.dense)


def test_blocks_in_an_order_and_groups_of_tokens():
    """Blocks speak of places, atoms go with the tokens."""
    x = case(4, heads=2, kv_heads=1, q_regions=(70,), k_regions=(90,), shared=(True, False))
    plan, allowed = rules(4, 70, 90, sort=True)
    g = torch.Generator().manual_seed(3)
    q_order = torch.stack([torch.randperm(70, generator=g) for _ in range(2)]).int()[None]
    k_order = torch.randperm(90, generator=g).int()[None, None]
    dense = torch.zeros_like(x.dense)
    for head in range(2):
        dense[0, head, q_order[0, head].long()[:, None], k_order[0, 0].long()] = x.dense[0, head]
    held(x, x.plan & plan, dense & allowed, q_order=q_order, k_order=k_order)


def test_an_order_changes_nothing_where_no_block_speaks_of_places():
    x = case(4, q_regions=(70,), k_regions=(90,))
    plan, _ = rules(4, 70, 90)
    order = torch.randperm(70).int()[None, None]
    found = [attend_triton(x.q, x.k, x.v, plan, None, 0.3, q_order=o)[0] for o in (None, order)]
    assert torch.equal(*found)


def test_the_models_own_mask_too():
    x = case(6, q_regions=(70,), k_regions=(90,))
    plan, allowed = rules(6, 70, 90)
    added = torch.randn(1, 2, 70, 90, generator=torch.Generator().manual_seed(4))
    out, lse = attend(x.q, x.k, x.v, plan, mask=added, impl="triton")
    expected, mass = softmax(x.q, x.k, x.v, allowed, 0.25, added)
    assert worst(out, expected) <= 3e-6 and worst(lse, mass) <= 3e-6


@pytest.mark.parametrize("impl", ["reference", "torch", "triton", "auto"])
def test_executors_agree(impl):
    x = case(7, batch=2, heads=2, kv_heads=1, q_regions=(70,), k_regions=(140,), density=0.9)
    plan, allowed = rules(7, 70, 140, batch=(2, 1))
    for given, on in ((plan, allowed), (x.plan & plan, allowed & x.dense)):
        out, lse = attend(x.q, x.k, x.v, given, impl=impl)
        expected, mass = softmax(x.q, x.k, x.v, on, 0.25)
        assert worst(out, expected) <= 3e-6 and worst(lse, mass) <= 3e-6


def test_sorted_tokens_fill_whole_tiles():
    """Two regions, each for itself, in alternating tokens: as they lie all tiles are cut."""
    atoms = torch.arange(512, dtype=torch.int16) % 2
    plan = GroupMask(atoms, atoms, torch.tensor([1, 2]))
    q = torch.zeros(1, 1, 512, 16)
    made = prepared(plan, q, 1, needs_grad=True)
    for at in range(0, 21, 7):
        whole, cut = made.lists[at + 3], made.lists[at + 5]
        visited = len(whole) + len(cut)
        assert len(cut) == 0 and len(whole) == visited > 0
    assert made.q_order is not None and made.q_order.flatten()[:3].tolist() == [0, 2, 4]
    within = blocks_of(torch.ones(1, 1, 512, 512, dtype=torch.bool), 64, 64) & plan
    assert len(prepared(within, q, 1, needs_grad=False).lists[3]) == 0
