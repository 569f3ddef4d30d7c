"""Kernels made for a kind of call: masks of whole tiles alone, tokens far apart."""

from __future__ import annotations

import math

import pytest
import torch
from attend_oracle import Case, blocks_of, case, softmax, worst

from attn_control.kernels.triton import launch, prepare
from attn_control.kernels.triton.launch import Extras, Walk, arguments
from attn_control.kernels.triton.lists import lower
from attn_control.kernels.triton.op import walks
from attn_control.kernels.triton.prepare import everything, prepared
from attn_control.kernels.triton.run import attend_triton
from attn_control.kernels.triton.tune import Tile, Tiles, tiles


def constants(x, tile=None, v=None, by_keys=False, **extras):
    tile = tile or Tile(32, 32, 4, 1)
    walk = Walk(lower(x.plan, tile.n), 1, 1, tile)
    v = x.v if v is None else v
    return arguments(walk, Extras(**extras), x.q, x.k, v, (x.q,), (v,), 1.0, by_keys=by_keys)[2]


def of_whole_blocks(keys, dim=16):
    """A case whose blocks of 32 are on or off as a whole; one row of blocks is empty."""
    x = case(1, block=(32, 32), q_regions=(96,), k_regions=(keys,), batch=1, dim=dim)
    table = torch.rand(1, 2, 3, -(-keys // 32), generator=torch.Generator().manual_seed(2)) < 0.6
    table[:, :, 1] = False
    dense = table.repeat_interleave(32, 2).repeat_interleave(32, 3)[..., :keys]
    return Case(x.q, x.k, x.v, dense, blocks_of(dense, 32, 32))


def held(x, v):
    """Output, lse and gradients, to those of a softmax in float64."""
    inputs = [t.detach().requires_grad_() for t in (x.q, x.k, v)]
    twins = [t.detach().double().requires_grad_() for t in inputs]
    out, lse = attend_triton(*inputs, x.plan, None, 0.25)
    expected, mass = softmax(*twins, x.dense, 0.25)
    assert worst(out, expected) <= 2e-6 and worst(lse, mass) <= 2e-6
    way = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((out * way).sum(), inputs)
    truth = torch.autograd.grad((expected * way).sum(), twins)
    assert all(
        worst(a, b) <= 5e-6 * max(1.0, b.abs().max()) for a, b in zip(found, truth, strict=True)
    )


@pytest.mark.parametrize(("keys", "cuts"), [(128, 0), (120, 1)])
def test_masks_of_whole_tiles(keys, cuts):
    """They have no cut tile, and a kernel without a loop over those; a ragged tail is cut."""
    x = of_whole_blocks(keys)
    assert constants(x)["CUTS"] == cuts
    held(x, x.v)


def apart(x, places):
    """The same numbers, tokens so far apart that the last lies ``places`` from the first. Memory
    between them is never touched, so that there is none.
    """
    step = -(-places // (x.shape[2] - 1))
    room = torch.empty(step * (x.shape[2] - 1) + x.shape[1] * x.shape[3], dtype=x.dtype)
    view = room.as_strided(x.shape, (0, x.shape[3], step, 1))
    return view.copy_(x.detach())


def test_tokens_further_apart_than_32_bits_reach():
    x = case(3, dtype=torch.float16, q_regions=(40,), k_regions=(50,), dim=16)
    expected = attend_triton(x.q, x.k, x.v, x.plan, None, 0.25)
    far = [apart(t, 1 << 31) for t in (x.q, x.k, x.v)]
    assert all(launch.far(t) for t in far) and not any(map(launch.far, (x.q, x.k, x.v)))
    for number in range(3):
        inputs = [x.q, x.k, x.v]
        inputs[number] = far[number]
        found = attend_triton(*inputs, x.plan, None, 0.25)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_gradients_of_tokens_that_far_apart():
    x = case(4, dtype=torch.float16, q_regions=(40,), k_regions=(50,), dim=16)
    found = []
    for k in (x.k, apart(x.k, 1 << 31)):
        inputs = [t.detach().requires_grad_() for t in (x.q, k, x.v)]
        out, lse = attend_triton(*inputs, x.plan, None, 0.25)
        loss = out.float().sum() + torch.where(lse.isinf(), 0.0, lse).sum()
        found.append(torch.autograd.grad(loss, inputs))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_where_32_bits_end():
    """Reckoned from the first token of a head: neither heads nor batch rows count."""

    def at(row, tokens=8):
        steps = (1 << 40, 1 << 35, row, 1)
        return torch.empty_strided((2, 2, tokens, 4), steps, device="meta")

    edge = math.ceil((1 << 31) / 8)
    assert launch.far(at(edge)) and not launch.far(at(edge - 1))


def test_beside_a_model_s_mask_steps_are_narrower():
    """Its piece is held, too; what it computes stays the same."""
    x = case(4, block=(128, 128), q_regions=(300,), k_regions=(300,), batch=1)
    half = x.q.half(), x.k.half(), x.v.half()
    widths = {}
    for biased in (False, True):
        made = prepared(everything(300, 300), half[0], 1, needs_grad=True, biased=biased)
        widths[biased] = [walk.tile.n for walk in walks(made.lists, made.numbers)]
    assert widths[True] == [32, 32, 32] and max(widths[False]) == 64
    mask = torch.randn(1, 1, 300, 300, generator=torch.Generator().manual_seed(1)).half()
    plan = everything(300, 300)
    plan.__dict__["_triton"] = {}
    out, _ = attend_triton(*half, plan, mask, 0.25)
    assert [key[-1] for key in plan.__dict__["_triton"]] == [True]
    scores = 0.25 * half[0].double() @ half[1].double().mT + mask.double()
    want = scores.softmax(-1) @ half[2].double()
    assert worst(out, want) <= 2e-3


def test_what_a_tile_says_of_kernels_with_cut_tiles():
    tile = Tile(32, 32, 4, 2, 128, cut_stages=1, cut_registers=168)
    whole, cut = (constants(of_whole_blocks(keys), tile) for keys in (128, 120))
    assert (whole["CUTS"], whole["maxnreg"]) == (0, 128) and (cut["CUTS"], cut["maxnreg"]) == (
        1,
        168,
    )
    assert cut["CUT_STAGES"] == 1 and cut["num_stages"] == 2
    same = constants(of_whole_blocks(120), tile._replace(cut_stages=0, cut_registers=0))
    assert same["CUT_STAGES"] is None and same["maxnreg"] == 128
    order = torch.arange(120, dtype=torch.int32).expand(1, 1, -1)
    assert constants(of_whole_blocks(120), tile, k_order=order)["maxnreg"] == 255
    free = tile._replace(registers=0, cut_registers=0)
    for given in ({}, {"k_order": order}):
        assert "maxnreg" not in constants(of_whole_blocks(120), free, **given)


@pytest.mark.parametrize("dim", [16, 24])
def test_loads_that_are_turned_read_the_same(dim, monkeypatch):
    """Features by tokens, in all three kernels; with dim 24 some are not there."""
    turned = tuple(tile._replace(turned=True) for tile in tiles(dim, False, "sm_80"))
    monkeypatch.setattr(prepare, "tiles", lambda *_: Tiles(*turned))
    x = of_whole_blocks(128, dim)
    made = prepared(x.plan, x.q, x.q.shape[1] // x.k.shape[1], needs_grad=True)
    order = torch.arange(128, dtype=torch.int32).expand(1, 1, -1)
    for walk in walks(made.lists, made.numbers):
        assert constants(x, walk.tile)["TURNED"] is True
        assert not constants(x, walk.tile, k_order=order)["TURNED"]
        assert not constants(of_whole_blocks(120, dim), walk.tile)["TURNED"]
    held(x, x.v)


def test_rows_of_keys_and_of_values_may_be_strided_apart():
    """Where they are not, one row's offset serves both."""
    x = case(6, q_regions=(70,), k_regions=(90,), dim=16)
    wide = torch.full((*x.v.shape[:-1], 40), float("nan"))
    wide[..., 8:24] = x.v
    apart = wide[..., 8:24]
    assert constants(x)["ALIKE"] and not constants(x, v=apart)["ALIKE"]
    assert constants(x, by_keys=True)["ALIKE"] and not constants(x, v=apart, by_keys=True)["ALIKE"]
    held(x, apart)
