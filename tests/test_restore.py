"""Undo: after a session every object, class and module name is the very same as before."""

from __future__ import annotations

import copy
import gc
import sys
import warnings

import pytest
import tiny
import tiny_pipelines
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny_oracle import fingerprint, forwards

from attn_control import AttnControlError, attach
from attn_control.processors import HeadGate, SoftPAG


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Bare processors of other tests redirect names until they are collected: not in mid-test."""
    gc.collect()


ACTIVE = SoftPAG("L1H0", u=0.5)


@pytest.mark.parametrize("family", tiny.MODELS)
def test_everything_is_the_same_object_after_a_session(family):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    before = fingerprint(model)
    with torch.no_grad(), attach(model, ACTIVE if family != "sd35" else SoftPAG("L1.joint")):
        assert fingerprint(model) != before
        model(**call)
    assert fingerprint(model) == before


def test_restored_after_an_exception_inside():
    model = tiny.sd3()
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), attach(model, ACTIVE):
        _ = 1 / 0
    assert fingerprint(model) == before


def test_restored_after_an_exception_inside_the_model():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    before = fingerprint(model)
    call["encoder_hidden_states"] = call["encoder_hidden_states"][..., :-1]
    with pytest.raises(RuntimeError), torch.no_grad(), attach(model, ACTIVE):
        model(**call)
    assert fingerprint(model) == before


@pytest.mark.parametrize("bad", [SoftPAG("L99"), SoftPAG("L0H99"), SoftPAG("L0.cross"), object()])
def test_restored_when_attach_itself_raises(bad):
    model = tiny.sd3()
    before = fingerprint(model)
    with pytest.raises(AttnControlError):
        attach(model, ACTIVE, bad)
    assert fingerprint(model) == before


def test_a_failed_inner_attach_leaves_the_outer_session_whole():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    before = fingerprint(model)
    with torch.no_grad(), attach(model, ACTIVE):
        during, result = fingerprint(model), model(**call)[0]
        with pytest.raises(AttnControlError, match="L99"):
            attach(model, SoftPAG("L99"))
        assert fingerprint(model) == during
        assert torch.equal(model(**call)[0], result)
    assert fingerprint(model) == before


def test_restored_when_the_second_transformer_cannot_be_attached():
    high, low = tiny.wan(), tiny.wan()
    low.blocks[0].attn1.processor = lambda *args: None
    pipe, _ = tiny_pipelines.wan(high, low)
    before = fingerprint(high, low)
    with pytest.raises(AttnControlError, match="blocks.0.attn1 cannot be watched"):
        attach(pipe, ACTIVE)
    assert fingerprint(high, low) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_restored_after_an_interrupt_in_a_callback(error):
    pipe, call = tiny_pipelines.sd3()
    before = fingerprint(pipe.transformer)
    plain = tiny_pipelines.render(pipe, call)

    def callback(pipe, index, t, kwargs):
        if index == 1:
            raise error
        return {}

    with pytest.raises(error), attach(pipe, ACTIVE):
        tiny_pipelines.render(pipe, {**call, "callback_on_step_end": callback})
    assert fingerprint(pipe.transformer) == before
    assert torch.equal(tiny_pipelines.render(pipe, call), plain)


@torch.no_grad()
def test_nested_sessions_act_together_and_close_in_reverse_order():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    before, plain = fingerprint(model), model(**call)[0]
    first, second = HeadGate("L0H0"), HeadGate("L1H1")
    with attach(model, first):
        one = model(**call)[0]
        with attach(model, second):
            nested = model(**call)[0]
        assert torch.equal(model(**call)[0], one)
    with attach(model, first, second):
        both = model(**call)[0]
    assert torch.equal(nested, both)
    assert not torch.equal(nested, one)
    assert torch.equal(model(**call)[0], plain)
    assert fingerprint(model) == before


def test_closing_out_of_order_is_one_clear_error_and_harms_nothing():
    model = tiny.sd3()
    before = fingerprint(model)
    outer, inner = attach(model, ACTIVE), attach(model, HeadGate("L0"))
    with pytest.raises(AttnControlError, match="close the session that was attached last first"):
        outer.close()
    inner.close()
    outer.close()
    outer.close()  # idempotent
    assert fingerprint(model) == before


@torch.no_grad()
def test_one_processor_that_serves_all_modules():
    model, call = tiny.unet(), tiny.inputs("unet")
    with attach(model, HeadGate("L2H1")):
        expected = model(**call)[0]
    model.set_attn_processor(AttnProcessor2_0())
    before, plain = fingerprint(model), model(**call)[0]
    with attach(model, HeadGate("L2H1")) as session:
        assert torch.equal(model(**call)[0], expected)
    assert [s["calls"] for s in session.report().controls[0].sites.values()] == [1]
    assert fingerprint(model) == before
    assert torch.equal(model(**call)[0], plain)


@torch.no_grad()
def test_one_processor_shared_by_two_attached_models():
    one, two, call = tiny.unet(), tiny.unet(), tiny.inputs("unet")
    shared = AttnProcessor2_0()
    one.set_attn_processor(shared)
    two.set_attn_processor(shared)
    before, plain = fingerprint(one, two), one(**call)[0]
    first, second = attach(one, HeadGate("L2H1")), attach(two, HeadGate("L0H0"))
    changed = one(**call)[0], two(**call)[0]
    assert not torch.equal(changed[0], plain) and not torch.equal(changed[1], plain)
    first.close()
    assert torch.equal(one(**call)[0], plain)
    assert torch.equal(two(**call)[0], changed[1])  # still attached
    second.close()
    assert fingerprint(one, two) == before


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "wan"])
@torch.no_grad()
def test_a_deep_copy_of_an_attached_model_is_detached_and_works(family):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    plain = model(**call)[0]
    session = attach(model, ACTIVE)
    guided = model(**call)[0]
    twin = copy.deepcopy(model)
    assert type(twin) is not type(model)
    assert torch.equal(twin(**call)[0], plain)
    assert torch.equal(model(**call)[0], guided)
    with attach(twin, ACTIVE), forwards(twin) as ran:  # beside the original's session
        assert torch.equal(twin(**call)[0], guided)
    assert len(ran) == 2
    session.close()
    assert torch.equal(twin(**call)[0], plain)
    with attach(twin, ACTIVE):  # and after it
        assert torch.equal(twin(**call)[0], guided)
    assert torch.equal(twin(**call)[0], plain)
    assert torch.equal(model(**call)[0], plain)


@torch.no_grad()
def test_a_pickle_of_an_attached_model_is_the_plain_model(tmp_path):
    model, call = tiny.unet(), tiny.inputs("unet")
    plain = model(**call)[0]
    with attach(model, ACTIVE):
        torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(twin) is type(model)
    assert {type(p) for p in twin.attn_processors.values()} == {AttnProcessor2_0}
    assert torch.equal(twin(**call)[0], plain)


def test_names_are_patched_until_the_last_session_on_the_module_closes():
    module = sys.modules["diffusers.models.transformers.transformer_flux"]
    original = module.dispatch_attention_fn
    one, two = attach(tiny.flux()), attach(tiny.flux())
    assert module.dispatch_attention_fn is not original
    one.close()
    assert module.dispatch_attention_fn is not original
    two.close()
    assert module.dispatch_attention_fn is original


@torch.no_grad()
def test_processors_set_during_a_session_are_healed_and_noted_and_kept():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    with attach(model, ACTIVE) as session:
        guided = model(**call)[0]
        fresh = {
            name: type(processor)._attn_control_class()
            for name, processor in model.attn_processors.items()
        }
        model.set_attn_processor(dict(fresh))
        assert torch.equal(model(**call)[0], guided)
        assert len(session.report().notes) == len(fresh)
        assert "healed" in str(session.report())
    # The user's new processors stay, as plain as they came.
    assert {n: id(p) for n, p in model.attn_processors.items()} == {
        n: id(p) for n, p in fresh.items()
    }
    assert all("attn_control" not in " ".join(dir(p)) for p in fresh.values())


@torch.no_grad()
def test_a_replaced_transformer_is_left_alone_and_the_session_says_that_it_never_ran():
    pipe, call = tiny_pipelines.sd3()
    plain, old = tiny_pipelines.render(pipe, call), pipe.transformer
    before = fingerprint(old)
    with pytest.warns(UserWarning, match="the denoiser was never called"):
        with attach(pipe, ACTIVE):
            pipe.transformer = tiny.sd3()
            assert torch.equal(tiny_pipelines.render(pipe, call), plain)
    assert fingerprint(old) == before


def test_an_attached_model_can_be_saved_and_loads_as_the_plain_model(tmp_path):
    model = tiny.sd3()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with attach(model, ACTIVE):
            model.save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path)
    assert type(twin) is type(model)
    state = twin.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_isinstance_and_class_names_hold_while_attached():
    model = tiny.unet()
    with attach(model):
        assert type(model).__name__ == "UNet2DConditionModel"
        for processor in model.attn_processors.values():
            assert isinstance(processor, AttnProcessor2_0)
            assert type(processor).__name__ == "AttnProcessor2_0"
            assert isinstance(type(processor)(), AttnProcessor2_0)  # constructs like the original
