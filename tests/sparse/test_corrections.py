"""Corrections: exact at refreshes, and afterwards what their formulas say, in float64."""

from __future__ import annotations

import pytest
import torch
from sparse_shared import at, attend, call_of, random_mask, softmax_by_hand, softmax_of, tensors

from attn_control.kernels.corrections import CORRECTIONS
from attn_control.masks import BlockMask
from attn_control.policy import REFRESH, SHARED, SPARSE, StepPolicy

MASK = random_mask()
ON = MASK.to_dense()
EVERY = torch.ones_like(ON)


def by_hand(name, first, now, levels=1, gain=0.0):
    """The output `levels` after a refresh at q, k, v ``first``."""
    dense, lse = softmax_by_hand(*first, EVERY)
    masked, masked_lse = softmax_by_hand(*first, ON)
    fresh, fresh_lse = softmax_by_hand(*now, ON)
    if name == "none":
        return fresh
    if name == "share":
        return dense
    if name == "residual":
        return fresh + dense - masked
    rho = (masked_lse - lse).exp()[..., None]
    if name == "rho":
        return (rho + gain * (levels - 1)).clamp(max=1) * fresh + dense - rho * masked
    # The keys that were left out, as one more group in the softmax.
    left = softmax_by_hand(*first, ~ON)
    weight = torch.stack([fresh_lse, left[1]], -1).softmax(-1)
    return weight[..., :1] * fresh + weight[..., 1:] * left[0]


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_refresh_is_the_stock_output_and_the_next_calls_are_the_formula(name):
    softmax = softmax_of(MASK, name, gain=0.04)
    given = [tensors(seed=n) for n in range(5)]
    for level, qkv in enumerate(given):
        call = call_of(*qkv)
        out = attend(softmax, at(level), call)
        if level in (0, 3):  # every third
            assert torch.equal(out, call.original())
            continue
        first = given[level // 3 * 3]
        expected = by_hand(name, first, qkv, level % 3, gain=0.04)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    outcomes = [row.outcome for row in softmax.ledger.rows]
    between = SHARED if name == "share" else SPARSE
    assert outcomes == [REFRESH, between, between, REFRESH, between]


@pytest.mark.parametrize("name", ["share", "residual", "rho", "lse"])
def test_where_nothing_changes_a_corrected_call_is_the_dense_one(name):
    softmax, call = softmax_of(MASK, name), call_of(*tensors())
    first = attend(softmax, at(0), call)
    torch.testing.assert_close(attend(softmax, at(1), call), first, rtol=1e-5, atol=1e-6)


def test_lse_is_exact_when_only_keys_that_are_read_change():
    """Which no other correction is: the softmax over all keys, old and new, comes out."""
    q, k, v = tensors(heads=1)
    mask = random_mask(heads=1)
    on = mask.to_dense()[0, 0]
    block = slice(0, 16)  # queries whose read keys change; others may read them too
    softmax = softmax_of(mask, "lse", heads=(0,))
    attend(softmax, at(0), call_of(q, k, v))
    k2, v2 = k.clone(), v.clone()
    read = on[0]
    k2[..., read, :] += 1.0
    v2[..., read, :] -= 0.5
    got = attend(softmax, at(1), call_of(q, k2, v2))[:, :, block]
    expected, _ = softmax_by_hand(q[:, :, block], k2, v2, torch.ones(16, 96))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_mask_that_leaves_nothing_out_corrects_nothing():
    full = BlockMask.from_table(torch.ones(1, 6, 6, dtype=torch.bool), block_size=16, q_len=96)
    for name in ("residual", "rho", "lse"):
        softmax = softmax_of(full, name, gain=0.04)
        attend(softmax, at(0), call_of(*tensors(seed=0)))
        now = call_of(*tensors(seed=1))
        torch.testing.assert_close(
            attend(softmax, at(1), now), now.original(), rtol=1e-5, atol=1e-5
        )


def test_work_is_booked_in_dense_attentions():
    density = float(ON.double().mean())
    for name, refresh in (("none", 1.0), ("share", 1.0), ("residual", 1 + density),
                          ("rho", 1.5 + density), ("lse", 1.5 + density)):  # fmt: skip
        softmax = softmax_of(MASK, name)
        for level in (0, 1):
            attend(softmax, at(level), call_of(*tensors()))
        first, second = softmax.ledger.rows
        assert first.density == 1 and first.computed == pytest.approx(refresh)
        between = 0.0 if name == "share" else density
        assert second.density == second.computed == pytest.approx(between)


def test_kept_tensors_carry_no_graph():
    softmax = softmax_of(MASK, "residual")
    q, k, v = (x.requires_grad_() for x in tensors())
    attend(softmax, at(0), call_of(q, k, v))
    out = attend(softmax, at(1), call_of(q, k, v))
    grads = torch.autograd.grad(out.sum(), [q, v])
    assert all(bool(grad.any()) for grad in grads)
    (kept,) = softmax.memory._kept.values()
    assert not any(tensor.requires_grad for tensor in kept.tensors.values())


def test_drift_refreshes_when_attention_turns_away():
    policy = StepPolicy(first=0, refresh=None, drift=0.2)
    softmax = softmax_of(MASK, "residual", policy)
    q, k, v = tensors()
    near, far = call_of(q * 1.01, k, v), call_of(-q, -k, v)
    outcomes = []
    for level, call in enumerate([call_of(q, k, v), near, near, far, far]):
        attend(softmax, at(level), call)
        outcomes.append(softmax.ledger.rows[-1].outcome)
    assert outcomes == [REFRESH, SPARSE, SPARSE, REFRESH, SPARSE]


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_under_autocast_types_are_those_of_torchs_own_attention(correction):
    """As without it where everything was cast before: at a refresh and after it."""
    q, k, v = (x.float() for x in tensors())
    v = v.bfloat16()
    mixed, cast = call_of(q, k, v), call_of(q.bfloat16(), k.bfloat16(), v)
    under, plain = (softmax_of(random_mask(), correction) for _ in range(2))
    for level in (0, 1):
        with torch.autocast("cpu", torch.bfloat16):
            got = attend(under, at(level), mixed)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, attend(plain, at(level), cast))
