"""What training reads: autoencoders, latents on disk, and which of them a step draws."""

from functools import partial

import numpy as np
import pytest
import torch

from attn_control.errors import AttnControlError
from attn_control.zoo.train import autoencoder, common, latents, video_autoencoder


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
    besides = latents.chances(captions, single=3.0, hard=2.0, weights=torch.tensor([1, 1, 4, 1]))
    want = torch.tensor([3, 6, 4, 2], dtype=torch.float64) / 15
    torch.testing.assert_close(besides.diff(prepend=besides.new_zeros(1)), want)


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

    # Its decoder alone is trained on: latents stay, pictures do not.
    video_autoencoder.refine_decoder(tmp_path, 1, source, count=3)
    refined = video_autoencoder.load_vae(tmp_path)
    assert refined.config.latents_std == vae.config.latents_std
    with torch.no_grad():
        assert torch.equal(refined.encode(x).latent_dist.mode(), raw)
        assert (refined.decode(raw).sample - vae.decode(raw).sample).abs().max() > 1e-3


@torch.no_grad()
def test_an_inflated_video_autoencoder_treats_every_frame_as_a_single_one():
    torch.manual_seed(0)
    vae = video_autoencoder.build(4).eval()
    x = torch.randn(1, 3, 9, 16, 16).clamp(-1, 1)

    def both(x):
        z = vae.encode(x).latent_dist.mode()
        return z, vae.decode(z).sample

    before = both(x)[0]
    video_autoencoder.inflate(vae)
    z, y = both(x)
    assert not torch.allclose(z, before, atol=1e-3)
    for latent, frame in enumerate(range(0, 9, 2)):  # of each two frames the second
        one_z, one_y = both(x[:, :, frame : frame + 1])
        torch.testing.assert_close(z[:, :, latent : latent + 1], one_z, atol=1e-5, rtol=1e-4)
        for shown in {max(frame - 1, 0), frame}:
            torch.testing.assert_close(y[:, :, shown : shown + 1], one_y, atol=1e-5, rtol=1e-4)


def test_crops_of_videos_show_objects_first_one_frame_then_all():
    videos = np.full((2, 9, 64, 64, 3), 200, np.uint8)
    videos[:, :, 40:60, 40:60] = [10, 20, 250]
    lesson = video_autoencoder.Lesson(videos, 4, width=4, side=32, batches=(6, 2))
    shapes, shares = [], []
    for step in range(4):
        x, shown = lesson.clips(step)
        shapes.append(tuple(x.shape))
        blue = (x[:, 2:] > 0.9) & (x[:, :1] < 0)
        assert torch.equal(blue.float(), shown)
        shares.append(float(shown.mean()))
    assert shapes == [(6, 3, 1, 32, 32)] * 2 + [(2, 3, 9, 32, 32)] * 2
    assert np.mean(shares) > 20 * 20 / 64**2  # more than crops anywhere would show
