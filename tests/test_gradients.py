"""A loss through a guided model: its gradients are those of the explicit formula."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_oracle import attention, gated, toward_identity

from attn_control import attach
from attn_control.processors import HeadGate, SoftPAG

NAMES = {
    "sd15": "mid_block.attentions.0.transformer_blocks.0.attn1",
    "sd3": "transformer_blocks.1.attn",
    "flux": "single_transformer_blocks.0.attn",
    "wan": "blocks.1.attn1",
}
LABELS = {"sd15": "L2H1", "sd3": "L1H1", "flux": "L2H1", "wan": "L1H1"}


def _gradients(model, prediction: torch.Tensor) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    loss = (prediction * torch.randn(prediction.shape, generator=g)).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def _compare(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys() and len(got) > 20
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in got.items():
        assert torch.isfinite(gradient).all(), name
        error = (gradient - expected[name]).abs().max() / largest
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("family", NAMES)
def test_gradients_of_a_guided_prediction(family):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    plain = model(**call)[0]
    with attention(model, {NAMES[family]: toward_identity((1,), 0.6)}):
        perturbed = model(**call)[0]
    expected = _gradients(model, plain + 2.0 * (plain - perturbed))
    with attach(model, SoftPAG(LABELS[family], u=0.6, scale=2.0)):
        guided = model(**call)[0]
    _compare(_gradients(model, guided), expected)  # backward after the session is over
    unguided = _gradients(model, model(**call)[0])
    assert any((unguided[n] - expected[n]).abs().max() > 1e-4 for n in expected)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_gradients_through_a_gate(family):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    with attention(model, {NAMES[family]: gated((1,), 0.3)}):
        expected = _gradients(model, model(**call)[0])
    with attach(model, HeadGate(LABELS[family], gain=0.3)):
        _compare(_gradients(model, model(**call)[0]), expected)


def test_gradients_reach_the_inputs():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    call["hidden_states"].requires_grad_()
    with attach(model, SoftPAG("L1H1")):
        (gradient,) = torch.autograd.grad(model(**call)[0].sum(), call["hidden_states"])
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
