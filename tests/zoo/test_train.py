"""The trainer at toy size, the same tests for every model: a resumed run equals a whole one."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from attn_control.errors import AttnControlError
from attn_control.zoo import defaults, evaluate, load_prompts
from attn_control.zoo.train import (
    autoencoder,
    common,
    flux,
    flux_model,
    latents,
    loop,
    muon,
    sd3,
    sd3_model,
    sd15,
    text,
    video_autoencoder,
    wan,
    wan_model,
)
from attn_control.zoo.train.__main__ import MODULES, main, module, parser

TINY = {
    "shapes-sd3": sd3.Settings(
        steps=6, coarse_batch=4, fine_batch=2, fine_every=3, fine_from=0.6, width=64, layers=2,
        warmup=2, compile=False, zeros=0.5,
    ),
    "shapes-sd15": sd15.Settings(steps=6, batch=4, widths=(16, 32), warmup=2),
    "shapes-flux": flux.Settings(
        steps=6, coarse_batch=4, fine_batch=2, fine_every=3, fine_from=0.6, width=64, layers=(1, 1),
        warmup=2, compile=False,
    ),
    "shapes-wan": wan.Settings(
        steps=6, coarse_batch=2, fine_batch=1, fine_every=3, fine_from=0.6, width=32, layers=2,
        warmup=2, compile=False,
    ),
}  # fmt: skip
NAMES = sorted(MODULES)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def every():
    g = torch.Generator().manual_seed(0)
    captions = ["a red circle", "a blue ring above a cyan cross on a gray background"] * 4
    captions += ["a red circle with the texture of the reference"] * 8
    targets, references = torch.randn(2, 16, 4, 32, 32, generator=g).half()
    pictures = latents.Latents(targets, captions, references)
    films = torch.randn(4, 4, 3, 16, 16, generator=g).half()
    moving = ["a red circle moves left", "a blue cross moves up behind a red square"] * 2
    return dict.fromkeys(MODULES, pictures) | {"shapes-wan": latents.Latents(films, moving)}


@pytest.fixture
def data(request, every):
    """What a model learns from: the test's own `name`, or a picture model's."""
    params = getattr(request.node, "callspec", None)
    return every[params.params["name"] if params and "name" in params.params else "shapes-flux"]


def test_every_model_is_tried_here():
    assert set(TINY) == set(MODULES)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path, data):
    make, s = module(name).Lesson, TINY[name]
    whole = loop.train(tmp_path / "whole", make(s, data))
    loop.train(tmp_path / "cut", make(s, data), stop_at=3)
    parts = loop.train(tmp_path / "cut", make(s, data), resume=True)
    for (key, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b), key
    a, b = (common.load(tmp_path / f / "denoiser.pt") for f in ("whole", "cut"))
    assert a["step"] == b["step"] == 6 and a["settings"] == dataclasses.asdict(s)
    assert all(map(torch.equal, a["average"]["values"], b["average"]["values"]))


@pytest.mark.parametrize("name", NAMES)
def test_init_from_starts_at_the_averaged_weights(name, tmp_path, data):
    make, s = module(name).Lesson, TINY[name]
    loop.train(tmp_path / "a", make(s, data))
    file = tmp_path / "a" / "denoiser.pt"
    still = dataclasses.replace(s, peak=0.0, seed=2)
    trainee = loop.train(tmp_path / "b", make(still, data), init_from=file)
    for value, p in zip(common.load(file)["average"]["values"], trainee.parameters(), strict=True):
        assert torch.equal(value, p)


@pytest.mark.parametrize("name", NAMES)
def test_learning_lowers_the_loss(name, tmp_path, data):
    # For shapes-flux one that names its texture and one that points to a reference.
    few = [0, 8] if name == "shapes-flux" else [0]
    one = latents.Latents(
        data.targets[few],
        [data.captions[i] for i in few],
        data.references[few] if name == "shapes-flux" else None,
    )
    if name == "shapes-sd15":
        changes = {"steps": 60, "peak": 5e-3, "warmup": 5}
    else:
        changes = {"steps": 200, "fine_from": 0.9, "peak": 5e-3, "warmup": 5}
    lesson = module(name).Lesson(dataclasses.replace(TINY[name], **changes), one)
    before = lesson.loss(0)[1].item()
    loop.train(tmp_path, lesson)
    after = lesson.loss(0)[1].item()
    assert after < 0.9 * before, (before, after)


@pytest.mark.parametrize("name", NAMES)
def test_some_captions_are_emptied_just_as_the_pipeline_empties_them(name, data):
    size = {"batch" if name == "shapes-sd15" else "coarse_batch": 400}
    lesson = module(name).Lesson(dataclasses.replace(TINY[name], **size), data)
    empty = text.tokenize(lesson.trainee.tokenizer, [""])[0]
    assert 20 < sum(torch.equal(row, empty) for row in lesson.batch(0)["ids"]) < 70


def test_muon_takes_the_blocks_matrices_and_nothing_else(every):
    for name in NAMES:
        lesson = module(name).Lesson(TINY[name], every[name])
        adam, orthogonal = loop.optimizers(lesson)
        taken = [p for group in orthogonal.param_groups for p in group["params"]]
        left = [p for group in adam.param_groups for p in group["params"]]
        assert {id(p) for p in taken} | {id(p) for p in left} == {
            id(p) for p in lesson.trainee.parameters()
        }
        assert taken and min(p.ndim for p in taken) >= 2
        assert len(taken) + len(left) == len(list(lesson.trainee.parameters()))


def test_muon_treats_a_kernel_as_the_matrix_that_it_is():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1).clone()
    muon.Muon([kernel], lr=0.1).step()
    muon.Muon([matrix], lr=0.1).step()
    torch.testing.assert_close(kernel.flatten(1), matrix)


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


def test_the_video_autoencoder_s_latents_are_what_the_pipeline_undoes(tmp_path):
    def source(seed):
        noise = np.random.default_rng(seed).integers(0, 256, (9, 64, 64, 3))
        return "", [noise.astype(np.uint8)]

    video_autoencoder.train(tmp_path, 1, source, width=4, count=3)
    vae = video_autoencoder.load_vae(tmp_path)
    rows = video_autoencoder.videos(source, 2)
    z = torch.from_numpy(video_autoencoder.encode(vae, rows)).float()
    assert z.shape == (2, 4, 5, 16, 16) and abs(z.std() - 1) < 0.2 and abs(z.mean()) < 0.2
    mean, std = (
        torch.tensor(vae.config[f"latents_{k}"]).view(1, 4, 1, 1, 1) for k in ("mean", "std")
    )
    x = torch.from_numpy(rows).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        raw = vae.encode(x).latent_dist.mode()
    torch.testing.assert_close(z * std + mean, raw, atol=0.05, rtol=0.05)


def test_a_flux_step_shows_references_just_where_captions_point_to_them(data):
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


def test_sd15_learns_the_velocity_of_its_own_schedule(data):
    lesson = sd15.Lesson(TINY["shapes-sd15"], data)
    alphas = lesson.scheduler.alphas_cumprod.double()
    assert alphas[-1] == 0 and (alphas.diff() < 0).all()
    b = lesson.batch(0)
    a = alphas[b["t"]][:, None, None, None]
    want = (a.sqrt() * b["noise"] - (1 - a).sqrt() * b["x0"]).square().mean()
    # The untrained network answers zero, so that its loss is the target's own power.
    assert abs(lesson.loss(0)[1].item() - want) < 1e-5


def test_single_and_hard_scenes_are_drawn_as_often_as_asked():
    captions = [
        "a red circle",
        "a red ring",
        "a red circle and a blue square",
        "a red cross and a blue ring",
    ]
    even = latents.chances(captions)
    torch.testing.assert_close(even, torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    chance = latents.chances(captions, single=3.0, hard=2.0)
    want = torch.tensor([3, 6, 1, 2], dtype=torch.float64) / 12
    torch.testing.assert_close(chance.diff(prepend=chance.new_zeros(1)), want)
    drawn = latents.pick(chance, 1300, torch.Generator().manual_seed(0))
    for i, share in enumerate(want):
        assert abs((drawn == i).double().mean() - share) < 0.06


def test_autoencoder_and_latents(tmp_path):
    autoencoder.train(tmp_path, 2, batch=2, count=4, width=8)
    autoencoder.train(tmp_path, 3, batch=2, count=4, width=8, resume=True)
    assert common.load(tmp_path / "autoencoder.pt")["step"] == 3
    with pytest.raises(AttnControlError, match="latents"):
        latents.load_latents(tmp_path)
    encode = partial(autoencoder.encode, autoencoder.load_vae(tmp_path))
    for part in range(2):
        latents.encode_part(tmp_path, latents.plain, encode, 8, part, 2, batch=4)
    got = latents.load_latents(tmp_path)
    assert got.targets.shape == (8, 4, 32, 32) and got.targets.dtype == torch.float16
    assert got.captions == [latents.plain(seed)[0] for seed in range(8)]
    assert got.references is None
    autoencoder.refine_decoder(tmp_path, 1, batch=2, count=4)
    assert (tmp_path / "vae-refined" / "config.json").is_file()


def test_a_source_with_references_keeps_them_beside_their_targets(tmp_path):
    def source(seed):
        shades = (np.full((128, 128, 3), v, np.uint8) for v in (10 * seed, 10 * seed + 5))
        return f"caption {seed}", list(shades)

    encode = partial(autoencoder.encode, autoencoder.build(8))
    latents.encode_part(tmp_path, source, encode, 4, 0, 1, batch=3)
    got = latents.load_latents(tmp_path)
    assert got.references.shape == got.targets.shape == (4, 4, 32, 32)
    assert got.captions == [f"caption {i}" for i in range(4)]
    assert not torch.equal(got.references, got.targets)
    (tmp_path / "captions-0.json").write_text('["only one"]')
    with pytest.raises(AttnControlError, match="4 latents, 1 captions"):
        latents.load_latents(tmp_path)


def test_the_schedule():
    rates = [common.learning_rate(i, 100, 1.0, 10) for i in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and 0.05 <= rates[-1] < 0.06
    t = common.logit_normal(1000, 0.6, 1.1, torch.Generator().manual_seed(0))
    logits = torch.logit(t)
    assert abs(logits.mean() - 0.6) < 0.02 and abs(logits.std() - 1.1) < 0.03


def test_the_command_line_has_every_setting():
    args = parser().parse_args(["shapes-sd3", "--steps", "7", "--no-compile", "--out", "x"])
    assert args.steps == 7 and args.compile is False and args.coarse_batch == 64
    args = parser().parse_args(["shapes-sd15", "--widths", "32", "64"])
    assert args.widths == [32, 64] and args.batch == 32 and not hasattr(args, "coarse_batch")


@pytest.mark.parametrize("name", NAMES)
def test_all_stages_end_in_a_folder_that_stock_diffusers_loads_and_runs(
    name, tmp_path, monkeypatch
):
    from diffusers import DiffusionPipeline

    def few_frames(seed):
        caption, (frames,) = wan_source(seed)
        return caption, [frames[:9, 32:96, 32:96]]

    wan_source = wan.SOURCE

    flags = []
    for key, value in dataclasses.asdict(dataclasses.replace(TINY[name], steps=2)).items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{flag}")
        else:
            values = value if isinstance(value, tuple) else [value]
            flags += [f"--{flag}", *map(str, values)]
    flags += ["--scenes", "4", "--autoencoder-steps", "2", "--threads", "1"]
    if name == "shapes-wan":
        flags += ["--autoencoder-width", "4"]
        monkeypatch.setattr(wan, "SOURCE", few_frames)
    else:
        flags += ["--autoencoder-width", "8", "--decoder-steps", "1"]
    if name == "shapes-flux":
        pointed = [flux.SOURCE(seed)[0].find("reference") > 0 for seed in range(4)]
        assert {True, False} == set(pointed)
    main([name, "--work", str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 128, "width": 128}
    if name == "shapes-wan":
        call |= {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": wan.LENGTH}
        frames = pipe("a red circle moves left", **call).frames[0]
        assert frames.shape == (9, 64, 64, 3) and np.isfinite(frames).all()
        return
    image = pipe("a red circle", **call).images[0]
    assert image.shape == (128, 128, 3) and np.isfinite(image).all()
    if name == "shapes-flux":
        # Rows with and without a reference, of which the stock Kontext pipeline draws the former.
        rows = [row for row in load_prompts(name) if row["objects"] == 1]
        rows = [rows[0], rows[-1], rows[1]]
        assert [bool(row["reference"]) for row in rows] == [True, False, True]
        call = {**defaults(name), "num_inference_steps": 1}
        images = evaluate.render(pipe, rows, 2.0, 2, **call)
        again = evaluate.render(pipe, rows[2:], 2.0, 2, **call)
        near = np.asarray(images[2], int) - np.asarray(again[0], int)
        assert abs(near).max() <= 1 and images[0].size == (128, 128)
