"""Guidance end to end: a tiny real pipeline hands its scheduler what an explicit addition gives."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tiny_by_hand import denoisers, explicit, recorded
from tiny_editing import EDITING
from tiny_oracle import close, fingerprint, toward_identity
from tiny_pipelines import _quiet, _rand, _vae, render
from tiny_wide import make

from attn_control import attach
from attn_control.processors import SoftPAG

MID = "mid_block.attentions.0.transformer_blocks.0.attn1"
UNET = ("L2H1-2", {MID: (1, 2)})
FLUX = ("L0H0, L2H1", {"transformer_blocks.0.attn": (0,), "single_transformer_blocks.0.attn": (1,)})
WAN = ("L0H1", {"blocks.0.attn1": (1,)})
# The selector of each kind of model, and the same heads written out by module.
WHERE = {
    "sd15": UNET,
    "sdxl": ("L3H1-2", {MID: (1, 2)}),
    "sd3": ("L1H1", {"transformer_blocks.1.attn": (1,)}),
    "flux": FLUX,
    "wan": WAN,
    "z": ("L1H1", {"layers.1.attention": (1,)}),
}


def z_image():
    """One batch, the conditional rows first; its pipeline turns the prediction's sign."""
    model = make(
        "ZImageTransformer2DModel", in_channels=4, dim=32, n_layers=2, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[4, 4, 8], axes_lens=[256, 32, 32],
    )()  # fmt: skip
    pipe = diffusers.ZImagePipeline(
        transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=_vae(),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip
    call = {
        "prompt_embeds": [_rand(5, 32, seed=1)],
        "negative_prompt_embeds": [_rand(9, 32, seed=2)],
        "height": 32,
        "width": 32,
        "guidance_scale": 1.0,  # its own formula: cond + scale * (cond - uncond)
        "num_inference_steps": 2,  # rounding grows with every step of this model
    }
    return _quiet(pipe), call, "pos neg"


PIPELINES = EDITING | {"z_image": z_image}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_prediction_is_guided_as_by_hand(name):
    pipe, call, layout = PIPELINES[name]()
    selector, heads = WHERE[name.split("_")[0]]
    changes = {site: toward_identity(which, 0.6) for site, which in heads.items()}
    plain, _ = recorded(pipe, call)
    before = fingerprint(*denoisers(pipe))  # the first run leaves diffusers' own hook registry
    with attach(pipe, SoftPAG(selector, u=0.6, scale=2.0)) as session:
        got, predictions = recorded(pipe, call)
    sign = -1.0 if name == "z_image" else 1.0
    expected, wanted = explicit(pipe, call, layout, changes, 2.0, sign=sign)
    assert len(predictions) == len(wanted) > 1
    for ours, theirs in zip(predictions, wanted, strict=True):
        close(ours, theirs)
    close(got, expected)
    assert (got - plain).abs().max() > 1e-3  # or the comparison would prove nothing
    assert session.report().guided["calls"] == len(predictions)
    assert fingerprint(*denoisers(pipe)) == before


RIDING = (
    "sd15_inpaint_nine", "sd15_pix2pix", "sdxl_image", "sd15_controlnet", "sd3_controlnet",
    "flux_kontext_true_cfg", "flux_fill", "wan_image", "wan_vace",
)  # fmt: skip


@pytest.mark.parametrize("name", RIDING)
def test_perturbed_rows_in_the_pipelines_own_forward_give_the_same(name):
    pipe, call, layout = PIPELINES[name]()
    selector, heads = WHERE[name.split("_")[0]]
    changes = {site: toward_identity(which, 0.6) for site, which in heads.items()}
    with attach(pipe, SoftPAG(selector, u=0.6, scale=2.0, batched=True)) as session:
        _, predictions = recorded(pipe, call)
    assert session.report().guided["calls"] == 0
    _, wanted = explicit(pipe, call, layout, changes, 2.0)
    for ours, theirs in zip(predictions, wanted, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("name", PIPELINES)
def test_nothing_asked_for_changes_nothing_and_nothing_stays(name):
    pipe, call, _ = PIPELINES[name]()
    selector, _ = WHERE[name.split("_")[0]]
    plain = render(pipe, call)
    for control in (SoftPAG(selector, u=0.0), SoftPAG(selector, scale=0.0)):
        with attach(pipe, control):
            assert torch.equal(render(pipe, call), plain)
    with attach(pipe):
        assert torch.equal(render(pipe, call), plain)
    with attach(pipe, SoftPAG(selector, u=0.6)):
        assert not torch.equal(render(pipe, call), plain)
    assert torch.equal(render(pipe, call), plain)


@pytest.mark.parametrize("name", ["sd15_image", "flux_kontext_true_cfg", "wan_image"])
def test_a_window_counts_the_steps_that_the_pipeline_takes(name):
    """Image to image begins late: progress is of the whole schedule."""
    pipe, call, layout = PIPELINES[name]()
    selector, heads = WHERE[name.split("_")[0]]
    changes = {site: toward_identity(which, 0.6) for site, which in heads.items()}
    with attach(pipe, SoftPAG(selector, u=0.6, scale=2.0, window="0.5-1")) as session:
        _, predictions = recorded(pipe, call)
    last = len(predictions) - 1  # of 3 steps, 0.67 alone
    _, wanted = explicit(pipe, call, layout, changes, 2.0, due=lambda step, _: step == last)
    for ours, theirs in zip(predictions, wanted, strict=True):
        close(ours, theirs)
    assert list(session.report().controls[0].steps.values()) == [[2]]


def test_the_reference_of_kontext_is_left_alone_where_only_the_picture_is_meant():
    """16 tokens of the picture, then 16 of the reference that the pipeline appends."""
    pipe, call, layout = EDITING["flux_kontext"]()
    for tokens, span in (("image", slice(5, 21)), ("reference", slice(21, 37))):
        changes = {"transformer_blocks.1.attn": toward_identity((0, 1), 1.0, span)}
        with attach(pipe, SoftPAG("L1", scale=2.0, tokens=tokens)):
            _, predictions = recorded(pipe, call)
        _, wanted = explicit(pipe, call, layout, changes, 2.0)
        for ours, theirs in zip(predictions, wanted, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("rows", [1, 2])
def test_three_branches_of_pix2pix(rows):
    """[text, image, neither]: coefficients that sum to one, so that a difference passes through."""
    pipe, call, layout = EDITING["sd15_pix2pix"]()
    call |= {"num_images_per_prompt": rows}
    with attach(pipe, SoftPAG("L2H1-2", u=0.6, scale=2.0)) as session:
        _, predictions = recorded(pipe, call)
    assert session.step.branch == ("cond",) * rows + ("other:image",) * rows + ("uncond",) * rows
    changes = {MID: toward_identity((1, 2), 0.6)}
    _, wanted = explicit(pipe, call, layout, changes, 2.0)
    for ours, theirs in zip(predictions, wanted, strict=True):
        close(ours, theirs)


ONE = {
    "transformer:L0H1": ("transformer",),
    "transformer_2:L0H1": ("transformer_2",),
    "transformer:L0H1, transformer_2:L0H1": ("transformer", "transformer_2"),
    "L0H1": ("transformer", "transformer_2"),
}


@pytest.mark.parametrize("selector", ONE)
def test_either_denoiser_of_wan_2_2_or_both(selector):
    pipe, call, layout = EDITING["wan_image_two"]()
    with attach(pipe, SoftPAG(selector, u=0.6, scale=2.0)) as session:
        _, predictions = recorded(pipe, call)
    changes = {"blocks.0.attn1": toward_identity((1,), 0.6)}
    meant = [getattr(pipe, name) for name in ONE[selector]]
    high = pipe.transformer in meant, pipe.transformer_2 in meant
    due = {n: high[n >= 2] for n in range(4)}  # timesteps 1000, 667 | 334, 1
    _, wanted = explicit(pipe, call, layout, changes, 2.0, due=lambda step, _: due[step])
    for ours, theirs in zip(predictions, wanted, strict=True):
        close(ours, theirs)
    sites = session.report().to_dict()["controls"][0]["sites"]
    assert set(sites) == {f"{name}.blocks.0.attn1" for name in ONE[selector]}
