"""``control.processors(model)``: which controls give a dict, and that the dict does what attach
does."""

from __future__ import annotations

import gc
import sys

import pytest
import tiny
import torch
from tiny_oracle import fingerprint

from attn_control import AttnControlError, attach
from attn_control.processors import HeadGate, SoftPAG


@pytest.fixture(autouse=True)
def no_leftovers():
    """Names are put back when the last processor is collected: not in the middle of a test."""
    gc.collect()
    yield
    gc.collect()


TABLE = [  # control, what it lacks as a bare processor
    (HeadGate("L0H0"), ""),
    (HeadGate("L0H0", gain=2.0), ""),
    (HeadGate("L0H0", window="0-0.5"), "step"),
    (HeadGate("L0H0", window="sigma 5-1"), "step"),
    (HeadGate("L0H0", tokens="image"), "layout"),
    (HeadGate("L0H0", tokens="text", window="0-0.5"), "step and layout"),
    (SoftPAG("L0H0"), "branch"),
    (SoftPAG("L0H0", u=0.0), "branch"),
    (SoftPAG("L0H0", window="0-0.5"), "branch and step"),
    (SoftPAG("L0H0", tokens="image"), "branch and layout"),
    (SoftPAG("L0H0", tokens="text", window="0-0.5"), "branch and step and layout"),
]


@pytest.mark.parametrize(("control", "lacks"), TABLE, ids=lambda value: str(value))
def test_which_controls_give_processors(control, lacks):
    model = tiny.sd3()
    if not lacks:
        made = control.processors(model)
        assert made.keys() == model.attn_processors.keys()
        return
    with pytest.raises(AttnControlError) as error:
        control.processors(model)
    message = str(error.value)
    assert f"needs {lacks} information" in message
    assert message.endswith(f"use: with attach(pipe, {control}): pipe(...)")
    assert eval(str(control)) == control  # the line can be pasted


@pytest.mark.parametrize("family", tiny.MODELS)
@torch.no_grad()
def test_the_dict_does_what_attach_does_and_can_be_taken_out(family):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    before, plain = fingerprint(model), model(**call)[0]
    control = HeadGate("L0H1, L1H0", gain=0.3)
    with attach(model, control):
        expected = model(**call)[0]
    originals = dict(model.attn_processors)
    model.set_attn_processor(control.processors(model))
    assert torch.equal(model(**call)[0], expected)
    assert not torch.equal(expected, plain)
    assert {n for n, p in model.attn_processors.items() if p is not originals[n]} != set()
    model.set_attn_processor(originals)
    gc.collect()
    assert torch.equal(model(**call)[0], plain)
    assert fingerprint(model) == before


def test_only_selected_sites_get_a_new_processor():
    model = tiny.sd3()
    made = HeadGate("L1H0").processors(model)
    changed = [n for n, p in made.items() if p is not model.attn_processors[n]]
    assert changed == ["transformer_blocks.1.attn.processor"]


def test_names_are_unpatched_when_the_processors_are_gone():
    module = sys.modules["diffusers.models.transformers.transformer_wan"]
    original = module.dispatch_attention_fn
    made = HeadGate("L1H0").processors(tiny.wan())
    other = HeadGate("L0").processors(tiny.wan())
    assert module.dispatch_attention_fn is not original
    del made
    gc.collect()
    assert module.dispatch_attention_fn is not original
    del other
    gc.collect()
    assert module.dispatch_attention_fn is original


@torch.no_grad()
def test_attach_over_them_is_refused_and_leaves_them_working():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    model.set_attn_processor(HeadGate("L1H0").processors(model))
    before, result = fingerprint(model), model(**call)[0]
    with pytest.raises(AttnControlError, match="runs a processor made by .processors()"):
        attach(model, SoftPAG("L0"))
    assert fingerprint(model) == before
    assert torch.equal(model(**call)[0], result)


@torch.no_grad()
def test_they_are_refused_inside_a_session():
    model = tiny.sd3()
    with attach(model):
        with pytest.raises(AttnControlError, match="under attach.*undo that first"):
            HeadGate("L1H0").processors(model)


@torch.no_grad()
def test_set_during_a_session_they_are_refused_at_the_next_call():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    before = fingerprint(model)
    made = HeadGate("L1H0").processors(model)
    originals = dict(model.attn_processors)
    with pytest.raises(AttnControlError, match="made by .processors()"):
        with attach(model, HeadGate("L0")):
            model.set_attn_processor(made)
            model(**call)
    model.set_attn_processor(originals)
    gc.collect()
    assert fingerprint(model) == before


def test_an_idle_control_changes_no_processor():
    model = tiny.sd3()
    assert HeadGate("L1", gain=1.0).processors(model) == model.attn_processors


def test_a_model_without_attn_processors_is_told_to_attach():
    with pytest.raises(AttnControlError, match="has no attn_processors; use: with attach"):
        HeadGate("L1").processors(torch.nn.Linear(2, 2))


def test_a_selector_that_matches_nothing_is_refused():
    with pytest.raises(AttnControlError, match="L9"):
        HeadGate("L9").processors(tiny.sd3())


@torch.no_grad()
def test_under_compile_they_act_too():
    torch._dynamo.reset()
    model, call = tiny.sd3(layers=2), tiny.inputs("sd3")
    model.set_attn_processor(HeadGate("L1H0", gain=0.3).processors(model))
    expected = model(**call)[0]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert (compiled(**call)[0] - expected).abs().max() < 1e-5
    torch._dynamo.reset()
