"""What is kept, for whom, and when it is forgotten."""

from __future__ import annotations

import diffusers
import pytest
import tiny
import tiny_pipelines
import torch
from sparse_shared import at, attend, call_of, random_mask, softmax_of, tensors, video

from attn_control import AttnControlError, attach
from attn_control.policy import DENSE, REFRESH, SPARSE, StepPolicy
from attn_control.processors import (
    NeighborhoodAttention,
    RadialAttention,
    SelectedAttention,
    SoftPAG,
)
from attn_control.state import Memory

MASK = random_mask()
NEAR = NeighborhoodAttention(kernel=3, policy=StepPolicy(first=1, refresh=3))


@pytest.mark.parametrize("correction", ["residual", "lse", "share"])
def test_branches_in_one_call_are_branches_in_two(correction):
    together, apart = (softmax_of(MASK, correction) for _ in range(2))
    for level in range(5):
        both = tensors(rows=2, seed=level)
        out = attend(together, at(level, ("uncond", "cond")), call_of(*both))
        for row, branch in enumerate(("uncond", "cond")):
            own = call_of(*(x[row : row + 1] for x in both))
            got = attend(apart, at(level, (branch,)), own)
            torch.testing.assert_close(got, out[row : row + 1], rtol=1e-12, atol=1e-12)


def test_a_branch_does_not_read_anothers_state():
    softmax = softmax_of(MASK)
    for branch, seed in (("cond", 0), ("uncond", 1), ("perturbed:1", 2)):
        attend(softmax, at(0, (branch,)), call_of(*tensors(seed=seed)))
    assert {key[1][-1] for key in softmax.memory._kept} == {"cond", "uncond", "perturbed:1"}
    booked = {row.branch for row in softmax.ledger.rows}
    assert booked == {"cond", "uncond"}, "extra forwards are not the pipeline's"


@pytest.mark.parametrize(
    "change",
    [lambda qkv: [x[:, :, :64] for x in qkv], lambda qkv: [x.float() for x in qkv],
     lambda qkv: [x.repeat(2, 1, 1, 1) for x in qkv]],
)  # fmt: skip
def test_another_shape_or_type_is_a_refresh(change):
    memory = Memory()
    first = softmax_of(MASK, memory=memory)
    attend(first, at(0), call_of(*tensors()))
    now = change(tensors(seed=1))
    tokens = now[0].shape[2]
    other = softmax_of(random_mask(tokens), memory=memory)
    call = call_of(*now)
    branch = ("cond",) * now[0].shape[0]
    assert torch.equal(attend(other, at(1, branch), call), call.original())
    assert other.ledger.rows[-1].outcome == REFRESH


def test_a_new_run_of_the_thread_forgets_the_last():
    softmax = softmax_of(MASK)
    attend(softmax, at(0, run=1), call_of(*tensors()))
    attend(softmax, at(5, run=2), call_of(*tensors()))
    assert [row.outcome for row in softmax.ledger.rows] == [REFRESH, REFRESH]
    assert {run for run, _ in softmax.memory._kept} == {2}


def test_two_calls_at_one_level_come_to_the_same():
    """As Heun's: both refresh, or both are sparse, and the second changes no later step."""
    once, twice = softmax_of(MASK, "rho", gain=0.1), softmax_of(MASK, "rho", gain=0.1)
    for level in range(5):
        call = call_of(*tensors(seed=level))
        expected = attend(once, at(level), call)
        for _ in range(2):
            assert torch.equal(attend(twice, at(level), call), expected)


# ---- in pipelines


@pytest.mark.parametrize("control", [NEAR, SelectedAttention(keep=0.4, correction="lse")], ids=str)
def test_the_second_call_equals_the_first(control):
    pipe, call = video()
    with attach(pipe, control, strict=True):
        first, second = (tiny_pipelines.render(pipe, call) for _ in range(2))
    assert torch.equal(first, second)


def test_another_size_in_the_same_session_is_as_in_one_of_its_own():
    sizes = (96, 64, 96)
    pipe, call = video(steps=4)
    with attach(pipe, NEAR):
        mixed = [tiny_pipelines.render(pipe, call | {"height": n, "num_frames": f})
                 for n, f in zip(sizes, (9, 13, 9), strict=True)]  # fmt: skip
    for size, frames, got in zip(sizes, (9, 13, 9), mixed, strict=True):
        with attach(pipe, NEAR):
            own = tiny_pipelines.render(pipe, call | {"height": size, "num_frames": frames})
        assert torch.equal(got, own)


def test_an_exception_leaves_nothing_behind():
    pipe, call = video(steps=4)
    with attach(pipe, NEAR) as session:
        expected = tiny_pipelines.render(pipe, call)

        def stop(pipe, index, timestep, kwargs):
            if index == 2:
                pipe.transformer.blocks[1].attn1.to_q.register_forward_pre_hook(fail)
            return {}

        def fail(module, args):
            raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            tiny_pipelines.render(pipe, call | {"callback_on_step_end": stop})
        assert not session._denoisers[0].phases.records.memory._kept
        pipe.transformer.blocks[1].attn1.to_q._forward_pre_hooks.clear()
        assert torch.equal(tiny_pipelines.render(pipe, call), expected)


def test_heun_is_treated_level_by_level():
    pipe, call = video(4, diffusers.FlowMatchHeunDiscreteScheduler(shift=1.0))
    with attach(pipe, NEAR) as session:
        tiny_pipelines.render(pipe, call)
    rows = session._entries[0][0].ledger.rows
    by_step = {row.index: row.outcome for row in rows if row.layer == "L0.self"}
    assert [by_step[n] for n in range(7)] == [DENSE, *[REFRESH] * 2, *[SPARSE] * 4]


def test_a_refresh_at_every_step_is_the_stock_pipeline():
    pipe, call = video(steps=4)
    plain = tiny_pipelines.render(pipe, call)
    for correction in ("none", "share", "residual", "rho", "lse"):
        policy = StepPolicy(first=0, refresh=1)
        with attach(pipe, NeighborhoodAttention(kernel=3, correction=correction, policy=policy)):
            assert torch.equal(tiny_pipelines.render(pipe, call), plain)


def test_dense_steps_are_the_stock_pipelines_own():
    """With all but the last step dense, the latents are stock until then."""
    pipe, call = video(steps=4)
    seen = {True: [], False: []}
    for sparse in (False, True):

        def keep(pipe, index, timestep, kwargs, into=seen[sparse]):
            into.append(kwargs["latents"].clone())
            return {}

        call["callback_on_step_end"] = keep
        control = RadialAttention(
            block=8, correction="none", policy=StepPolicy(first=3, refresh=None)
        )
        with attach(pipe, *([control] if sparse else [])):
            tiny_pipelines.render(pipe, call)
    equal = [torch.equal(a, b) for a, b in zip(seen[False], seen[True], strict=True)]
    assert equal == [True, True, True, False]


def test_a_guide_beside_it_has_state_of_its_own():
    pipe, call = video(steps=4)
    guide = SoftPAG("L1H0", u=0.5, scale=1e-12)
    with attach(pipe, NEAR) as session:
        alone = tiny_pipelines.render(pipe, call)
    with attach(pipe, NEAR, guide) as session:
        beside = tiny_pipelines.render(pipe, call)
        kept = {*session._denoisers[0].phases.records.memory._kept}
    torch.testing.assert_close(beside, alone)
    assert {key[1][-1] for key in kept} >= {"cond", "uncond", "perturbed:1"}


def test_a_bare_model_keeps_nothing_and_says_so():
    model, call = tiny.wan(), tiny.inputs("wan")
    with pytest.raises(AttnControlError, match="keeps what it computed from one step to the next"):
        with attach(model, NeighborhoodAttention(kernel=2)), torch.no_grad():
            model(**call)
    bare = StepPolicy(first=0, refresh=None)
    with attach(model, NeighborhoodAttention(kernel=2, correction="none", policy=bare)) as session:
        with torch.no_grad():
            model(**call)
    assert session.report().controls[0].outcomes == {"sparse": 2}
    with pytest.raises(AttnControlError, match="counts steps, but the sampler is not known"):
        with attach(model, NeighborhoodAttention(kernel=2, correction="none")), torch.no_grad():
            model(**call)
