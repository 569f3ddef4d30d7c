"""Guidance fused into the negative pass: whole runs against loops by hand, and runs without one."""

from __future__ import annotations

import copy

import pytest
import test_attach_only
import test_z_image
import tiny
import tiny_loops
import tiny_pipelines
import torch
from guides_shared import run
from tiny_oracle import attention, close, fingerprint, forwards, toward_identity

from attn_control import AttnControlError, attach
from attn_control.processors import SEG, SkipLayers, SoftPAG

FUSED = SoftPAG("L1H1", u=0.6, fused=True)
PERTURBED = {"transformer_blocks.1.attn": toward_identity((1,), 0.6)}


def _loop(pipe, call, latents, due):
    """SD3 whose negative prediction is the perturbed one at the due steps, row by row."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(call["num_inference_steps"])
    for number, t in enumerate(scheduler.timesteps):
        found = {}
        for name in ("", "negative_"):
            given = {
                "hidden_states": latents,
                "timestep": t.expand(1),
                "encoder_hidden_states": call[f"{name}prompt_embeds"],
                "pooled_projections": call[f"{name}pooled_prompt_embeds"],
            }
            with attention(pipe.transformer, PERTURBED if name and due(number) else {}):
                found[name] = run(pipe.transformer, given)
        guided = found["negative_"] + call["guidance_scale"] * (found[""] - found["negative_"])
        latents = scheduler.step(guided, t, latents)[0]
    return latents


@pytest.mark.parametrize("window", ["0-1", "0.5-1"])
def test_the_negative_prediction_is_the_perturbed_one(window):
    pipe, call = tiny_pipelines.sd3()
    latents = tiny_loops.start("sd3")
    want = _loop(pipe, call, latents, lambda n: window == "0-1" or n >= 2)
    control = SoftPAG("L1H1", u=0.6, fused=True, window=window)
    plain = tiny_pipelines.render(pipe, {**call, "latents": latents})
    with attach(pipe, control, strict=True) as session, forwards(pipe.transformer) as rows:
        got = tiny_pipelines.render(pipe, {**call, "latents": latents})
    close(got, want)
    assert (got - plain).abs().max() > 1e-3
    assert rows == [2] * 4  # as many as without guidance by perturbation
    assert session.preview(4).extra_forwards == 0
    steps = [0, 1, 2, 3] if window == "0-1" else [2, 3]
    assert list(session.report().controls[0].steps.values()) == [steps]


@pytest.mark.parametrize("name", ["flux_true_cfg", "wan", "sd15"])
@pytest.mark.parametrize(
    "make", [lambda **o: SoftPAG("L1", **o), lambda **o: SkipLayers("L1", **o)]
)
def test_no_row_is_added_and_a_run_repeats(name, make):
    pipe, call = tiny_pipelines.PIPELINES[name]()
    call["num_inference_steps"] = 2
    model = pipe.unet if name == "sd15" else pipe.transformer
    plain = tiny_pipelines.render(pipe, call)
    with attach(pipe, make(fused=True), strict=True), forwards(model) as rows:
        first = tiny_pipelines.render(pipe, call)
        assert rows == ([2] * 2 if name == "sd15" else [1] * 4)
        assert torch.equal(first, tiny_pipelines.render(pipe, call))
    assert (first - plain).abs().max() > 1e-4


def test_a_block_that_is_left_out_whole_is_not_computed_in_a_negative_call():
    pipe, call = tiny_pipelines.flux(true_cfg=True)
    ran = []
    pipe.transformer.transformer_blocks[1].ff.register_forward_hook(lambda *_: ran.append(1))
    with attach(pipe, SkipLayers("L1", fused=True)):
        tiny_pipelines.render(pipe, call)
    assert len(ran) == 4  # of 4 steps of 2 calls


def test_a_batched_run_without_guidance_is_refused_at_its_first_call():
    pipe, call = tiny_pipelines.sd3()
    before = fingerprint(pipe.transformer)
    with pytest.raises(AttnControlError, match="fused into the negative pass, which this run does"):
        with attach(pipe, FUSED), forwards(pipe.transformer) as rows:
            tiny_pipelines.render(pipe, call | {"guidance_scale": 1.0})
    assert rows == [] and fingerprint(pipe.transformer) == before


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_split_run_without_guidance_is_refused_at_its_second_step(name):
    """Before that nobody knows: the negative call comes after the conditional one."""
    pipe, call = tiny_pipelines.PIPELINES[name]()
    call |= {"guidance_scale": 1.0}
    with pytest.raises(AttnControlError, match="turn classifier-free guidance on"):
        with attach(pipe, FUSED), forwards(pipe.transformer) as rows:
            tiny_pipelines.render(pipe, call)
    assert rows == [1]


def test_a_split_run_of_one_step_says_at_the_end_that_it_had_none():
    pipe, call = tiny_pipelines.flux()
    with pytest.raises(AttnControlError, match="no negative pass fell into window"):
        with attach(pipe, FUSED, strict=True):
            tiny_pipelines.render(pipe, call | {"num_inference_steps": 1})


def test_a_bare_model_is_refused():
    model = tiny.sd3()
    with pytest.raises(AttnControlError, match="fused into the negative pass"):
        with attach(model, FUSED):
            run(model, tiny.inputs("sd3"))


def test_a_run_that_stops_guiding_midway_goes_on():
    pipe, call = tiny_pipelines.sd3()

    def stop(pipe, step, t, kwargs):
        if step == 1:
            pipe._guidance_scale = 1.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"][-1:]
            kwargs["pooled_prompt_embeds"] = kwargs["pooled_prompt_embeds"][-1:]
        return kwargs

    call |= {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs":
             ["latents", "prompt_embeds", "pooled_prompt_embeds"]}  # fmt: skip
    with attach(pipe, FUSED, strict=True) as session, forwards(pipe.transformer) as rows:
        tiny_pipelines.render(pipe, call)
    assert rows == [2, 2, 1, 1]
    assert list(session.report().controls[0].steps.values()) == [[0, 1]]


@pytest.mark.parametrize("what", ["head", "attention"])
def test_negative_rows_may_come_second(what):
    """Z-Image: rows in lists, the conditional one first."""
    model, call = test_z_image.MAKE(), test_z_image._call()
    pipe = type("Pipe", (), {"do_classifier_free_guidance": True})()
    pipe.transformer, pipe.scheduler = model, tiny_pipelines.sd3()[0].scheduler
    pipe.scheduler.set_timesteps(4)
    plain = test_z_image._run(model, call)
    if what == "head":
        control = SoftPAG("L1H1", u=0.6, fused=True)
        with attention(model, {test_z_image.SITE: toward_identity((1,), 0.6)}):
            perturbed = test_z_image._run(model, call)
    else:  # the branch ends behind its norm
        control = SkipLayers("L1", what="attention", u=0.6, fused=True)
        norm = model.layers[1].attention_norm2
        hook = norm.register_forward_hook(lambda module, given, out: 0.4 * out)
        perturbed = test_z_image._run(model, call)
        hook.remove()
    with attach(pipe, control, strict=True):
        got = test_z_image._run(model, call)
    close(got, torch.stack([plain[0], perturbed[1]]))
    assert (plain[1] - perturbed[1]).abs().max() > 1e-4


def test_rows_that_are_not_the_batchs_are_refused():
    model, call = test_attach_only._animatediff()
    pipe = type("Pipe", (), {"do_classifier_free_guidance": True})()
    pipe.unet, pipe.scheduler = model, tiny_pipelines.sd15()[0].scheduler
    pipe.scheduler.set_timesteps(4)
    call["timestep"] = pipe.scheduler.timesteps[0]
    for control in (SoftPAG("L0", fused=True), SkipLayers("L0", what="attention", fused=True)):
        with pytest.raises(AttnControlError, match="other rows than the batch.*uncond rows"):
            with attach(pipe, control), torch.no_grad():
                model(**call)


def test_gates_reach_the_negative_rows_and_their_gradients():
    pipe, call = tiny_pipelines.sd3()
    gates = torch.zeros(3, 4, requires_grad=True)
    pipe.scheduler.set_timesteps(4)
    pipe._guidance_scale = 4.0
    inner = tiny.inputs("sd3") | {"timestep": pipe.scheduler.timesteps[:1].expand(2)}
    with attach(pipe, SoftPAG.from_gates(gates, fused=True)):
        out = pipe.transformer(**inner, return_dict=False)[0]
    (on_cond,) = torch.autograd.grad(out[1].square().sum(), gates, retain_graph=True)
    (on_uncond,) = torch.autograd.grad(out[0].square().sum(), gates)
    assert on_cond.abs().max() == 0 and on_uncond.abs().min() > 0


def test_compiled_whole():
    torch._dynamo.reset()
    pipe, call = tiny_pipelines.sd3()
    controls = SkipLayers("L1", u=0.5, fused=True), SoftPAG("L0H1", fused=True)
    with attach(pipe, *controls):
        want = tiny_pipelines.render(pipe, call)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    with attach(pipe, *controls, strict=True):
        close(tiny_pipelines.render(pipe, call), want)
    torch._dynamo.reset()


BAD = [
    (lambda: SoftPAG("L1", fused=1), "fused must be True or False, got 1"),
    (lambda: SoftPAG("L1", fused=True, scale=2.0), "scale=2.0 has no meaning with fused=True"),
    (lambda: SEG("L1", fused=True, limit=1.0), "limit=1.0 has no meaning"),
    (lambda: SkipLayers("L1", fused=True, rescale=0.5), "rescale=0.5 has no meaning"),
    (lambda: SEG("L1", fused=True, parallel=0.0), "parallel=0.0 has no meaning"),
    (lambda: SoftPAG("L1", fused=True, u=-0.5), "fused=True has no meaning with u below 0"),
]


@pytest.mark.parametrize(("make", "words"), BAD)
def test_options_without_a_meaning_are_refused(make, words):
    with pytest.raises(AttnControlError, match=words):
        make()
