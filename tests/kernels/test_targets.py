"""Closed forms of perturbed attention against dense float64 maps."""

from __future__ import annotations

import dense
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_control.call import Call
from attn_control.kernels import PATHS, TARGETS, Blend, Blur, Gates, Region, gaussian

HEADS, IMAGE, TEXT, DIM = 3, 9, 4, 5


def _call(seed: int, order: str = "image first", mask: torch.Tensor | None = None) -> tuple:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, HEADS, IMAGE + TEXT, DIM, generator=g) for _ in range(3))
    image = slice(0, IMAGE) if order == "image first" else slice(TEXT, TEXT + IMAGE)
    text = slice(IMAGE, IMAGE + TEXT) if order == "image first" else slice(0, TEXT)

    def original() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.4)

    return Call(None, "main", q, k, v, mask, 0.4, original), image, text


def _blend(call, image, text, *, op="identity", u=1.0, path="linear", heads=(0, 2), span="image"):
    spans = ((image.start, image.stop),) if span == "image" else ((0, None),)
    strength = torch.full((len(heads),), u)
    region = Region(None, heads, spans)
    blend = Blend(region, strength, TARGETS[op], path, ((text.start, text.stop),))
    return blend(call.original(), call)


@pytest.mark.parametrize("order", ["image first", "text first"])
@pytest.mark.parametrize("op", list(TARGETS))
@given(seed=st.integers(0, 2**16), u=st.floats(-1, 1, width=32))
@settings(max_examples=12, deadline=None)
def test_every_op_equals_its_dense_map_on_image_queries(op, order, seed, u):
    call, image, text = _call(seed, order)
    a = dense.attention_map(call.q, call.k, 0.4)
    if op == "mean_query":  # the mean is over the perturbed queries
        q = call.q.clone()
        q[:, :, image] = q[:, :, image].mean(2, keepdim=True)
        target = dense.attention_map(q, call.k, 0.4)
    else:
        target = dense.perturbed_map(op, a, call.q, call.k, 0.4, image, text)
    want = ((1 - u) * a + u * target) @ call.v.double()
    got = _blend(call, image, text, op=op, u=u)
    plain = call.original()
    for head in (0, 2):
        torch.testing.assert_close(
            got[:, head, image].double(), want[:, head, image], rtol=0, atol=1e-5
        )
        assert torch.equal(got[:, head, text], plain[:, head, text])
    assert torch.equal(got[:, 1], plain[:, 1])


@pytest.mark.parametrize("op", ["identity", "uniform", "mean_query"])
def test_all_tokens(op):
    call, image, text = _call(1)
    a = dense.attention_map(call.q, call.k, 0.4)
    target = dense.perturbed_map(op, a, call.q, call.k, 0.4, image, text)
    got = _blend(call, image, text, op=op, u=0.3, span="all")
    want = (0.7 * a + 0.3 * target) @ call.v.double()
    torch.testing.assert_close(got[:, [0, 2]].double(), want[:, [0, 2]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("path, rows", [("slerp", dense.slerp_rows), ("chord", dense.chord_rows)])
@given(seed=st.integers(0, 2**16), u=st.floats(0, 1, width=32))
@settings(max_examples=15, deadline=None)
def test_paths_equal_their_dense_rows(path, rows, seed, u):
    call, image, text = _call(seed)
    want = rows(dense.attention_map(call.q, call.k, 0.4), u) @ call.v.double()
    got = _blend(call, image, text, u=u, path=path, span="all")
    torch.testing.assert_close(got[:, [0, 2]].double(), want[:, [0, 2]], rtol=0, atol=2e-5)


def test_paths_differ_but_share_their_ends():
    call, image, text = _call(3)
    mid = {path: _blend(call, image, text, u=0.3, path=path) for path in PATHS}
    assert not torch.allclose(mid["linear"], mid["slerp"], atol=1e-3)
    assert not torch.allclose(mid["chord"], mid["slerp"], atol=1e-3)
    for u in (0.0, 1.0):
        ends = [_blend(call, image, text, u=u, path=path) for path in PATHS]
        for end in ends[1:]:
            torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 1, 13), (1, 1, 1, 13), (2, 3, 1, 13), (2, 13)])
@pytest.mark.parametrize("op", list(TARGETS))
def test_key_masks_stay_in_force(op, shape):
    """A key that the model masks is never seen, whatever the op."""
    keep = torch.ones(shape, dtype=torch.bool)
    keep[..., 11:] = False
    four = keep[:, None, None] if keep.ndim == 2 else keep
    call, image, text = _call(5, mask=four)
    call.mask = keep
    first = _blend(call, image, text, op=op)
    call.k[:, :, 11:] = 100.0
    call.v[:, :, 11:] = 100.0
    second = _blend(call, image, text, op=op)
    torch.testing.assert_close(first[:, :, image], second[:, :, image], rtol=0, atol=1e-6)


def test_a_negative_strength_sharpens_and_the_cap_holds():
    call, image, text = _call(7)
    plain = call.original()
    region = Region(None, (1,), ((0, None),))
    free = Blend(region, torch.tensor([-1.0]))(call.original(), call)
    torch.testing.assert_close(free[:, 1], 2 * plain[:, 1] - call.v[:, 1], rtol=0, atol=1e-5)
    capped = Blend(region, torch.tensor([-1.0]), cap=1.5)(call.original(), call)
    norms = capped[:, 1].norm(dim=-1) / plain[:, 1].norm(dim=-1)
    assert (
        norms.max() <= 1.5 + 1e-5
        and (free[:, 1].norm(dim=-1) / plain[:, 1].norm(dim=-1)).max() > 1.6
    )
    held = norms < 1.5 - 1e-4  # where the cap does not bite nothing changes
    assert held.any() and torch.allclose(capped[:, 1][held], free[:, 1][held], atol=1e-6)


def test_gates_reach_their_rows_heads_and_gradients():
    call, *_ = _call(9)
    gates = torch.rand(2, 4, HEADS, requires_grad=True)  # rows, layers, heads
    region = Region(None, (0, 1, 2), ((0, None),))
    out = Blend(region, Gates(gates, 3, 0, 3))(call.original(), call)
    plain = call.original()
    for row in range(2):
        for head in range(HEADS):
            u = gates[row, 3, head]
            want = (1 - u) * plain[row, head] + u * call.v[row, head]
            torch.testing.assert_close(out[row, head], want, rtol=0, atol=1e-5)
    out.square().sum().backward()
    assert gates.grad[:, 3].abs().min() > 0 and gates.grad[:, :3].abs().max() == 0


@pytest.mark.parametrize("sigma", [0.5, 2.0])
@pytest.mark.parametrize("frames", [1, 2])
def test_blur_equals_blurring_each_picture_in_space(sigma, frames):
    height, width = 3, 4
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, frames * height * width, DIM, generator=g) for _ in range(3))
    call = Call(None, "main", q, k, v, None, None, lambda: torch.zeros_like(q))
    target = Blur(frames, gaussian(height, sigma), gaussian(width, sigma))
    got = Blend(Region(None, (0, 1), ((0, None),)), torch.ones(2), target)(call.original(), call)
    blurred = torch.zeros_like(q, dtype=torch.float64)
    for i in range(q.shape[2]):  # token by token, weight by weight
        f, y, x = i // (height * width), i // width % height, i % width
        total = 0.0
        for j in range(height * width):
            dy, dx = y - j // width, x - j % width
            column = sum(
                pow(2.718281828459045, -((y - n) ** 2) / (2 * sigma**2)) for n in range(height)
            )
            row = sum(
                pow(2.718281828459045, -((x - n) ** 2) / (2 * sigma**2)) for n in range(width)
            )
            weight = pow(2.718281828459045, -(dy**2 + dx**2) / (2 * sigma**2)) / (column * row)
            blurred[:, :, i] += weight * q[:, :, f * height * width + j].double()
            total += weight
        assert abs(total - 1) < 1e-9
    want = dense.attention_map(blurred, k, DIM**-0.5) @ v.double()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
