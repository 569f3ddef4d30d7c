"""The trainer at toy size: parts agree with diffusers, a resumed run equals a whole one."""

import dataclasses

import pytest
import torch

from attn_control.zoo.train import autoencoder, common, denoiser, latents, model, text
from attn_control.zoo.train.__main__ import parser

TINY = denoiser.Settings(
    steps=6, coarse_batch=4, fine_batch=2, fine_every=3, fine_from=0.6, width=64, layers=2,
    warmup=2, compile=False, zeros=0.5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    captions = ["a red circle", "a blue ring above a cyan cross on a gray background"] * 8
    ids = text.tokenize(text.build_tokenizer(), captions)
    return torch.randn(16, 4, 32, 32, generator=g).half(), ids


def test_every_word_is_one_token_and_captions_fit():
    tokenizer = text.build_tokenizer()
    for word in text.words():
        assert len(tokenizer(word).input_ids) == 3, word
    longest = "a purple triangle right of a yellow triangle on a white background"
    assert text.tokenize(tokenizer, [longest]).shape == (1, text.LENGTH)
    ids = text.tokenize(tokenizer, [longest])[0].tolist()
    assert ids.index(tokenizer.eos_token_id) < text.LENGTH - 1
    assert tokenizer.eos_token_id == len(tokenizer) - 1


def test_the_encoders_pool_at_the_first_end_token():
    tokenizer = text.build_tokenizer()
    encoder = text.build_encoder(tokenizer).eval()
    a, b = text.tokenize(tokenizer, ["a red circle", "a blue circle"])
    with torch.no_grad():
        pooled = [encoder(x[None]).text_embeds[0] for x in (a, b)]
        tail = a.clone()
        tail[6:] = a[1]  # after the first end token nothing may matter
        again = encoder(tail[None]).text_embeds[0]
    assert not torch.allclose(*pooled)
    torch.testing.assert_close(pooled[0], again)


def test_fine_velocity_is_the_shipped_model_and_coarse_has_the_same_shape():
    torch.manual_seed(0)
    net = model.build(64, 2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(2, 4, 32, 32), torch.tensor([10.0, 900.0])
    states, pooled = torch.randn(2, 17, 128), torch.randn(2, 128)
    with torch.no_grad():
        want = net(x, states, pooled, t).sample
        torch.testing.assert_close(model.velocity(net, x, t, states, pooled), want)
        assert model.velocity(net, x, t, states, pooled, model.Coarse(64)).shape == x.shape


def test_a_128_px_picture_sees_positions_from_zero():
    net = model.build(64, 1)
    places = net.pos_embed.cropped_pos_embed(32, 32).view(16, 16, 64)
    torch.testing.assert_close(places[0, 0], torch.tensor([0.0] * 16 + [1.0] * 16).repeat(2))
    assert net.pos_embed.cropped_pos_embed(64, 64).shape[1] == 1024  # up to 256 px


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, data):
    whole = denoiser.train(tmp_path / "whole", TINY, data)
    denoiser.train(tmp_path / "cut", TINY, data, stop_at=3)
    parts = denoiser.train(tmp_path / "cut", TINY, data, resume=True)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b), name
    a, b = (common.load(tmp_path / f / "denoiser.pt") for f in ("whole", "cut"))
    assert a["step"] == b["step"] == 6 and a["settings"] == dataclasses.asdict(TINY)
    assert all(map(torch.equal, a["average"]["values"], b["average"]["values"]))


def test_init_from_starts_at_the_averaged_weights(tmp_path, data):
    denoiser.train(tmp_path / "a", TINY, data)
    still = dataclasses.replace(TINY, peak=0.0, seed=2)
    trainee = denoiser.train(tmp_path / "b", still, data, init_from=tmp_path / "a" / "denoiser.pt")
    state = common.load(tmp_path / "a" / "denoiser.pt")
    for value, p in zip(state["average"]["values"], trainee.parameters(), strict=True):
        assert torch.equal(value, p)


def test_learning_lowers_the_loss(tmp_path, data):
    short = dataclasses.replace(TINY, steps=200, fine_from=0.9, peak=5e-3, warmup=5)
    one = (data[0][:1].repeat(4, 1, 1, 1), data[1][:1].repeat(4, 1))
    trainee = denoiser.train(tmp_path, short, one)
    empty = text.tokenize(trainee.tokenizer, [""])[0]
    batch = denoiser.draw_batch(0, short, *one, empty)
    t = batch["t"][:, None, None, None]
    x, target = torch.lerp(batch["x0"], batch["noise"], t), batch["noise"] - batch["x0"]
    with torch.no_grad():
        states, pooled = text.encode(trainee.encoders, batch["ids"])
        loss = denoiser._losses(trainee, False, x, batch["t"], states, pooled, target)
    assert loss < 0.9 * target.square().mean(), loss


def test_empty_captions_are_the_pipelines_own(data):
    s = dataclasses.replace(TINY, coarse_batch=400)
    empty = text.tokenize(text.build_tokenizer(), [""])[0]
    ids = denoiser.draw_batch(0, s, *data, empty)["ids"]
    assert 20 < sum(torch.equal(row, empty) for row in ids) < 70


def test_autoencoder_and_latents(tmp_path):
    autoencoder.train(tmp_path, 2, batch=2, count=4, width=8)
    autoencoder.train(tmp_path, 3, batch=2, count=4, width=8, resume=True)
    assert common.load(tmp_path / "autoencoder.pt")["step"] == 3
    for part in range(2):
        latents.encode_part(tmp_path, 8, part, 2, batch=4)
    z, ids = latents.load_latents(tmp_path)
    assert z.shape == (8, 4, 32, 32) and z.dtype == torch.float16 and ids.shape == (8, 16)
    autoencoder.refine_decoder(tmp_path, 1, batch=2, count=4)
    assert (tmp_path / "vae-refined" / "config.json").is_file()


def test_the_schedule():
    rates = [common.learning_rate(i, 100, 1.0, 10) for i in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and 0.05 <= rates[-1] < 0.06


def test_the_command_line_has_every_setting():
    args = parser().parse_args(["shapes-sd3", "--steps", "7", "--no-compile", "--out", "x"])
    assert args.steps == 7 and args.compile is False and args.coarse_batch == 64
