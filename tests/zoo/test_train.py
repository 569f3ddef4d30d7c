"""The trainer at toy size: parts agree with diffusers, a resumed run equals a whole one."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import CLIPTokenizer

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


def test_every_process_numbers_the_words_alike(tmp_path):
    """Ids lie on disk and in the weights: data of one process must fit weights of another."""
    here = text.tokenize(text.build_tokenizer(), [" ".join(text.words()[:12])])[0].tolist()
    script = (
        "from attn_control.zoo.train import text\n"
        "print(text.tokenize(text.build_tokenizer(), [' '.join(text.words()[:12])])[0].tolist())"
    )
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
        )
        assert json.loads(out.stdout.splitlines()[-1]) == here
    text.build_tokenizer().save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for word in text.words():
        assert again(word).input_ids == text.build_tokenizer()(word).input_ids, word


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
    chance = denoiser.chances(short, one[1], trainee.tokenizer)
    batch = denoiser.draw_batch(0, short, *one, empty, chance)
    t = batch["t"][:, None, None, None]
    x, target = torch.lerp(batch["x0"], batch["noise"], t), batch["noise"] - batch["x0"]
    with torch.no_grad():
        states, pooled = text.encode(trainee.encoders, batch["ids"])
        loss = denoiser._losses(trainee, False, x, batch["t"], states, pooled, target)
    assert loss < 0.9 * target.square().mean(), loss


def test_empty_captions_are_the_pipelines_own(data):
    s = dataclasses.replace(TINY, coarse_batch=400)
    tokenizer = text.build_tokenizer()
    empty = text.tokenize(tokenizer, [""])[0]
    chance = denoiser.chances(s, data[1], tokenizer)
    ids = denoiser.draw_batch(0, s, *data, empty, chance)["ids"]
    assert 20 < sum(torch.equal(row, empty) for row in ids) < 70


def test_single_and_hard_scenes_are_drawn_as_often_as_asked():
    tokenizer = text.build_tokenizer()
    captions = [
        "a red circle",
        "a red ring",
        "a red circle and a blue square",
        "a red cross and a blue ring",
    ]
    ids = text.tokenize(tokenizer, captions)
    even = denoiser.chances(TINY, ids, tokenizer)
    torch.testing.assert_close(even, torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    s = dataclasses.replace(TINY, single=3.0, hard=2.0, coarse_batch=1300, drop=0.0)
    chance = denoiser.chances(s, ids, tokenizer)
    want = torch.tensor([3, 6, 1, 2], dtype=torch.float64) / 12
    torch.testing.assert_close(chance.diff(prepend=chance.new_zeros(1)), want)
    drawn = denoiser.draw_batch(0, s, torch.zeros(4, 4, 32, 32), ids, ids[0], chance)["ids"]
    for row, share in zip(ids, want, strict=True):
        assert abs((drawn == row).all(1).double().mean() - share) < 0.06


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
