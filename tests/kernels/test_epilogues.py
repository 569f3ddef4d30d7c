"""Blend and Gain against explicit maps in float64, on random regions, with grouped keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_oracle import dense

from attn_control.call import Call
from attn_control.kernels import Blend, Gain, Region

B, H, N, D = 3, 4, 9, 8


def _call(kv_heads: int = H, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, N, D, generator=g).to(dtype)
    k, v = (torch.randn(B, kv_heads, N, D, generator=g).to(dtype) for _ in range(2))

    def original() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=kv_heads < H)

    return Call(None, "main", q, k, v, None, None, original)


def _maps(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention map and values of every head, grouped keys spread by hand."""
    group = H // call.k.shape[1]
    k = torch.stack([call.k[:, head // group] for head in range(H)], dim=1)
    v = torch.stack([call.v[:, head // group] for head in range(H)], dim=1)
    return dense(call.q, k), v.double()


@st.composite
def regions(draw) -> Region:
    heads = tuple(sorted(draw(st.sets(st.integers(0, H - 1), min_size=1))))
    first = draw(st.integers(0, B - 1))
    rows = draw(st.none() | st.just((first, draw(st.integers(first + 1, B)))))
    cuts = sorted(draw(st.sets(st.integers(0, N), min_size=2, max_size=4)))
    spans = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    return Region(rows, heads, draw(st.sampled_from([spans, ((0, None),)])))


def _members(region: Region) -> list[tuple[int, int, int]]:
    """(row, head, token) of the region, one by one."""
    return [
        (row, head, token)
        for row in range(*(region.rows or (0, B)))
        for head in region.heads
        for start, stop in region.spans
        for token in range(start, N if stop is None else stop)
    ]


strengths = st.lists(st.floats(0, 1, width=32), min_size=H, max_size=H)


@settings(deadline=None, max_examples=60)
@given(regions(), strengths, st.sampled_from([1, 2, 4]), st.integers(0, 5))
def test_blend_is_attention_blended_with_the_identity_inside_the_region_only(
    region, strength, kv_heads, seed
):
    call = _call(kv_heads, seed=seed)
    plain = call.original()
    u = torch.tensor(strength[: len(region.heads)])
    got = Blend(region, u)(plain, call)
    maps, v = _maps(call)
    outside = torch.ones(B, H, N, dtype=torch.bool)
    for row, head, token in _members(region):
        strength_here = float(u[region.heads.index(head)])
        weights = (1 - strength_here) * maps[row, head, token]
        weights[token] += strength_here
        assert (got[row, head, token].double() - weights @ v[row, head]).abs().max() <= 1e-5
        outside[row, head, token] = False
    assert torch.equal(got[outside], plain[outside])


@settings(deadline=None, max_examples=40)
@given(regions(), st.lists(st.floats(-4, 4, width=32), min_size=H, max_size=H))
def test_gain_multiplies_the_region_only(region, gains):
    call = _call()
    plain = call.original()
    gain = torch.tensor(gains[: len(region.heads)])
    got = Gain(region, gain)(plain, call)
    outside = torch.ones(B, H, N, dtype=torch.bool)
    for row, head, token in _members(region):
        factor = float(gain[region.heads.index(head)])
        expected = factor * plain[row, head, token].double()
        assert (got[row, head, token].double() - expected).abs().max() <= 1e-5
        outside[row, head, token] = False
    assert torch.equal(got[outside], plain[outside])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_at_u_1_a_grouped_head_returns_its_groups_values(kv_heads):
    call = _call(kv_heads)
    got = Blend(Region(None, (0, 1, 2, 3), ((0, None),)), torch.ones(4))(call.original(), call)
    assert torch.equal(got, call.v.repeat_interleave(H // kv_heads, dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precision_is_kept_and_the_blend_adds_at_most_one_rounding(dtype):
    call = _call(dtype=dtype)
    plain = call.original()
    got = Blend(Region(None, (0, 2), ((0, None),)), torch.tensor([0.3, 0.8]))(plain, call)
    assert got.dtype == dtype
    for index, (head, u) in enumerate(((0, 0.3), (2, 0.8))):
        u = float(torch.tensor([0.3, 0.8])[index])
        exact = (1 - u) * plain[:, head].double() + u * call.v[:, head].double()
        allowed = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-3)
        if dtype == torch.float64:
            allowed = allowed * 8
        assert (
            (got[:, head].double() - exact).abs() <= allowed + 1e-6 * (dtype == torch.float32)
        ).all()


def test_the_input_is_never_written_to():
    call = _call()
    plain = call.original()
    kept = plain.clone()
    region = Region(None, (1,), ((0, None),))
    Blend(region, torch.ones(1))(plain, call)
    Gain(region, torch.zeros(1))(plain, call)
    assert torch.equal(plain, kept)


def test_strengths_are_read_when_it_runs_so_that_they_can_change_in_place():
    call = _call()
    plain = call.original()
    u = torch.zeros(1)
    blend = Blend(Region(None, (1,), ((0, None),)), u)
    assert torch.equal(blend(plain, call)[:, 1], plain[:, 1])
    u.fill_(1.0)
    assert torch.equal(blend(plain, call)[:, 1], call.v[:, 1])


@pytest.mark.parametrize(
    ("heads", "runs"),
    [((0,), [(0, 1)]), ((0, 1, 2), [(0, 3)]), ((0, 2, 3, 7), [(0, 1), (2, 4), (7, 8)]), ((), [])],
)
def test_heads_are_merged_into_runs(heads, runs):
    assert Region(None, heads, ()).runs() == runs


def test_gradients_are_those_of_the_explicit_formula():
    call = _call()
    for tensor in (call.q, call.k, call.v):
        tensor.requires_grad_()
    region = Region((1, 3), (0, 3), ((2, 7),))
    target = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(9))
    out = Blend(region, torch.tensor([0.4, 0.9]))(call.original(), call)
    got = torch.autograd.grad((out * target).sum(), (call.q, call.k, call.v))

    leaves = [t.detach().double().requires_grad_() for t in (call.q, call.k, call.v)]
    q, k, v = leaves
    a = (q @ k.mT * D**-0.5).softmax(-1)
    u = torch.zeros(B, H, N, 1, dtype=torch.float64)
    u[1:3, 0, 2:7] = float(torch.tensor(0.4))
    u[1:3, 3, 2:7] = float(torch.tensor(0.9))
    explicit = ((1 - u) * a + u * torch.eye(N, dtype=torch.float64)) @ v
    expected = torch.autograd.grad((explicit * target).sum(), leaves)
    for mine, other in zip(got, expected, strict=True):
        assert (mine.double() - other).abs().max() < 1e-5
