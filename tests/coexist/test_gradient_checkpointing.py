"""Gradient checkpointing: the gradients of a controlled model are those without it."""

from __future__ import annotations

import pytest
import tiny
import tiny_pipelines
import torch
from torch.utils.checkpoint import checkpoint

from attn_control import AttnControlError, attach
from attn_control.processors import NAG, HeadGate, SkipLayers, SoftPAG

REENTRANT = {"default": None, "reentrant": True, "not reentrant": False}
GUIDE = SoftPAG("L1H1", u=0.6, scale=2.0)


def _checkpointed(model, reentrant: bool | None):
    if reentrant is None:
        model.enable_gradient_checkpointing()
    else:
        model.enable_gradient_checkpointing(
            lambda module, *args: checkpoint(module.__call__, *args, use_reentrant=reentrant)
        )
    return model


def _inputs(family: str) -> dict:
    call = tiny.family_inputs(family)
    for name in ("hidden_states", "sample", "encoder_hidden_states"):
        if name in call:
            call[name].requires_grad_()  # reentrant checkpoints need inputs with gradients
    return call


def _gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()  # reentrant checkpoints know no autograd.grad
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _compare(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys() and len(got) > 20
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in got.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, name


def _loss(prediction: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return (prediction * torch.randn(prediction.shape, generator=g)).mean()


def _trained(family: str, *controls, reentrant=..., after: bool = False) -> dict:
    model, call = tiny.MODELS[family]().train(), _inputs(family)
    if reentrant is not ...:
        _checkpointed(model, reentrant)
    with attach(model, *controls):
        loss = _loss(model(**call)[0])
        if not after:
            return _gradients(model, loss)
    return _gradients(model, loss)


CONTROLS = {
    "guidance": (GUIDE,),
    "in place": (HeadGate("L0H1", gain=0.3),),
    "both": (HeadGate("L0H1", gain=0.3), GUIDE),
    "layers": (SkipLayers("L1", scale=2.0),),
    "rows": (NAG(scale=3.0),),
}


@pytest.mark.parametrize("how", REENTRANT)
@pytest.mark.parametrize("controls", CONTROLS)
def test_gradients_are_those_without_checkpointing(controls, how):
    expected = _trained("sd3", *CONTROLS[controls])
    _compare(_trained("sd3", *CONTROLS[controls], reentrant=REENTRANT[how]), expected)
    plain = _trained("sd3")
    assert any((plain[name] - expected[name]).abs().max() > 1e-5 for name in plain)


@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_in_every_kind_of_model(family):
    _compare(_trained(family, GUIDE, reentrant=None), _trained(family, GUIDE))


@pytest.mark.parametrize("controls", ["both", "layers"])
def test_backward_after_the_session_is_over(controls):
    expected = _trained("sd3", *CONTROLS[controls])
    _compare(_trained("sd3", *CONTROLS[controls], reentrant=None, after=True), expected)


@pytest.mark.parametrize("other", [HeadGate("L1H1", gain=0.0), SkipLayers("L1", scale=1.0)])
@pytest.mark.parametrize("controls", ["both", "layers"])
def test_backward_while_another_session_is_open(controls, other):
    model, call = _checkpointed(tiny.sd3().train(), None), _inputs("sd3")
    with attach(model, *CONTROLS[controls]):
        loss = _loss(model(**call)[0])
    with attach(model, other):
        between = model(**call)[0]
        _compare(_gradients(model, loss), _trained("sd3", *CONTROLS[controls]))
        assert torch.equal(model(**call)[0], between)


def test_backward_after_a_session_nested_meanwhile():
    model, call = _checkpointed(tiny.sd3().train(), None), _inputs("sd3")
    with attach(model, GUIDE):
        loss = _loss(model(**call)[0])
        with attach(model, HeadGate("L0"), HeadGate("L2")):
            model(**call)
        _compare(_gradients(model, loss), _trained("sd3", GUIDE))


def test_steps_recompute_with_their_own_plans():
    """A window that closes, and values shuffled anew at each step, in one backward."""
    controls = (
        SoftPAG("L1", op="permute", tokens="image", scale=2.0),
        HeadGate("L0", window="0-0.5"),
    )

    def run(reentrant) -> dict:
        pipe, call = tiny_pipelines.sd3()
        model, outputs = pipe.transformer.train(), []
        if reentrant is not ...:
            _checkpointed(model, reentrant)
        handle = model.register_forward_hook(lambda m, a, o: outputs.append(o[0]))
        with attach(pipe, *controls):
            type(pipe).__call__.__wrapped__(
                pipe, **call, generator=torch.Generator().manual_seed(0), output_type="latent"
            )
        handle.remove()
        assert len(outputs) == 8  # plain and perturbed at each of four steps
        return _gradients(model, sum(_loss(output) for output in outputs))

    _compare(run(None), run(...))


def test_a_denoiser_checkpointed_as_a_whole_by_its_pipelines_caller_is_refused():
    pipe, call = tiny_pipelines.sd3()
    model, inputs = pipe.transformer, _inputs("sd3")
    with attach(pipe, GUIDE):
        tiny_pipelines.render(pipe, call)
        output = checkpoint(lambda: model(**inputs)[0], use_reentrant=False)
        with pytest.raises(AttnControlError, match="was called again in backward, as a whole"):
            output.sum().backward()


def test_a_bare_denoiser_may_be_checkpointed_as_a_whole():
    model, call = tiny.sd3().train(), _inputs("sd3")
    with attach(model, GUIDE):
        loss = _loss(checkpoint(lambda: model(**call)[0], use_reentrant=False))
        _compare(_gradients(model, loss), _trained("sd3", GUIDE))


@pytest.mark.parametrize("how", ["around", "attached", "in place"])
def test_checkpoints_inside_a_graph_are_refused(how):
    model, call = _checkpointed(tiny.sd3().train(), None), _inputs("sd3")
    if how == "in place":
        model.compile(backend="eager")
    target = torch.compile(model, backend="eager") if how == "attached" else model
    with attach(target, GUIDE):
        compiled = torch.compile(model, backend="eager") if how == "around" else target
        with pytest.raises(AttnControlError, match="gradient checkpointing inside a compiled SD3"):
            compiled(**call)
        with torch.no_grad():
            compiled(**call)  # nothing runs again


def test_checkpoints_of_compiled_blocks():
    model, call = _checkpointed(tiny.flux().train(), None), _inputs("flux")
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    with attach(model, GUIDE):
        loss = _loss(model(**call)[0])
    _compare(_gradients(model, loss), _trained("flux", GUIDE))
