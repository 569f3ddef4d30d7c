"""diffusers' PAG pipeline for SD3 (B13, B14): more layers than asked for, and rows left damaged."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers.models.attention_processor import PAGCFGJointAttnProcessor2_0
from tiny_guiders import NeitherNor, crashing, judge, run, upstream
from tiny_oracle import attention, close, toward_identity

from attn_control import AttnControlError, attach
from attn_control.processors import SoftPAG


def pag_pipeline(model):
    plain, call = tiny_pipelines.sd3(model)
    own = inspect.signature(diffusers.StableDiffusion3PAGPipeline.__init__).parameters
    parts = {name: part for name, part in plain.components.items() if name in own}
    pipe = diffusers.StableDiffusion3PAGPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def perturbed_modules(model):
    pipe, _ = pag_pipeline(model)
    pipe._set_pag_attn_processor(pipe.pag_applied_layers, True)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "processor", None), PAGCFGJointAttnProcessor2_0)
    }


def expect(found, right, wrong):
    if found != right and found != wrong:
        raise NeitherNor(f"found {found}")
    assert found == right


@pytest.mark.parametrize("dual", [(), (0, 1)])
def test_b13_a_selector_names_one_layer(dual):
    model = tiny.sd3(layers=12, dual=dual)
    with attach(model, SoftPAG("L1")) as session:
        sites = session.report().to_dict()["controls"][0]["sites"]
    assert set(sites) == {"transformer.transformer_blocks.1.attn"}


@upstream(
    "B13", "the default pag_applied_layers 'blocks.1' is searched for, and found in blocks.10"
)
def test_b13_the_pipeline():
    found = perturbed_modules(tiny.sd3(layers=12))
    wrong = {f"transformer_blocks.{n}.attn" for n in (1, 10, 11)}
    expect(found, {"transformer_blocks.1.attn"}, wrong)


@upstream("B13", "the default pag_applied_layers takes the second attention of SD3.5's blocks too")
def test_b13_the_pipeline_on_sd35():
    found = perturbed_modules(tiny.sd3(dual=(0, 1)))
    right = {"transformer_blocks.1.attn"}
    expect(found, right, right | {"transformer_blocks.1.attn2"})


SITE = "transformer_blocks.1.attn"


@upstream("B14", "PAG's processors leave out the norms of queries and keys, for every row")
def test_b14_rows_that_are_not_perturbed():
    model, call = tiny.sd3(), tiny.inputs("sd3", batch=3)
    right = run(model, call)[:2]
    model.get_submodule(SITE).processor = PAGCFGJointAttnProcessor2_0()
    got = run(model, call)[:2]
    model.get_submodule(
        SITE
    ).processor = diffusers.models.attention_processor.JointAttnProcessor2_0()
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        setattr(model.get_submodule(SITE), name, None)
    judge(got, right, wrong=run(model, call)[:2])


@upstream(
    "B14", "PAG's processors need a text, which SD3.5's second attention has not", AttributeError
)
def test_b14_the_pipeline_on_sd35():
    pipe, call = pag_pipeline(tiny.sd3(dual=(0, 1)))
    crashing(lambda: pipe(**call, pag_scale=2.0, output_type="latent")[0], "NoneType")


@pytest.mark.parametrize("selector", ["L1.joint", "L1.self2", "L1.joint, L1.self2"])
def test_b14_sd35_guided_leaves_the_pipelines_own_rows_alone(selector):
    model = tiny.sd3(dual=(0, 1))
    pipe, call = tiny_pipelines.sd3(model)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    call |= {"latents": latents, "num_inference_steps": 1, "output_type": "latent"}
    outputs = []
    hook = model.register_forward_hook(lambda m, a, o: outputs.append(o[0]))
    pipe(**call)
    with attach(pipe, SoftPAG(selector, u=1.0, scale=2.0)):
        guided = pipe(**call)[0]
    hook.remove()
    stock, ours, perturbed = outputs
    assert torch.equal(stock, ours)
    names = {"joint": SITE, "self2": "transformer_blocks.1.attn2"}
    changes = {
        name: toward_identity(range(4), 1.0) for key, name in names.items() if key in selector
    }
    given = {
        "hidden_states": latents,
        "timestep": pipe.scheduler.timesteps[:1],
        "encoder_hidden_states": call["prompt_embeds"],
        "pooled_projections": call["pooled_prompt_embeds"],
    }
    with attention(model, changes):
        expected = run(model, given)
    close(perturbed, expected)
    uncond, cond = stock
    prediction = uncond + 4.0 * (cond - uncond) + 2.0 * (cond - expected[0])
    pipe.scheduler.set_timesteps(1)
    close(guided, pipe.scheduler.step(prediction[None], given["timestep"][0], latents)[0])


def test_a_pipeline_that_perturbs_rows_itself_is_refused():
    pipe, call = pag_pipeline(tiny.sd3())
    with attach(pipe, SoftPAG("L2")):
        with pytest.raises(AttnControlError, match="runs its own perturbed rows; use the plain"):
            pipe(**call, pag_scale=2.0, output_type="latent")
