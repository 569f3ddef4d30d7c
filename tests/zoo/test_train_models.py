"""Each model's own: what training computes is what the stock pipeline will."""

import dataclasses

import torch
from tiny_lessons import TINY, examples

from attn_control.zoo.train import flux, flux_model, sd3_model, sd15, text, wan, wan_model


def test_fine_velocity_is_the_shipped_model_and_coarse_has_the_same_shape():
    torch.manual_seed(0)
    net = sd3_model.build(64, 2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(2, 4, 32, 32), torch.tensor([10.0, 900.0])
    states, pooled = torch.randn(2, 17, 128), torch.randn(2, 128)
    with torch.no_grad():
        want = net(x, states, pooled, t).sample
        torch.testing.assert_close(sd3_model.velocity(net, x, t, states, pooled), want)
        coarse = sd3_model.Coarse(64)
        assert sd3_model.velocity(net, x, t, states, pooled, coarse).shape == x.shape


def test_flux_s_velocity_is_the_shipped_model_in_kontext_order():
    from diffusers import FluxKontextPipeline, FluxPipeline

    torch.manual_seed(0)
    net = flux_model.build(64, (1, 2))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, reference, t = torch.randn(2, 4, 32, 32), torch.randn(2, 4, 32, 32), torch.tensor([0.1, 0.9])
    states, pooled = torch.randn(2, 9, 64), torch.randn(2, 64)
    target = FluxPipeline._pack_latents(x, 2, 4, 32, 32)
    ids = FluxPipeline._prepare_latent_image_ids(2, 16, 16, "cpu", torch.float32)
    assert torch.equal(flux_model.pack(x), target) and torch.equal(flux_model.places(16), ids)
    assert torch.equal(flux_model.unpack(flux_model.pack(x, 4), 4), x)
    after = FluxKontextPipeline._prepare_latent_image_ids(2, 16, 16, "cpu", torch.float32)
    after[..., 0] = 1  # as FluxKontextPipeline.prepare_latents has it
    both = torch.cat([target, FluxPipeline._pack_latents(reference, 2, 4, 32, 32)], 1)
    with torch.no_grad():
        for tokens, where, extra in (
            (target, ids, None),
            (both, torch.cat([ids, after]), reference),
        ):
            want = net(
                tokens, encoder_hidden_states=states, pooled_projections=pooled, timestep=t,
                img_ids=where, txt_ids=torch.zeros(9, 3),
            ).sample[:, :256]  # fmt: skip
            want = FluxPipeline._unpack_latents(want, 128, 128, 4)
            torch.testing.assert_close(
                flux_model.velocity(net, x, t, states, pooled, extra), want, atol=2e-5, rtol=1e-4
            )
        coarse = flux_model.Coarse(64)
        got = flux_model.velocity(net, x, t, states, pooled, reference, coarse)
    assert got.shape == x.shape


def test_wan_s_velocity_is_the_shipped_model():
    torch.manual_seed(0)
    net = wan_model.build(64, 2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, states = torch.randn(2, 4, 3, 16, 16), torch.tensor([10.0, 900.0]), torch.randn(2, 5, 64)
    with torch.no_grad():
        want = net(x, t, states).sample
        torch.testing.assert_close(wan_model.velocity(net, x, t, states), want)
        coarse = wan_model.Coarse(64)
        assert wan_model.velocity(net, x, t, states, coarse).shape == x.shape


def test_a_few_frames_stand_at_their_own_times():
    torch.manual_seed(0)
    net, coarse = wan_model.build(64, 2), wan_model.Coarse(64)
    for p in [*net.parameters(), *coarse.parameters()]:
        torch.nn.init.normal_(p, std=0.2)
    x, t, states = torch.randn(2, 4, 3, 16, 16), torch.tensor([10.0, 900.0]), torch.randn(2, 5, 64)

    def at(*times, door=None):
        return wan_model.velocity(net, x, t, states, door, torch.tensor(times))

    with torch.no_grad():
        for door in (None, coarse):
            whole = wan_model.velocity(net, x, t, states, door)
            torch.testing.assert_close(at(0, 1, 2, door=door), whole)
            # Only distances count, and they do.
            torch.testing.assert_close(at(1, 3, 6, door=door), at(3, 5, 8, door=door))
            assert (at(1, 3, 6, door=door) - whole).abs().max() > 1e-2


def test_wan_s_steps_show_all_frames_or_a_few_coarse_or_fine():
    settings = dataclasses.replace(
        TINY["shapes-wan"], steps=40, few_batch=3, few_frames=2, fine_few_batch=5, fine_few_frames=1
    )
    shown = {False: (3, 4, 2), True: (5, 4, 1)}  # by whether the step is fine

    def kinds(few, fine_few):
        changed = dataclasses.replace(settings, few=few, fine_few=fine_few)
        lesson, found = wan.Lesson(changed, examples("shapes-wan")), {False: 0, True: 0}
        for step in range(40):
            b, fine = lesson.batch(step), lesson.is_fine(step)
            size = tuple(b["x0"].shape[:3])
            if "times" in b:
                found[fine] += 1
                assert size == shown[fine]
                assert b["times"].diff().gt(0).all() and b["times"].max() < 3
                # The frames are those of the times, of one of the videos.
                at = [(b["x0"][0] == v[:, b["times"]].float()).all() for v in lesson.data.targets]
                assert any(at)
            else:
                assert size == (lesson.size(step), 4, 3)
        return found[False], found[True]

    fine = sum(wan.Lesson(settings, examples("shapes-wan")).is_fine(i) for i in range(40))
    assert kinds(0.0, 0.0) == (0, 0) and kinds(1.0, 1.0) == (40 - fine, fine)
    assert kinds(1.0, 0.0) == (40 - fine, 0) and kinds(0.0, 1.0) == (0, fine)
    coarse_few, fine_few = kinds(0.5, 0.5)
    assert 0 < coarse_few < 40 - fine and 0 < fine_few < fine


def test_wan_s_words_are_the_pipeline_s_own():
    from diffusers import WanPipeline

    torch.manual_seed(0)
    tokenizer = text.build_t5_tokenizer(wan.vocabulary(), wan.LENGTH)
    encoder = wan.build_umt5(len(tokenizer)).eval()
    pipe = WanPipeline(tokenizer, encoder, None, None)
    captions = ["a red circle moves right behind a blue square on a white background", ""]
    with torch.no_grad():
        want = pipe._get_t5_prompt_embeds(captions, max_sequence_length=wan.LENGTH)
        got = wan.encode(encoder, text.tokenize(tokenizer, captions))
    torch.testing.assert_close(got, want)
    assert (got[1].abs().sum(-1) > 0).sum() == 1  # nothing but the end mark
    longest = "a purple triangle moves right in front of a yellow triangle on a white background"
    assert len(tokenizer(longest).input_ids) == len(longest.split()) + 1 <= wan.LENGTH


def test_a_flux_step_shows_references_just_where_captions_point_to_them():
    data = examples("shapes-flux")
    lesson = flux.Lesson(dataclasses.replace(TINY["shapes-flux"], coarse_batch=16, drop=0.0), data)
    pointing = text.tokenize(lesson.trainee.t5_tokenizer, data.captions[8:9])[0]
    kinds = set()
    for step in range(12):
        b = lesson.batch(step)
        kinds.add("reference" in b)
        assert ("reference" in b) == bool((b["t5_ids"] == pointing).all())
        for i, x0 in enumerate(b["x0"] if "reference" in b else []):
            at = next(j for j, z in enumerate(data.targets) if torch.equal(z.float(), x0))
            assert torch.equal(b["reference"][i], data.references[at].float())
    assert kinds == {True, False}


def test_a_128_px_picture_sees_positions_from_zero():
    net = sd3_model.build(64, 1)
    places = net.pos_embed.cropped_pos_embed(32, 32).view(16, 16, 64)
    torch.testing.assert_close(places[0, 0], torch.tensor([0.0] * 16 + [1.0] * 16).repeat(2))
    assert net.pos_embed.cropped_pos_embed(64, 64).shape[1] == 1024  # up to 256 px


def test_sd15_learns_the_velocity_of_its_own_schedule():
    lesson = sd15.Lesson(TINY["shapes-sd15"], examples("shapes-sd15"))
    alphas = lesson.scheduler.alphas_cumprod.double()
    assert alphas[-1] == 0 and (alphas.diff() < 0).all()
    b = lesson.batch(0)
    a = alphas[b["t"]][:, None, None, None]
    want = (a.sqrt() * b["noise"] - (1 - a).sqrt() * b["x0"]).square().mean()
    # The untrained network answers zero, so that its loss is the target's own power.
    assert abs(lesson.loss(0)[1].item() - want) < 1e-5


def test_sd15_leans_towards_noise():
    def late(lean):
        settings = dataclasses.replace(TINY["shapes-sd15"], batch=500, lean=lean)
        t = sd15.Lesson(settings, examples("shapes-sd15")).batch(0)["t"]
        assert t.min() >= 0 and t.max() <= 999
        return float((t >= 900).float().mean())

    assert abs(late(1.0) - 0.1) < 0.01
    assert abs(late(2.0) - 0.1**0.5) < 0.01
    assert late(64.0) > 0.95  # most of u rounds to 1 here
