"""Rows given as lists, the conditional ones first, each with a text length of its own."""

from __future__ import annotations

import diffusers
import pytest
import torch
from guides_shared import combine
from tiny_oracle import attention, close, toward_identity
from tiny_pipelines import _quiet, _vae
from tiny_wide import make, rand

from attn_control import attach
from attn_control.call import sample_of
from attn_control.errors import AttnControlError
from attn_control.families import family_of
from attn_control.processors import NAG, HeadGate, SoftPAG

MAKE = make(
    "ZImageTransformer2DModel",
    in_channels=4,
    dim=32,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=32,
    axes_dims=[4, 4, 8],
    axes_lens=[256, 32, 32],
)
SITE = "layers.1.attention"


def _call(first: int = 5, second: int = 7):
    return {
        "x": list(rand(2, 4, 1, 8, 8).unbind(0)),
        "t": torch.full((2,), 0.5),
        "cap_feats": [rand(first, 32, seed=1), rand(second, 32, seed=2)],
    }


def _run(model, call):
    with torch.no_grad():
        return sample_of(model(**call, return_dict=False))


@pytest.mark.parametrize("lengths", [(5, 7), (5, 40)])
def test_a_perturbed_head_guides_as_written(lengths):
    model, call = MAKE(), _call(*lengths)
    plain = _run(model, call)
    with attach(model):
        assert torch.equal(_run(model, call), plain)
    with attention(model, {SITE: toward_identity([1], 0.6)}):
        perturbed = _run(model, call)
    with attach(model, SoftPAG("L1H1", u=0.6, scale=1.5)):
        out = model(**call, return_dict=False)[0]
        assert isinstance(out, list) and len(out) == 2
        close(torch.stack(out), combine(plain, perturbed, 1.5))
        assert isinstance(model(**call).sample, list)
    assert torch.equal(_run(model, call), plain)


def test_the_layout_names_the_token_that_moves():
    model, call = MAKE(), _call()
    for name, module in model.named_modules():  # refiners would mix the tokens
        if "refiner" in name and hasattr(module, "processor"):
            torch.nn.init.zeros_(module.to_out[0].weight)
    with attach(model) as session:
        site = session.sites[0]
    layout = family_of(model).layout(site, call, model)
    assert [(s.role, s.length, s.grid) for s in layout.q] == [
        ("image", 16, (1, 4, 4)), ("pad", 16, None), ("text", 32, None),
    ]  # fmt: skip

    def look(call):
        with attention(model) as seen:
            _run(model, call)
        return seen[site.name][-1].q

    def moved(call):
        return [int(i) for i in (look(call) - plain).abs().amax((0, 1, 3)).nonzero().flatten()]

    plain = look(call)
    assert plain.shape[2] == layout.q_len
    for token in (0, 1, 6, 15):
        pictures = [x.clone() for x in call["x"]]
        for x in pictures:
            x[:, 0, token // 4 * 2, token % 4 * 2 + 1] += 1.0
        assert moved(call | {"x": pictures}) == [token]
    for token in (0, 3):
        texts = [text.clone() for text in call["cap_feats"]]
        for text in texts:
            text[token] += 1.0
        assert moved(call | {"cap_feats": texts}) == [32 + token]
    assert family_of(model).layout(site, _call(5, 40), model) is None


def test_pictures_that_are_not_square_run_row_by_row():
    model, call = MAKE(), _call() | {"x": list(rand(2, 4, 1, 4, 12).unbind(0))}
    for name, module in model.named_modules():
        if "refiner" in name and hasattr(module, "processor"):
            torch.nn.init.zeros_(module.to_out[0].weight)
    with attach(model) as session:
        site = session.sites[0]
    layout = family_of(model).layout(site, call, model)
    assert [(s.role, s.length, s.grid) for s in layout.q] == [
        ("image", 12, (1, 2, 6)), ("pad", 20, None), ("text", 32, None),
    ]  # fmt: skip
    poked = [x.clone() for x in call["x"]]
    for x in poked:
        x[:, 0, 3, 8] += 1.0
    looks = []
    for given in (call["x"], poked):
        with attention(model) as seen:
            _run(model, call | {"x": given})
        looks.append(seen[site.name][-1].q)
    moved = (looks[0] - looks[1]).abs().amax((0, 1, 3)).nonzero().flatten().tolist()
    assert moved == [1 * 6 + 4]


def test_rows_without_a_common_layout_and_texts_in_lists_are_refused():
    model = MAKE()
    with attach(model, HeadGate("L1H1", gain=0.5, tokens="image")):
        _run(model, _call())
        with pytest.raises(AttnControlError, match="Z-Image, but the rows of this batch"):
            _run(model, _call(5, 40))
    with attach(model, NAG("L1", negative=rand(1, 5, 32))):
        with pytest.raises(AttnControlError, match="cannot repeat the rows of ZImage"):
            _run(model, _call())


@pytest.mark.parametrize("options", [{}, {"cfg_truncation": 0.4}, {"guidance_scale": 0.0}])
def test_the_pipeline_puts_its_conditional_rows_first(options):
    pipe = _quiet(
        diffusers.ZImagePipeline(
            transformer=MAKE(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=_vae(),
            text_encoder=None,
            tokenizer=None,
        )
    )
    call = {
        "prompt_embeds": [rand(5, 32, seed=1)],
        "negative_prompt_embeds": [rand(40, 32, seed=2)],
        "height": 32,
        "width": 32,
        "guidance_scale": 3.0,
        "num_inference_steps": 4,
        "output_type": "latent",
    } | options

    def run():
        return pipe(**call, generator=torch.Generator().manual_seed(0))[0]

    plain, steps = run(), []
    with attach(pipe, SoftPAG("L1H1", u=0.6, scale=2.0, tokens="image")) as session:
        hook = pipe.transformer.register_forward_pre_hook(lambda *_: steps.append(session.step))
        changed = run()
        hook.remove()
    assert not torch.equal(changed, plain) and torch.equal(run(), plain)
    branches = {step.index: step.branch for step in steps}
    assert sorted(branches) == [0, 1, 2, 3]
    if not options:
        assert set(branches.values()) == {("cond", "uncond")}
    elif "guidance_scale" in options:
        assert set(branches.values()) == {("cond",)}
    else:
        assert branches[0] == ("cond", "uncond") and branches[3] == ("cond",)
