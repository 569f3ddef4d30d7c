"""Layouts that depend on more than the shape of the sample."""

from __future__ import annotations

import diffusers
import torch
from diffusers.modular_pipelines.flux3 import before_denoise
from test_attach_only import _animatediff
from test_wider_families import _run
from tiny_oracle import attention
from tiny_pictures import PICTURES
from tiny_pipelines import _quiet
from tiny_videos import VIDEOS
from tiny_wide import ids, make, rand

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


def test_padding_of_a_text_is_cut_out_and_the_image_follows():
    """Lumina 2 packs [text, image] without the padding between them."""
    tiny = PICTURES["lumina2"]
    model, call = tiny.make_quiet(), tiny.call()
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    call |= {"encoder_attention_mask": mask}
    found, plain = _roles(model, call)
    assert found == [("text", 3), ("image", 16)]

    def moved(changed):
        return (_roles(model, changed)[1].q - plain.q).abs().amax((0, 1, 3)).nonzero().flatten()

    for word, expected in ((2, [2]), (3, [])):
        text = call["encoder_hidden_states"].clone()
        text[:, word] += 1.0
        assert moved(call | {"encoder_hidden_states": text}).tolist() == expected
    assert moved(tiny.poked(call, 6)).tolist() == [3 + 6]


def test_frames_of_a_motion_unet_are_rows_and_run_row_by_row():
    """AnimateDiff: frame 1 of row 0 is row 1 of the batch, and its pixels stand as in a picture."""
    model, call = _animatediff()
    call["sample"] = rand(2, 4, 3, 4, 8)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    q = []
    for extra in (0.0, 5.0):
        sample = call["sample"].clone()
        sample[0, :, 1, 1, 6] += extra
        with attention(model) as seen:
            _run(model, call | {"sample": sample})
        q.append(seen[name][0].q)
    moved = (q[0] - q[1]).abs().sum(dim=(1, 3))
    assert moved.sum(dim=1).nonzero().flatten().tolist() == [1]
    row, column = divmod(int(moved[1].argmax()), 8)
    assert abs(row - 1) <= 2 and abs(column - 6) <= 2  # within the reach of the convolutions
    with attach(model) as session:
        site = next(site for site in session.sites if site.name == name)
    assert family_of(model).layout(site, call, model).q[0].grid == (1, 4, 8)


def test_position_ids_half_apart_are_a_grid_as_well():
    """As FLUX.3's pipeline makes them: scaled, so that the largest does not tell how many."""
    tiny = PICTURES["flux3"]
    model, call = tiny.make(), tiny.call()
    made = before_denoise._prepare_image_ids(2, 8, 0.5)
    assert made[:, 1:3].amax(dim=0).tolist() == [0.5, 3.5]
    with attach(model) as session:
        site = session.sites[-1]
    layout = family_of(model).layout(site, call | {"img_ids": made}, model)
    assert [(s.role, s.length, s.grid) for s in layout.q] == [
        ("text", 5, None), ("image", 16, (1, 2, 8)),
    ]  # fmt: skip


def test_text_in_an_extra_dimension_is_counted_whole():
    """Allegro's pipeline gives its text as (rows, 1, tokens, width)."""
    tiny = VIDEOS["allegro"]
    model, call = tiny.make(), tiny.call()
    text = call["encoder_hidden_states"].unsqueeze(1)
    with attach(model) as session:
        site = next(site for site in session.sites if site.label == "L0.cross")
    layout = family_of(model).layout(site, call | {"encoder_hidden_states": text}, model)
    assert [(s.role, s.length) for s in layout.k] == [("text", 5)]
    keys = []
    for given in (text, text + torch.eye(5)[3][:, None]):
        with attention(model) as seen:
            _run(model, call | {"encoder_hidden_states": given})
        keys.append(seen[site.name][0].k)
    assert (keys[1] - keys[0]).abs().amax((0, 1, 3)).nonzero().flatten().tolist() == [3]


MOTIF = make(
    "MotifVideoTransformer3DModel",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=1,
    num_single_layers=2,
    num_decoder_layers=1,
    text_embed_dim=32,
    image_embed_dim=16,
    rope_axes_dim=(4, 4, 8),
    enable_text_cross_attention_dual=True,
    enable_text_cross_attention_single=True,
)


def test_a_decoder_sees_the_video_and_what_was_made_of_it():
    """As in Motif-Video 2B, whose last eight blocks see no text."""
    tiny = VIDEOS["motif"]
    model, call = MOTIF(), tiny.call()
    with attach(model) as session:
        sites = {site.label: site for site in session.sites}
    assert list(sites) == ["L0.joint", "L0.cross", "L1.joint", "L1.cross", "L2.joint"]

    def look(call):
        with attention(model) as seen:
            _run(model, call)
        return seen

    def moved(one, other):
        return (one - other).abs().amax((0, 1, 3)).nonzero().flatten().tolist()

    plain = look(call)
    layouts = {label: family_of(model).layout(s, call, model) for label, s in sites.items()}
    for label, layout in layouts.items():
        softmax = plain[sites[label].name][0]
        assert (layout.q_len, layout.k_len) == (softmax.q.shape[2], softmax.k.shape[2])
    assert [(s.role, s.start, s.grid) for s in layouts["L2.joint"].q] == [
        ("video", 0, (3, 2, 2)), ("reference", 12, (3, 2, 2)),
    ]  # fmt: skip
    video = look(tiny.poked(call, 7))[sites["L2.joint"].name][0]
    indices = moved(video.q, plain[sites["L2.joint"].name][0].q)
    assert [i for i in indices if i < 12] == [7] and 12 + 7 in indices
    text = call["encoder_hidden_states"].clone()
    text[:, 3] += 1.0
    changed = look(call | {"encoder_hidden_states": text})
    for label, first in (("L0.joint", 12 + 4), ("L0.cross", 0)):  # four of the picture between
        name = sites[label].name
        assert moved(changed[name][0].k, plain[name][0].k) == [first + 3]
    name = sites["L2.joint"].name  # text comes to it through the blocks before alone
    assert min(moved(changed[name][0].q, plain[name][0].q)) >= 12


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
