"""A perturbed head is the dense softmax's, to 1e-5; every other row, head and token keeps its
bits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
from tiny_oracle import SPOTS, Spot, attention, cast, dense, expose_heads, outputs, toward_identity

from attn_control import attach
from attn_control.processors import HeadGate, SoftPAG

CASES = [(spot, tokens) for spot in SPOTS for tokens in spot.spans]


def _item(spot: Spot, heads: str) -> str:
    return spot.label if heads == "all" else f"{spot.label}H{heads}"


@functools.cache
def _exposed(family: str, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Any], dict]:
    """A model that shows its heads, the arguments of a call, and all its softmaxes on that call."""
    model = expose_heads(tiny.MODELS[family]()).to(dtype)
    call = cast(tiny.family_inputs(family), dtype)
    with torch.no_grad(), attention(model) as seen:
        model(**call)
    return model, call, seen


def _two_passes(spot: Spot, control: Any, dtype: torch.dtype = torch.float32) -> tuple:
    """The site's (q, k, v) on the bare model, then its output without and with the control."""
    model, call, seen = _exposed(spot.family, dtype)
    module = model.get_submodule(spot.name)
    with torch.no_grad(), outputs(module, spot.heads, spot.text_first) as outs:
        with attach(model, control):
            model(**call)
        if control.guidance_scale is None:  # in place: the plain output needs a call of its own
            model(**call)
            outs.reverse()
    plain, *_, changed = outs
    return seen[spot.name][0], plain, changed, len(outs)


def _split(plain: torch.Tensor, heads: tuple[int, ...], tokens: slice) -> torch.Tensor:
    touched = torch.zeros(plain.shape[:3], dtype=torch.bool)
    for head in heads:
        touched[:, head, tokens] = True
    return touched


@pytest.mark.parametrize(("spot", "tokens"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("u", [0.3, 1.0])
def test_perturbed_head_is_the_dense_softmax_and_the_rest_keeps_its_bits(spot, tokens, u):
    qkv, plain, changed, count = _two_passes(
        spot, SoftPAG(_item(spot, "1"), u=u, scale=1.0, tokens=tokens)
    )
    assert count == 2  # one plain and one perturbed forward
    touched = _split(plain, (1,), spot.spans[tokens])
    reference = toward_identity((1,), u, spot.spans[tokens])(dense(qkv.q, qkv.k), qkv.v.double())
    assert (changed.double() - reference).abs()[touched].max() <= 1e-5
    assert torch.equal(changed[~touched], plain[~touched])
    assert not torch.equal(changed[touched], plain[touched])


@pytest.mark.parametrize("spot", SPOTS, ids=str)
def test_all_heads_of_a_layer_at_u_1_return_their_values(spot):
    qkv, _, changed, _ = _two_passes(spot, SoftPAG(spot.label, u=1.0, scale=1.0))
    assert torch.equal(changed, qkv.v)


@pytest.mark.parametrize(
    "spot", [s for s in SPOTS if s.family in ("sd15", "sd3", "flux", "wan")], ids=str
)
@pytest.mark.parametrize("u", [0.25, 0.5, 0.9])
def test_bf16_error_is_at_most_twice_that_of_plain_bf16_attention(spot, u):
    qkv, plain, changed, _ = _two_passes(
        spot, SoftPAG(spot.label, u=u, scale=1.0), dtype=torch.bfloat16
    )
    assert changed.dtype == torch.bfloat16
    a, v = dense(qkv.q, qkv.k), qkv.v.double()

    def error(got: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return (got.double() - reference).norm() / reference.norm()

    # Relative: blending with V enlarges the output, and bf16 rounds in proportion.
    reference = toward_identity(range(spot.heads), u)(a, v)
    assert error(changed, reference) <= 2 * error(plain, a @ v)


@pytest.mark.parametrize("spot", SPOTS, ids=str)
@pytest.mark.parametrize("gain", [0.0, 2.5])
def test_gated_head_is_gain_times_the_dense_output_and_the_rest_keeps_its_bits(spot, gain):
    qkv, plain, changed, count = _two_passes(spot, HeadGate(_item(spot, "0"), gain=gain))
    assert count == 2  # one attached, one alone: no extra forward
    touched = _split(plain, (0,), slice(None))
    reference = gain * (dense(qkv.q, qkv.k) @ qkv.v.double())
    assert (changed.double() - reference).abs()[touched].max() <= 1e-5
    assert torch.equal(changed[~touched], plain[~touched])


def test_two_runs_of_heads_and_one_alone_are_three_separate_blocks():
    spot = next(s for s in SPOTS if s.family == "sd3")
    qkv, plain, changed, _ = _two_passes(spot, SoftPAG("L1H0-1, L1H3", u=0.4, scale=1.0))
    touched = _split(plain, (0, 1, 3), slice(None))
    reference = toward_identity((0, 1, 3), 0.4)(dense(qkv.q, qkv.k), qkv.v.double())
    assert (changed.double() - reference).abs()[touched].max() <= 1e-5
    assert torch.equal(changed[~touched], plain[~touched])
