"""What the forward kernel does beside attention: going on from another one, and SoftPAG."""

from __future__ import annotations

import pytest
import torch
from attend_oracle import case, softmax, worst

from attn_control.errors import AttnControlError
from attn_control.kernels.triton.op import block_sparse_then
from attn_control.kernels.triton.prepare import prepared
from attn_control.kernels.triton.run import attend_triton

SHAPE = {"heads": 4, "kv_heads": 2, "batch": 2, "q_regions": (70,), "k_regions": (90,), "dim": 8}


def two_sets(seed):
    """A case, other keys and values, and who reads those: bool (2, 4, 70, 40). Of the queries some
    read of neither, and some of either alone.
    """
    x = case(seed, **SHAPE)
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, 2, 40, 8, generator=g) for _ in range(2))
    reads = torch.rand(2, 4, 70, 40, generator=g) < 0.5
    reads[..., :5, :] = False
    reads[..., 40:, :] = False
    empty = ~x.dense.any(-1).expand(2, 4, 70), ~reads.any(-1)
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert ((empty[0] == a) & (empty[1] == b)).any()
    return x, k, v, reads


def over_both(x, k, v, reads):
    """float64 softmax over both sets of keys at once."""
    keys, values = torch.cat([x.k, k], 2), torch.cat([x.v, v], 2)
    return softmax(x.q, keys, values, torch.cat([x.dense.expand(2, 4, 70, 90), reads], -1), 0.3)


def test_going_on_from_other_keys():
    x, k, v, reads = two_sets(1)
    onto = tuple(t.float() for t in softmax(x.q, k, v, reads, 0.3))
    onto[0][~reads.any(-1)] = float("nan")  # the output of a query without keys is not looked at
    out, lse = attend_triton(x.q, x.k, x.v, x.plan, None, 0.3, onto=onto)
    expected, mass = over_both(x, k, v, reads)
    assert worst(out, expected) <= 3e-6 and worst(lse, mass) <= 3e-6


def test_two_of_our_own_attentions_and_their_gradients():
    x, k, v, _ = two_sets(2)
    every = torch.ones(2, 4, 70, 40, dtype=torch.bool)
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, x.v, k, v))
    onto = attend_triton(x.q, k, v, None, None, 0.3)
    out, lse = attend_triton(x.q, x.k, x.v, x.plan, None, 0.3, onto=onto)
    twins = [t.detach().double().requires_grad_() for t in inputs]
    x.q, x.k, x.v = twins[:3]
    expected, mass = over_both(x, *twins[3:], every)
    assert worst(out, expected) <= 3e-6 and worst(lse, mass) <= 3e-6
    g = torch.Generator().manual_seed(1)
    weight, slope = (torch.randn(t.shape, generator=g).double() for t in (out, lse))
    found = torch.autograd.grad((out * weight).sum() + (lse * slope).sum(), inputs)
    truth = torch.autograd.grad((expected * weight).sum() + (mass * slope).sum(), twins)
    for mine, theirs in zip(found, truth, strict=True):
        assert worst(mine, theirs) <= 5e-6 * max(1.0, theirs.abs().max().item())


def softened(seed):
    x = case(seed, **{**SHAPE, "k_regions": (70,)})
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(2, 4, 70, generator=g) * 2 - 0.5  # sharpened, softened, and beyond
    u[0, 0], u[0, 1], u[1, 3, :9] = 0.0, 1.0, 0.0
    return x, u


def truth_of(q, k, v, u, allowed):
    out, lse = softmax(q, k, v, allowed, 0.3)
    own = torch.stack([v[:, head // 2] for head in range(4)], 1).double()
    return out + u.double()[..., None] * (own - out), lse


@pytest.mark.parametrize("axes", [(), (2,), (0,), (0, 1, 2)])
def test_softpag(axes):
    """Strengths for each row, head and token, or shared along some axes; orders of rows too."""
    x, u = softened(3)
    for axis in axes:
        u = u.narrow(axis, 0, 1)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1)).int()[None, None]
    # One order for both sides: the mask's place (i, j) is the tokens (order[i], order[j]).
    dense = torch.zeros_like(x.dense)
    places = order.flatten().long()
    dense[:, :, places[:, None], places] = x.dense
    orders = {"q_order": order, "k_order": order} if axes else {}
    out, lse = attend_triton(x.q, x.k, x.v, x.plan, None, 0.3, u=u, **orders)
    allowed = dense if axes else x.dense
    expected, mass = truth_of(x.q, x.k, x.v, u.expand(2, 4, 70), allowed)
    assert worst(out, expected) <= 4e-6 and worst(lse, mass) <= 3e-6


def test_softpag_is_exact_at_both_ends():
    x, u = softened(4)
    out, _ = attend_triton(x.q, x.k, x.v, x.plan, None, 0.3, u=u)
    plain, _ = attend_triton(x.q, x.k, x.v, x.plan, None, 0.3)
    assert torch.equal(out[0, 0], plain[0, 0]) and torch.equal(out[1, 3, :9], plain[1, 3, :9])
    assert torch.equal(out[0, 1], x.v[0, 0])


def test_gradients_of_softpag_with_other_keys():
    """u too, which a search of heads asks for."""
    x, u = softened(5)
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, x.v, u))
    out, _ = attend_triton(*inputs[:3], x.plan, None, 0.3, u=u)
    twins = tuple(t.detach().double().requires_grad_() for t in inputs)
    expected, _ = truth_of(*twins, x.dense)
    assert worst(out, expected) <= 4e-6
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    found = torch.autograd.grad((out * weight).sum(), inputs)
    truth = torch.autograd.grad((expected * weight).sum(), twins)
    for mine, theirs in zip(found, truth, strict=True):
        assert worst(mine, theirs) <= 5e-6 * max(1.0, theirs.abs().max().item())


def test_the_kernel_and_the_torch_operations_agree():
    """With both at once: mixed first, softened then."""
    x, u = softened(6)
    onto = torch.randn(2, 4, 70, 8), torch.randn(2, 4, 70)
    onto[1][:, :, 11] = float("-inf")
    plain = attend_triton(x.q, x.k, x.v, x.plan, None, 0.3, onto=onto, u=u)
    x.v.requires_grad_()
    with_gradients = attend_triton(x.q, x.k, x.v, x.plan, None, 0.3, onto=onto, u=u)
    assert not plain[0].requires_grad and with_gradients[0].requires_grad
    for a, b in zip(plain, with_gradients, strict=True):
        assert worst(a, b) <= 2e-6


def test_no_keys_of_our_own():
    onto = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5)
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 0, 8)
    out, lse = attend_triton(q, k, k, None, None, 1.0, onto=onto)
    assert worst(out, onto[0]) <= 1e-6 and worst(lse, onto[1]) <= 1e-6


def test_the_operator_keeps_its_promises():
    x = case(7, heads=1, kv_heads=1, dim=8, q_regions=(40,), k_regions=(40,))
    made = prepared(x.plan, x.q, 1, needs_grad=False)
    then = [torch.randn(1, 1, 40, 8), torch.randn(1, 1, 40), torch.rand(1, 1, 1)]
    given = x.q, x.k, x.v, made.lists, made.numbers, 0.25, [None] * 6, then
    torch.library.opcheck(block_sparse_then, given)


WRONG = {
    r"onto\[0\] as float32 \(2, 4, 70, 8\)": dict(onto=(torch.zeros(2, 4, 70, 9),) * 2),
    r"onto\[1\] as float32 \(2, 4, 70\)": dict(
        onto=(torch.zeros(2, 4, 70, 8), torch.zeros(2, 4, 70).double())
    ),
    r"u as float32 \(2, 4, 70\), 1 where shared": dict(u=torch.zeros(4)),
    "got 70 queries and 90 keys": dict(u=torch.zeros(1, 1, 1)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_refused(message):
    keys = 90 if "90" in message else 70
    q, k = torch.zeros(2, 4, 70, 8), torch.zeros(2, 2, keys, 8)
    with pytest.raises(AttnControlError, match=message):
        attend_triton(q, k, k, None, None, 1.0, **WRONG[message])
