"""diffusers' own guiders on tiny models, ours, and what both should give, by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import diffusers
import pytest
import torch
from tiny_oracle import close
from torch import Tensor

from attn_control import attach
from attn_control.call import sample_of

CFG, SCALE = 4.0, 1.5


def upstream(number: str, what: str, raises: Any = AssertionError) -> Any:
    """Marks what diffusers gets wrong today. The day it does not, the test fails and says so."""
    return pytest.mark.xfail(
        strict=True,
        raises=raises,
        reason=f"{number}: {what}. If this passes, diffusers {diffusers.__version__} has mended it:"
        " take this test away, and its row of docs/guiders.md",
    )


def negative(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with another text."""
    text = call["encoder_hidden_states"]
    other = torch.randn(text.shape, generator=torch.Generator().manual_seed(99))
    return call | {"encoder_hidden_states": other}


@torch.no_grad()
def run(model: Any, call: dict[str, Any]) -> Tensor:
    return sample_of(model(**call, return_dict=False))


def guided_by(guider: Any, model: Any, call: dict[str, Any], step: int = 2, of: int = 10) -> Tensor:
    """One step of a loop with a guider, as diffusers' modular pipelines write it."""
    texts = call["encoder_hidden_states"], negative(call)["encoder_hidden_states"]
    guider.set_state(step=step, num_inference_steps=of, timestep=torch.tensor(500.0))
    batches = guider.prepare_inputs({"encoder_hidden_states": texts})
    for batch in batches:
        guider.prepare_models(model)
        batch.noise_pred = run(model, call | {"encoder_hidden_states": batch.encoder_hidden_states})
        guider.cleanup_models(model)
    return guider(batches).pred


def pushed_by_guider(guider: Any, model: Any, call: dict[str, Any], **at: int) -> Tensor:
    """What a guider adds to classifier-free guidance."""
    cond, uncond = run(model, call), run(model, negative(call))
    return guided_by(guider, model, call, **at) - (uncond + CFG * (cond - uncond))


def pushed_by(control: Any, model: Any, call: dict[str, Any]) -> Tensor:
    """What a control of ours adds to it: the same for every branch."""
    plain = run(model, call)
    with attach(model, control) as session:
        guided = run(model, call)
    assert session.report().controls[0].fired
    assert torch.equal(run(model, call), plain)
    return guided - plain


def pushed_by_hand(model: Any, call: dict[str, Any], perturbing: AbstractContextManager) -> Tensor:
    """``SCALE * (cond - perturbed)``."""
    cond = run(model, call)
    with perturbing:
        perturbed = run(model, call)
    expected = SCALE * (cond - perturbed)
    assert expected.abs().max() > 1e-3
    return expected


def costs_a_forward(guider: Any) -> None:
    """Beside those of classifier-free guidance."""
    if guider.num_conditions != 3:
        raise NeitherNor(f"{guider.num_conditions} forwards, expected 3")


class NeitherNor(Exception):
    """diffusers does neither what is right nor what its defect was."""


def judge(got: Tensor, right: Tensor, wrong: Tensor, tolerance: float = 2e-5) -> None:
    """Pass on the right result, fail as expected on the described wrong one, else tell."""
    errors = [float((got - value).abs().max()) for value in (right, wrong)]
    bound = tolerance * max(1.0, float(right.abs().max()))
    if errors[0] <= bound:
        return
    if errors[1] > bound:
        raise NeitherNor(f"off the right result by {errors[0]:.3g}, the wrong by {errors[1]:.3g}")
    raise AssertionError(f"the wrong result, off the right one by {errors[0]:.3g}")


def crashing(attempt: Callable[[], Tensor], words: str) -> Tensor:
    """Its result, or its crash, if that is the described one."""
    try:
        return attempt()
    except Exception as error:
        if words not in str(error):
            raise NeitherNor(f"crashed in another way: {error}") from error
        raise


def same(
    got: Tensor, model: Any, call: dict[str, Any], perturbing: Callable[[], AbstractContextManager]
) -> None:
    close(got, pushed_by_hand(model, call, perturbing()), 2e-5)
