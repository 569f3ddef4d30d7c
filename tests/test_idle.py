"""Attached but with nothing to do: the same bits, the same operations, no forward more."""

from __future__ import annotations

import pytest
import tiny
import tiny_pipelines
import torch
from tiny_oracle import forwards
from torch.utils._python_dispatch import TorchDispatchMode

from attn_control import attach
from attn_control.processors import HeadGate, SoftPAG

IDLE = {
    "no controls": (),
    "u=0": (SoftPAG("all", u=0.0),),
    "scale=0": (SoftPAG("all", scale=0.0),),
    "gain=1": (HeadGate("all", gain=1.0),),
    "all of them": (SoftPAG("all", u=0), SoftPAG("all", scale=0), HeadGate("all", gain=1)),
}


class Operations(TorchDispatchMode):
    """Names and shapes of every tensor operation, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
        self.log.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", tiny.MODELS)
@pytest.mark.parametrize("idle", IDLE)
@torch.no_grad()
def test_idle_controls_on_a_model_change_no_bit_and_add_no_operation(family, idle):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    with Operations() as before:
        plain = model(**call)[0]
    with attach(model, *IDLE[idle]), Operations() as during:
        held = model(**call)[0]
    assert torch.equal(plain, held)
    assert during.log == before.log
    assert len(before.log) > 50


@torch.no_grad()
def test_the_operation_count_sees_an_active_control():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    with Operations() as before:
        model(**call)
    with attach(model, HeadGate("L0H0", gain=1.5)), Operations() as during:
        model(**call)
    assert len(during.log) > len(before.log)


@pytest.mark.parametrize("family", tiny_pipelines.PIPELINES)
def test_idle_controls_on_a_pipeline_change_no_bit_and_run_no_forward_more(family):
    pipe, call = tiny_pipelines.PIPELINES[family]()
    model = getattr(pipe, "transformer", None) or pipe.unet
    with forwards(model) as before:
        plain = tiny_pipelines.render(pipe, call)
    for controls in ((), IDLE["all of them"]):
        with attach(pipe, *controls), forwards(model) as during:
            assert torch.equal(tiny_pipelines.render(pipe, call), plain)
        assert during == before


@pytest.mark.parametrize(
    "control", [SoftPAG("L1", window="0-0.25"), HeadGate("L1", window="0-0.25")]
)
def test_steps_outside_the_window_run_no_forward_more_and_keep_their_operations(control):
    pipe, call = tiny_pipelines.sd3()
    logs: list[list] = []

    def log(pipe, index, t, kwargs):
        logs.append(len(operations.log))
        return {}

    def counts() -> list[int]:
        return [b - a for a, b in zip(logs, logs[1:], strict=False)]  # from the second step on

    call["callback_on_step_end"] = log
    with Operations() as operations:
        tiny_pipelines.render(pipe, call)
    plain = counts()
    logs.clear()
    with attach(pipe, control), Operations() as operations:
        tiny_pipelines.render(pipe, call)
    assert counts() == plain


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "wan"])
def test_the_pipeline_is_itself_again_after_a_session(family):
    pipe, call = tiny_pipelines.PIPELINES[family]()
    plain = tiny_pipelines.render(pipe, call)
    with attach(pipe, SoftPAG("L1")):
        assert not torch.equal(tiny_pipelines.render(pipe, call), plain)
    assert torch.equal(tiny_pipelines.render(pipe, call), plain)
