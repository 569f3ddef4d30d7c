"""Perturbed rows in the pipeline's own forward: as many pictures, fewer forwards."""

from __future__ import annotations

import diffusers
import pytest
import test_attach_only
import tiny
import tiny_pipelines
import torch
from guides_shared import run
from tiny_oracle import close, forwards

from attn_control import AttnControlError, attach
from attn_control.processors import NAG, SEG, HeadGate, SkipLayers, SoftPAG

GUIDES = {
    "SoftPAG": lambda **o: SoftPAG("L1H1", scale=2.0, **o),
    "permute": lambda **o: SoftPAG("L1", op="permute", tokens="image", **o),
    "SEG": lambda **o: SEG("L1", sigma=1.0, **o),
    "SkipLayers": lambda **o: SkipLayers("L1", u=0.7, **o),
    "whole block": lambda **o: SkipLayers("L1", **o),
    "stochastic": lambda **o: SkipLayers("L0-1", stochastic=1, **o),
    "apg": lambda **o: SoftPAG("L1", parallel=0.0, limit=0.4, rescale=0.5, **o),
}


def _model(pipe):
    return getattr(pipe, "transformer", None) or pipe.unet


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "flux_true_cfg", "wan"])
@pytest.mark.parametrize("guide", GUIDES)
def test_draws_what_separate_forwards_draw(name, guide):
    pipe, call = tiny_pipelines.PIPELINES[name]()
    call["num_inference_steps"] = 2
    drawn = []
    for batched in (False, True):
        control = GUIDES[guide](batched=batched)
        with attach(pipe, control, strict=True) as session, forwards(_model(pipe)) as rows:
            drawn.append(tiny_pipelines.render(pipe, call))
        cond = {"flux": [1], "flux_true_cfg": [1, 1], "wan": [1, 1]}.get(name, [2])
        apart = [cond[0], 1, *cond[1:]]
        assert rows == 2 * ([cond[0] + 1, *cond[1:]] if batched else apart)
        preview = session.preview(2)
        assert preview.row_forwards(sum(cond)) == sum(rows)
        assert preview.extra_forwards == (0 if batched else 2)
        assert list(session.report().controls[0].steps.values()) == [[0, 1]]
    close(drawn[1], drawn[0])


def test_several_ride_together_beside_one_that_does_not_and_one_in_place():
    pipe, call = tiny_pipelines.sd3()
    drawn = []
    for batched in (False, True):
        controls = (
            SoftPAG("L1H1", scale=2.0, batched=batched),
            HeadGate("L0H2", gain=0.5),
            SEG("L2", sigma=1.0, batched=batched, window="0.5-1"),
            SoftPAG("L0H0", u=0.5),
        )
        with attach(pipe, *controls, strict=True) as session, forwards(pipe.transformer) as rows:
            drawn.append(tiny_pipelines.render(pipe, call))
        want = [3, 1, 3, 1, 4, 1, 4, 1] if batched else [2, 1, 1] * 2 + [2, 1, 1, 1] * 2
        assert rows == want and session.preview(4).row_forwards(2) == sum(rows)
    close(drawn[1], drawn[0])


def test_several_prompts_ride_with_gates_of_their_own():
    model, call = tiny.sd3(), tiny.inputs("sd3", batch=3)
    gates = torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found, slopes = [], []
    for batched in (False, True):
        with attach(model, SoftPAG.from_gates(gates, batched=batched)):
            found.append(model(**call, return_dict=False)[0])
        slopes += torch.autograd.grad(found[-1].square().sum(), gates)
    close(found[1].detach(), found[0].detach())
    close(slopes[1], slopes[0])


def test_the_pipelines_own_rows_are_not_perturbed():
    """With a scale so small that it does not count, the plain prediction comes back."""
    model, call = tiny.sd3(), tiny.inputs("sd3")
    with attach(model, SoftPAG("all", scale=1e-9, batched=True)):
        close(run(model, call), run(tiny.sd3(), call), 1e-6)


def test_an_argument_with_unknown_rows_is_refused():
    pipe, call = tiny_pipelines.sd3()
    call["joint_attention_kwargs"] = {"unheard_of": torch.zeros(1)}
    with pytest.raises(AttnControlError, match="cannot repeat the rows of SD3Transformer2DModel"):
        with attach(pipe, SoftPAG("L1", batched=True)):
            tiny_pipelines.render(pipe, call)


def test_frames_folded_into_the_batch_are_refused():
    model, call = test_attach_only._animatediff()
    with pytest.raises(AttnControlError, match="cannot repeat the rows"):
        with attach(model, SoftPAG("L0", batched=True)):
            run(model, call)


def test_a_perturbation_without_effect_is_found_out():
    """The last block's text is thrown away: perturbing it changes nothing."""
    model, call = tiny.sd3(), tiny.inputs("sd3")
    with pytest.raises(AttnControlError, match="the prediction did not change"):
        with attach(model, SoftPAG("L2", tokens="text", batched=True)):
            run(model, call)


def test_compiled_whole():
    torch._dynamo.reset()
    pipe, call = tiny_pipelines.sd3(tiny.sd3(layers=2))
    control = SoftPAG("L0H1", batched=True)
    with attach(pipe, control):
        want = tiny_pipelines.render(pipe, call)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    with attach(pipe, control, strict=True):
        close(tiny_pipelines.render(pipe, call), want)
    torch._dynamo.reset()


BAD = [
    (lambda: SoftPAG("L1", batched=1), "batched must be True or False, got 1"),
    (lambda: SEG("L1", fused=True, batched=True), "batched=True has no meaning with fused=True"),
    (lambda: SoftPAG("L1", u=-1.0, batched=True), "batched=True has no meaning with u below 0"),
    (lambda: attach(tiny.sd3(), NAG(), SEG("L1", batched=True)), "rows that run twice cannot"),
    (
        lambda: attach(
            tiny.sd3(), SkipLayers("L1", batched=True), SkipLayers("L0-1", batched=True)
        ),
        "both leave out the same block in one forward: L1",
    ),
]


@pytest.mark.parametrize(("make", "words"), BAD)
def test_what_does_not_go_together_is_named(make, words):
    with pytest.raises(AttnControlError, match=words):
        make()


@pytest.mark.parametrize("window", ["0-1", "0-0.5"])
def test_beside_a_step_cache_as_in_forwards_of_their_own(window):
    """The first block's cache keeps three rows apart from one: at the window's end the batch
    shrinks.
    """
    drawn = []
    for batched in (False, True):
        pipe, call = tiny_pipelines.flux(true_cfg=True)
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
        with attach(pipe, SoftPAG("L1", scale=2.0, window=window, batched=batched), strict=True):
            drawn.append(tiny_pipelines.render(pipe, call | {"num_inference_steps": 6}))
    if window == "0-1":
        close(drawn[1], drawn[0])
    assert torch.isfinite(drawn[1]).all()
