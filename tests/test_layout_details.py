"""Layouts that depend on more than the shape of the sample."""

from __future__ import annotations

import diffusers
import torch
from test_wider_families import _run
from tiny_oracle import attention
from tiny_pictures import PICTURES
from tiny_pipelines import _quiet
from tiny_videos import VIDEOS
from tiny_wide import ids, rand

from attn_control import attach
from attn_control.families import family_of
from attn_control.phases import Pass
from attn_control.processors import SEG, HeadGate, SoftPAG


def _roles(model, call, label="L0"):
    """The layout of the first site of a block, checked against the length of its queries."""
    with attach(model) as session:
        site = next(site for site in session.sites if label in (site.label, f"L{site.layer}"))
    layout = family_of(model).layout(site, call, model)
    with attention(model) as seen:
        _run(model, call)
    assert seen[site.name][-1].q.shape[2] == layout.q_len
    return [(s.role, s.length) for s in layout.q], seen[site.name][-1]


def test_pictures_that_are_not_square_are_padded():
    tiny = PICTURES["hidream"]
    model, call = tiny.make(), tiny.call()
    call["hidden_states"] = rand(2, 4, 8, 4)
    most = model.max_seq
    found, plain = _roles(model, call)
    assert found == [("image", 8), ("pad", most - 8), ("text", 3 + 5 + 5)]
    call["hidden_states"] = call["hidden_states"].clone()
    call["hidden_states"][:, :, 6, 2] += 1.0
    moved = (_roles(model, call)[1].q - plain.q).abs().amax((0, 1, 3)).nonzero().flatten()
    assert moved.tolist() == [7]


def test_both_layers_of_the_second_text_come_after_the_first():
    tiny = PICTURES["hidream"]
    model, call = tiny.make(), tiny.call()
    plain = _roles(model, call)[1]
    for layer, first in ((0, 8), (1, 3)):  # a block's own layer stands behind the last one
        text = call["encoder_hidden_states_llama3"].clone()
        text[layer, :, 2] += 1.0
        changed = _roles(model, call | {"encoder_hidden_states_llama3": text})[1]
        moved = (changed.q - plain.q).abs().amax((0, 1, 3)).nonzero().flatten()
        assert moved.tolist() == [16 + first + 2]


def test_references_of_their_own_come_last():
    tiny = PICTURES["flux3"]
    model, call = tiny.make(), tiny.call()
    call |= {"image_cond_hidden_states": rand(2, 6, 16, seed=5), "image_cond_ids": ids(2, 3, 4)}
    found, plain = _roles(model, call, "L2")
    assert found == [("text", 5), ("image", 16), ("reference", 6)]
    assert _roles(model, call, "L0")[0] == [("image", 16)]
    more = call["image_cond_hidden_states"].clone()
    more[:, 4] += 1.0
    changed = _roles(model, call | {"image_cond_hidden_states": more}, "L2")[1]
    moved = (changed.q - plain.q).abs().amax((0, 1, 3)).nonzero().flatten().tolist()
    assert 21 + 4 in moved and min(moved) >= 21


def test_an_embedded_picture_of_zeros_is_none():
    tiny = VIDEOS["hunyuanvideo15"]
    model, call = tiny.make(), tiny.call()
    assert _roles(model, call)[0] == [("video", 12), ("reference", 4), ("text", 8)]
    call["image_embeds"] = torch.zeros(2, 4, 16)
    found, plain = _roles(model, call)
    assert found == [("video", 12), ("text", 12)]
    text = call["encoder_hidden_states_2"].clone()
    text[:, 1] += 1.0
    changed = _roles(model, call | {"encoder_hidden_states_2": text})[1]
    moved = (changed.k - plain.k).abs().amax((0, 1, 3)).nonzero().flatten().tolist()
    assert moved == [12 + 1]  # right behind the video: what is masked stands after the text


def test_a_sparse_order_has_no_grid():
    tiny = VIDEOS["kandinsky5"]
    model, call = tiny.make(), tiny.call()
    with attach(model) as session:
        site = session.sites[0]
    layout = family_of(model).layout(site, call | {"sparse_params": {"to_fractal": True}}, model)
    assert [(s.role, s.length, s.grid) for s in layout.q] == [("video", 12, None)]


def test_two_pictures_of_one_token_count_have_plans_of_their_own():
    """2 x 8 and 8 x 2 tokens: the same shapes, told apart by their position ids."""
    tiny = PICTURES["bria"]
    model, call = tiny.make(), tiny.call()

    def guided(session, height, width):
        found = ids(height, width)
        denoiser = session._denoisers[0]
        run = Pass(call | {"img_ids": found}, denoiser.phases.entries, (0, 2))
        return found, denoiser.phases.plans(run)

    with attach(model, SEG("L1", sigma=1.0)) as session:
        kept, first = guided(session, 2, 8)
        _, other = guided(session, 8, 2)
        assert first is not other
        wide, tall = (next(iter(p.values())).parts[0].epilogue for p in (first, other))
        assert repr(wide) != repr(tall)
        run = Pass(call | {"img_ids": kept}, session._denoisers[0].phases.entries, (0, 2))
        assert session._denoisers[0].phases.plans(run) is first


def test_a_guider_names_its_branches():
    """HunyuanImage's pipeline asks a guider, which calls its batches pred_cond and pred_uncond."""
    model = PICTURES["hunyuanimage"].make()
    seen = []
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = _quiet(
        diffusers.HunyuanImagePipeline(
            transformer=model, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None,
            text_encoder_2=None, tokenizer_2=None,
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        )
    )  # fmt: skip
    arguments = {}
    for prefix, seed in (("prompt", 1), ("negative_prompt", 3)):
        arguments |= {
            f"{prefix}_embeds": rand(1, 5, 32, seed=seed),
            f"{prefix}_embeds_mask": torch.ones(1, 5, dtype=torch.bool),
            f"{prefix}_embeds_2": rand(1, 3, 24, seed=seed + 1),
            f"{prefix}_embeds_mask_2": torch.ones(1, 3, dtype=torch.bool),
        }

    def run():
        generator = torch.Generator().manual_seed(0)
        return pipe(
            **arguments, height=256, width=256, num_inference_steps=2, output_type="latent",
            generator=generator,
        )[0]  # fmt: skip

    plain = run()
    controls = SoftPAG("L1H1", u=0.6, scale=2.0, tokens="image"), HeadGate("L0H0", gain=0.5)
    with attach(pipe, *controls) as session:
        hook = model.register_forward_pre_hook(lambda *_: seen.append(session.step.branch))
        assert not torch.equal(run(), plain)
        hook.remove()
    assert set(seen) == {("cond",), ("uncond",)}
    assert torch.equal(run(), plain)
