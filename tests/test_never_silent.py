"""A control that cannot act is refused as early as possible, and never quietly."""

from __future__ import annotations

import warnings

import pytest
import tiny
import tiny_odd_processors
import tiny_pipelines
import torch
from diffusers.models.attention_processor import AttnProcessor
from tiny_oracle import fingerprint, forwards

from attn_control import AttnControlError, attach
from attn_control.processors import HeadGate, SoftPAG

ACTIVE = SoftPAG("L1H0")


def test_a_selector_that_matches_nothing_is_refused_at_attach():
    for text in ("L7", "L1H9", "L0-5", "L1, L9"):
        with pytest.raises(AttnControlError, match=text.split(", ")[-1]):
            attach(tiny.sd3(), SoftPAG(text))


@pytest.mark.parametrize("window", ["0.26-0.49", "sigma 0.02-0.01"])
def test_a_window_that_holds_no_step_is_refused_before_the_first_forward(window):
    pipe, call = tiny_pipelines.sd3()
    before = fingerprint(pipe.transformer)
    with forwards(pipe.transformer) as ran, pytest.raises(AttnControlError) as error:
        with attach(pipe, SoftPAG("L1", window=window)):
            tiny_pipelines.render(pipe, call)
    assert ran == []
    assert f"window '{window}' holds no step of this run of 4 steps" in str(error.value)
    assert fingerprint(pipe.transformer) == before


@pytest.mark.parametrize("window", ["0-0.5", "sigma 9-1"])
def test_a_window_on_a_bare_model_is_refused_at_the_first_call(window):
    model = tiny.sd3()
    with pytest.raises(AttnControlError, match="attach to the whole pipeline"):
        with attach(model, HeadGate("L1", window=window)), torch.no_grad():
            model(**tiny.inputs("sd3"))


@pytest.mark.parametrize("odd", ["Matmul", "FullName"])
@pytest.mark.parametrize(
    "control", [SoftPAG("L2H1", window="0.5-1"), HeadGate("L2H1", window="0.5-1")]
)
def test_attention_that_cannot_be_seen_raises_at_the_first_due_step(odd, control):
    pipe, call = tiny_pipelines.sd15()
    site = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    site.set_processor(getattr(tiny_odd_processors, odd)())
    before, plain = fingerprint(pipe.unet), tiny_pipelines.render(pipe, call)
    with pytest.raises(AttnControlError) as error, forwards(pipe.unet) as ran:
        with attach(pipe, control):
            tiny_pipelines.render(pipe, call)
    message = str(error.value)
    assert "did not act at L2.self" in message
    assert "first due step 2" in message
    assert f"tiny_odd_processors.{odd} ran no attention that can be seen" in message
    assert ran[:3] == [2, 2, 2]  # steps 0 and 1 were not due
    assert fingerprint(pipe.unet) == before
    assert torch.equal(tiny_pipelines.render(pipe, call), plain)


def test_a_diffusers_processor_that_writes_its_softmax_out_is_no_exception():
    model = tiny.unet()
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(AttnControlError, match="AttnProcessor ran no attention"):
        with attach(model, HeadGate("L2")), torch.no_grad():
            model(**tiny.inputs("unet"))


@torch.no_grad()
def test_a_processor_set_later_that_cannot_be_seen_raises_at_its_next_due_call():
    model, call = tiny.unet(), tiny.inputs("unet")
    site = model.mid_block.attentions[0].transformer_blocks[0].attn1
    with attach(model, HeadGate("L2")):
        model(**call)
        site.set_processor(tiny_odd_processors.Matmul())
        with pytest.raises(AttnControlError, match="did not act at L2.self"):
            model(**call)


@pytest.mark.parametrize("odd", ["Plain", "Parametrised"])
@torch.no_grad()
def test_a_users_processor_is_controlled_like_any_other(odd):
    model, call = tiny.unet(), tiny.inputs("unet")
    site = model.mid_block.attentions[0].transformer_blocks[0].attn1
    site.set_processor(getattr(tiny_odd_processors, odd)())
    before, plain = fingerprint(model), model(**call)[0]
    with attach(model, HeadGate("L2", gain=0.0)):
        silenced = model(**call)[0]
    assert fingerprint(model) == before
    with torch.no_grad():  # all heads silent: only the bias of the projection is left
        site.to_out[0].weight.zero_()
    assert (model(**call)[0] - silenced).abs().max() < 1e-5
    assert not torch.equal(plain, silenced)


@pytest.mark.parametrize(
    ("processor", "name"),
    [(lambda attn, hidden, **_: hidden, "function"), (tiny_odd_processors.Slotted(), "Slotted")],
)
def test_a_processor_whose_class_cannot_be_swapped_is_refused_at_attach(processor, name):
    model = tiny.unet()
    site = model.mid_block.attentions[0].transformer_blocks[0].attn1
    site.processor = processor
    before = fingerprint(model)
    with pytest.raises(AttnControlError, match=f"{name} of mid_block.* cannot be watched"):
        attach(model, HeadGate("L0"))
    assert fingerprint(model) == before


def test_a_perturbation_that_does_not_change_the_prediction_raises():
    pipe, call = tiny_pipelines.sd3()
    before = fingerprint(pipe.transformer)
    with pytest.raises(AttnControlError, match="the prediction did not change at step 0"):
        with attach(pipe, SoftPAG("L2", tokens="text")):  # the last block drops its text output
            tiny_pipelines.render(pipe, call)
    assert fingerprint(pipe.transformer) == before


def test_a_denoiser_that_was_never_called_is_warned_of_and_in_the_report():
    pipe, _ = tiny_pipelines.sd3()
    with pytest.warns(UserWarning, match="SoftPAG.*the denoiser was never called"):
        with attach(pipe, ACTIVE) as session:
            pass
    record = session.report().controls[0]
    assert not record.fired
    assert record.reason == "the denoiser was never called"
    assert "the denoiser was never called" in str(session.report())


def test_strict_raises_instead_and_only_after_restoring():
    pipe, _ = tiny_pipelines.sd3()
    before = fingerprint(pipe.transformer)
    with pytest.raises(AttnControlError, match="never acted: SoftPAG"):
        with attach(pipe, ACTIVE, strict=True):
            pass
    assert fingerprint(pipe.transformer) == before


def test_strict_never_raises_over_an_exception_in_flight():
    pipe, _ = tiny_pipelines.sd3()
    with pytest.raises(ZeroDivisionError), attach(pipe, ACTIVE, strict=True):
        _ = 1 / 0


def test_strict_is_quiet_when_everything_acted_or_is_idle():
    pipe, call = tiny_pipelines.sd3()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with attach(pipe, ACTIVE, SoftPAG("L0", u=0.0), HeadGate("L0", gain=1), strict=True):
            tiny_pipelines.render(pipe, call)
        with attach(pipe, strict=True):
            pass


def test_only_the_controls_that_never_acted_are_named():
    high, low = tiny.wan(), tiny.wan()
    pipe, call = tiny_pipelines.wan(high, low)
    pipe.register_to_config(boundary_ratio=None)  # the second transformer is never called
    with pytest.warns(UserWarning) as caught:
        with attach(low, HeadGate("L1")), attach(pipe, HeadGate("L0")):
            tiny_pipelines.render(pipe, call)
    messages = [str(w.message) for w in caught if "attach" in str(w.message)]
    assert len(messages) == 1 and "L1" in messages[0] and "L0" not in messages[0]


def _stop(pipe, index, t, kwargs):
    pipe._interrupt = True
    return {}


def test_an_interrupted_run_is_not_a_silent_no_op():
    pipe, call = tiny_pipelines.sd3()
    late = HeadGate("L0", window="0.5-1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with attach(pipe, late, strict=True) as session:
            tiny_pipelines.render(pipe, {**call, "callback_on_step_end": _stop})
    record = session.report().controls[0]
    assert not record.fired
    assert record.reason == "the run stopped at step 0 of 4, before window '0.5-1'"


def test_a_run_that_an_exception_ended_warns_of_nothing():
    pipe, call = tiny_pipelines.sd3()

    def fail(pipe, index, t, kwargs):
        raise RuntimeError("out of memory")

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(RuntimeError, match="out of memory"):
            with attach(pipe, HeadGate("L0", window="0.5-1"), strict=True):
                tiny_pipelines.render(pipe, {**call, "callback_on_step_end": fail})


def test_a_model_is_usable_inside_the_session_after_a_refused_call():
    pipe, call = tiny_pipelines.sd3()
    with attach(pipe, HeadGate("L0", window="0.4-0.5")) as session:
        with pytest.raises(AttnControlError, match="holds no step"):
            tiny_pipelines.render(pipe, call)
        tiny_pipelines.render(pipe, {**call, "num_inference_steps": 10})
    assert list(session.report().controls[0].steps.values()) == [[4]]
