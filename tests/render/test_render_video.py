"""Jobs of a video pipeline: a toy shapes-wan, through a stock WanPipeline."""

from __future__ import annotations

import functools

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.metrics import psnr
from attn_control.render import media, signature
from attn_control.render.command import render
from attn_control.render.job import VideoSpec
from attn_control.render.media import Made, VideoFormat
from attn_control.render.store import read_record, save
from attn_control.render.yamlfile import YamlFile

CALL = {"num_inference_steps": 1, "height": 64, "width": 64, "num_frames": 5}
JOB = """\
model: shapes-wan
prompts: [a red circle moves left]
seeds: 0-1
sampler: {num_inference_steps: 1, height: 64, width: 64, num_frames: 5, guidance_scale: 1.0}
variants:
  plain: {}
  pag: {controls: [{SoftPAG: {heads: L1, scale: 4.0}}]}
"""

ONE = JOB[: JOB.index("  pag")].replace("seeds: 0-1", "seeds: 0")


def go(tmp_path, text=JOB, **options):
    (tmp_path / "job.yaml").write_text(text)
    return render(tmp_path / "job.yaml", tmp_path / "out", **options)


def frames(tmp_path, row):
    return [np.asarray(f) for f in media.read_media(tmp_path / "out" / "images" / row["file"])]


def textured(count, size=(32, 16)):
    """Smooth frames that differ, uint8."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    each = [np.stack([x * 3, y * 6, (x + y + 20 * i) % 256], -1) for i in range(count)]
    return tuple(Image.fromarray(frame.astype(np.uint8)) for frame in each)


def test_a_video_is_what_the_pipeline_makes_frame_by_frame(toy_zoo, tmp_path):
    outcome = go(tmp_path)
    assert (outcome.made, outcome.notes) == (4, [])
    pipe = zoo.load("shapes-wan")
    for row in outcome.rows[:2]:
        assert row["file"].endswith(".png") and row["frames"] == 5 and row["size"] == [64, 64]
        generator = torch.Generator().manual_seed(row["seed"])
        call = {**zoo.defaults("shapes-wan"), **CALL, "guidance_scale": 1.0}
        want = pipe(row["prompt"], generator=generator, output_type="pil", **call).frames[0]
        got = frames(tmp_path, row)
        assert len(got) == 5
        assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(got, want, strict=True))
        score = zoo.score("shapes-wan", want, row["prompt"])
        assert row["score"]["frames"] == score.frames and set(row["score"]) >= {"direction"}
    plain, guided = (frames(tmp_path, outcome.rows[i]) for i in (0, 2))
    assert not np.array_equal(plain, guided), "SoftPAG acted"


def test_the_same_command_goes_on_and_a_damaged_video_is_made_again(toy_zoo, tmp_path):
    first = go(tmp_path, ONE)
    assert go(tmp_path, ONE).kept == 1
    path = tmp_path / "out" / "images" / first.rows[0]["file"]
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    again = go(tmp_path, ONE)
    assert (again.made, again.kept) == (1, 0) and read_record(path) == again.rows[0]
    changed = go(tmp_path, ONE.replace("num_frames: 5", "num_frames: 7"))
    assert changed.made == 1 and changed.rows[0]["frames"] == 7


def test_the_sheet_and_the_words_are_those_of_videos(toy_zoo, tmp_path):
    console = Console(record=True, width=200)
    go(tmp_path, ONE, console=console)
    assert "1 videos made, 0 kept from before" in console.export_text()
    go(tmp_path, ONE + "video: {format: mp4, fps: 12}\n", console=console, dry_run=True)
    text = console.export_text()
    assert "videos are written as mp4 at 12 frames a second" in text and "1 videos: 1 var" in text


def test_mp4_by_the_job_and_for_other_models_by_default(toy_zoo, tmp_path):
    outcome = go(tmp_path, ONE + "video: {format: mp4, fps: 12}\n")
    path = tmp_path / "out" / "images" / outcome.rows[0]["file"]
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    assert (about["fps"], about["size"], len(list(reader))) == (12, (64, 64), 5)
    assert read_record(path) == outcome.rows[0]
    # Its last box is the record: a cut anywhere shows, and the video is made again.
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert read_record(path) is None
    assert go(tmp_path, ONE + "video: {format: mp4, fps: 12}\n").made == 1
    assert read_record(path) is not None
    folder = ONE.replace("shapes-wan", str(toy_zoo / "shapes-wan"))
    assert go(tmp_path, folder).rows[0]["file"].endswith(".mp4")
    assert go(tmp_path, folder + "video: {format: png}\n").rows[0]["file"].endswith(".png")


def test_fps_is_the_files_own(toy_zoo, tmp_path):
    names = set()
    for fps in (4, 10):
        row = go(tmp_path, ONE + f"video: {{fps: {fps}}}\n").rows[0]
        with Image.open(tmp_path / "out" / "images" / row["file"]) as image:
            assert image.info["duration"] == pytest.approx(1000 / fps, abs=1)
        names.add(row["file"])
    assert len(names) == 2


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("num_frames: 5", "num_frames: 6", ["sampler.num_frames", "6 is not 1 more", "5 and 7"]),
        ("num_frames: 5", "num_frames: 0", ["sampler.num_frames", "got 0"]),
        ("width: 64", "width: 68", ["sampler.width", "multiple of 8"]),
        ("seeds: 0-1", "seeds: 0\nvideo: {fps: 0}", ["job.yaml:4:", "video.fps", "got 0"]),
        ("seeds: 0-1", "seeds: 0\nvideo: {rate: 8}", ["video.rate", "format, fps"]),
        ("seeds: 0-1", "seeds: 0\nvideo: {format: gif}", ["video.format", "'gif'"]),
    ],
)
def test_what_a_video_job_cannot_mean_is_refused(toy_zoo, tmp_path, old, new, words):
    with pytest.raises(AttnControlError) as caught:
        go(tmp_path, JOB.replace(old, new))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_whose_weights_are_missing_says_how_to_come_by_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(tmp_path))
    with pytest.raises(AttnControlError, match="job.yaml:1:.*weights of 'shapes-wan'.*zoo.train"):
        go(tmp_path)


def test_video_is_refused_for_pictures(world, tmp_path):
    from render.fakes import JOB as PICTURES

    with pytest.raises(AttnControlError, match="video: would be ignored: FakePipe makes pictures"):
        render(world.job(PICTURES + "video: {fps: 8}\n"), tmp_path / "out")


def test_mp4_without_ffmpeg_is_refused_before_rendering(toy_zoo, tmp_path, monkeypatch):
    def none():
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none)
    with pytest.raises(AttnControlError, match="job.yaml.*video.format: mp4 needs ffmpeg.*png"):
        go(tmp_path, JOB + "video: {format: mp4}\n")
    assert not (tmp_path / "out").exists()
    assert go(tmp_path, ONE).made == 1, "png needs none"


def test_frames_that_a_pipeline_loses_are_an_error(toy_zoo, tmp_path, monkeypatch):
    from diffusers import WanPipeline

    real = WanPipeline.__call__

    @functools.wraps(real)
    def fewer(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        return type(out)(frames=[out.frames[0][:-1]])

    monkeypatch.setattr(WanPipeline, "__call__", fewer)
    with pytest.raises(AttnControlError, match="made 4 frames where the sampler asks for 5"):
        go(tmp_path, ONE)


def test_still_frames_are_kept_apart(tmp_path):
    """Pillow would join equal frames to one."""
    moving = textured(3)
    made = Made((moving[0], moving[0], moving[1], moving[1], moving[1], moving[2]), True)
    record = {"settings": {"prompt": "", "seed": 0, "sampler": {}, "controls": [],
                           "model": {"name": "m"}}}  # fmt: skip
    save(made, tmp_path / "v.png", record, VideoFormat("png", 16))
    got = media.read_media(tmp_path / "v.png")
    assert [np.asarray(f).tobytes() for f in got] == [f.tobytes() for f in made.frames]
    picked = media.read_media(tmp_path / "v.png", media.ends_and_middle)
    assert [f.tobytes() for f in picked] == [made.frames[i].tobytes() for i in (0, 3, 5)]
    one = Made(moving[:1], True)
    save(one, tmp_path / "one.png", record, VideoFormat("png", 16))
    assert len(media.read_media(tmp_path / "one.png")) == 1


def test_mp4_looks_as_the_frames_do_and_odd_sizes_are_refused(tmp_path):
    made = Made(textured(7, (64, 32)), True)
    media.write_mp4(made, tmp_path / "v.mp4", 8)
    got = media.read_media(tmp_path / "v.mp4")
    assert len(got) == 7
    quality = [psnr(a, b) for a, b in zip(got, made.frames, strict=True)]
    assert min(quality) > 30, quality
    ends = media.read_media(tmp_path / "v.mp4", media.ends_and_middle)
    assert [f.tobytes() for f in ends] == [got[i].tobytes() for i in (0, 3, 6)]
    with pytest.raises(AttnControlError, match="even width and height, got 31 x 16"):
        media.write_mp4(Made(textured(2, (31, 16)), True), tmp_path / "o.mp4", 8)


def test_a_video_is_blank_where_every_frame_is():
    flat = Image.new("RGB", (8, 8), (3, 4, 5))
    assert media.is_blank(Made((flat, flat), True))
    assert not media.is_blank(Made((flat, textured(1)[0]), True))


def test_arrays_are_frames_too():
    class Result:
        frames = np.stack([np.full((4, 6, 3), v) for v in (0.0, 0.5, 1.2)])[None]

    made = media.made_of(Result())
    assert made.is_video and made.size == (6, 4)
    assert [frame.getpixel((0, 0))[0] for frame in made.frames] == [0, 128, 255]
    with pytest.raises(AttnControlError, match="neither images nor frames"):
        media.made_of(object())


@pytest.mark.parametrize(
    "name, video, fps, period",
    [
        ("WanPipeline", True, 16, 1),
        ("LTXPipeline", True, 25, 1),
        ("LattePipeline", True, 16, 1),
        ("AnimateDiffPipeline", True, 16, 1),
        ("MochiPipeline", True, 16, 1),
        ("FluxPipeline", False, None, 1),
        ("StableDiffusionPipeline", False, None, 1),
    ],
)
def test_which_pipelines_make_videos(name, video, fps, period):
    import diffusers

    pipe = object.__new__(getattr(diffusers, name))
    assert signature.makes_video(pipe) == video
    source = YamlFile("job.yaml", {})
    found = signature.video_format(pipe, None, {}, True, source)
    assert found == (VideoFormat("png", fps) if video else None)
    if name == "LTXPipeline":
        own = signature.video_format(pipe, None, {"frame_rate": 30}, True, source)
        said = signature.video_format(pipe, VideoSpec(fps=9), {"frame_rate": 30}, True, source)
        assert (own.fps, said.fps) == (30, 9)


def test_numbers_of_frames_follow_the_autoencoder_where_the_default_does():
    from diffusers import AllegroPipeline, LTXPipeline, WanPipeline

    for cls, name, period in (
        (WanPipeline, "vae_scale_factor_temporal", 4),
        (LTXPipeline, "vae_temporal_compression_ratio", 8),
        (AllegroPipeline, "vae_scale_factor_temporal", 1),  # counts differently
    ):
        pipe = object.__new__(cls)
        object.__setattr__(pipe, name, 4 if cls is not LTXPipeline else 8)
        assert signature.frame_period(pipe) == period, cls
