"""Reference pictures: uploads that are none are refused, and a good one reaches the model."""

from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from attn_control import zoo
from attn_control.render.command import render
from attn_control.studio import show
from attn_control.studio.page import start_form
from attn_control.studio.pictures import Pictures
from attn_control.studio.settings import Refused, Settings
from attn_control.studio.studio import Studio
from attn_control.studio.tabs import METHODS

CAPTION = "a red circle with the texture of the reference"


def saved(kind="PNG", size=(16, 12), mode="RGB", **options):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_that_says(width, height):
    """A PNG of a few bytes that claims to be large."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def film(kind):
    file = io.BytesIO()
    first, *rest = [Image.new("RGB", (16, 16), (n * 60, 0, 0)) for n in range(3)]
    first.save(file, kind, save_all=True, append_images=rest)
    return file.getvalue()


GOOD = saved()
CRASH = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0" * 3)
HOSTILE = {
    "nothing": (b"", "empty"),
    "pickle": (pickle.dumps({"a": 1}), "pickle, which is never loaded"),
    "zip": (b"PK\x03\x04" + bytes(60), "zip archive"),
    "program": (b"\x7fELF" + bytes(60), "program"),
    "pdf": (b"%PDF-1.7 and so on", "PDF"),
    "text": (b"model: shapes-sd3\n", "cannot be read"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", "cannot be read"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
    "gif": (saved("GIF"), "cannot be read"),
    "tiff": (saved("TIFF"), "cannot be read"),
    "bmp": (saved("BMP"), "cannot be read"),
    "icon": (saved("ICO", size=(16, 16)), "cannot be read"),
    "cut short": (GOOD[: len(GOOD) // 2], "cannot be read"),
    "cut short jpeg": (saved("JPEG")[:200], "cannot be read"),
    "cut short webp": (saved("WEBP", lossless=True)[:60], "cannot be read"),
    "broken head": (CRASH, "cannot be read"),
    "random after a head": (b"\xff\xd8\xff" + bytes(range(256)) * 8, "cannot be read"),
    "riff that is no picture": (b"RIFF\x10\0\0\0AVI " + bytes(40), "cannot be read"),
    "bomb": (png_that_says(60_000, 60_000), "pixels"),
    "many pixels": (png_that_says(1_025, 1_024), "1025 x 1024 pixels"),
    "tiny": (saved(size=(7, 64)), "7 x 64 pixels"),
    "moving png": (film("PNG"), "3 pictures"),
    "moving webp": (film("WEBP"), "3 pictures"),
    "long text inside": (
        GOOD[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))) + GOOD[33:],
        "cannot be read",
    ),
    "large": (GOOD + bytes(9_000_000), "at most 8000000"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_picture_is_a_sentence(name):
    raw, words = HOSTILE[name]
    pictures = Pictures(Settings())
    with pytest.raises(Refused) as caught:
        pictures.take(raw)
    assert caught.value.place == "picture" and words in str(caught.value)
    assert len(str(caught.value)) < 300
    assert pictures.known(pictures.take(GOOD)), "the next one is taken"


@pytest.mark.parametrize(
    "raw",
    [GOOD, saved("WEBP", lossless=True), saved(mode="RGBA"), saved(size=(1024, 1024))],
    ids=["png", "webp", "alpha", "large"],
)
def test_pixels_alone_are_kept(raw):
    pictures = Pictures(Settings())
    name = pictures.take(raw)
    kept = Image.open(io.BytesIO(pictures.read(name)))
    assert np.array_equal(kept, Image.open(io.BytesIO(raw)).convert("RGB"))
    assert pictures.take(raw) == name and name.startswith("reference-")


def test_what_stands_beside_the_pixels_is_left_out_and_the_picture_is_turned_upright():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret"  # turned by a quarter; a description
    Image.open(io.BytesIO(GOOD)).save(file, "JPEG", quality=95, exif=exif)
    pictures = Pictures(Settings())
    kept = pictures.read(pictures.take(file.getvalue()))
    assert b"secret" in file.getvalue() and b"secret" not in kept
    assert Image.open(io.BytesIO(kept)).size == (12, 16)


def test_the_oldest_goes_where_there_are_many():
    pictures = Pictures(Settings(pictures=3 * len(saved(size=(64, 64)))))
    names = [pictures.draw("striped", seed) for seed in range(60)]
    assert pictures.known(names[-1]) and not pictures.known(names[0])
    with pytest.raises(Refused, match="upload it again"):
        pictures.read(names[0])


# ---- with a model that takes one


@pytest.fixture
def studio(toys, monkeypatch):
    """A studio whose one model is an untrained shapes-flux."""
    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(toys))
    monkeypatch.setattr(zoo, "NAMES", ("shapes-flux",))
    opened = Studio(Settings(), METHODS)
    yield opened
    opened.close()


@pytest.fixture
def form(studio):
    facts = studio.facts("shapes-flux")
    assert facts.picture == "may" and facts.cfg == "true_cfg_scale"
    size = {"steps": 2, "height": 64, "width": 64}
    return {**start_form(facts, METHODS), **size, "model": "shapes-flux", "prompt": CAPTION}


def done(studio, form):
    run = studio.submit("me", form)
    assert run.wait(200) and run.state == "done", run.error
    return run.result


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB"))


def test_the_picture_decides_the_result_and_the_job_carries_it(studio, form, tmp_path):
    name = studio.pictures.draw("striped", 1)
    form |= {"SoftPAG.on": True, "SoftPAG.heads": "L0", "picture": name}
    result = done(studio, form)
    other = done(studio, form | {"picture": studio.pictures.draw("dotted", 1)})
    none = done(studio, form | {"picture": ""})
    sides = [each.sides["without"].file for each in (result, other, none)]
    assert len({pixels(file).tobytes() for file in sides}) == 3
    # As a user has it: the YAML of the Job tab, and the picture that is downloaded beside it.
    job = tmp_path / "job.yaml"
    job.write_text(studio.job(form))
    assert f"image: {name}" in job.read_text() and name in show.picture_link(name, b"x")
    (tmp_path / name).write_bytes(studio.pictures.read(name))
    for row in render(job, tmp_path / "out").rows:
        theirs = pixels(tmp_path / "out" / "images" / row["file"])
        assert np.array_equal(theirs, pixels(result.sides[row["variant"]].file))


def test_a_job_with_a_picture_comes_back(studio, form):
    form["picture"] = studio.pictures.draw("striped", 1)
    opened, _, notes = studio.open(studio.job(form))
    assert opened["picture"] == form["picture"] and not notes
    text = studio.job(form).replace(form["picture"], "../../etc/passwd")
    opened, _, notes = studio.open(text)
    assert opened["picture"] == "" and "upload the picture '../../etc/passwd'" in notes[0]
    fixed = "model: shapes-flux\nprompts: {zoo: shapes-flux}\nseeds: own\nvariants: {plain: {}}\n"
    opened, _, notes = studio.open(fixed)
    assert "reference" in opened["prompt"] and studio.pictures.known(opened["picture"])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("reference-0123456789abcdef.png", "upload it again"),
        ("../../../etc/passwd", "no picture of this studio"),
        ("/etc/passwd", "no picture of this studio"),
        ("reference-0123456789abcdef.png/../x", "no picture of this studio"),
        (["reference-0123456789abcdef.png"], "no picture of this studio"),
    ],
)
def test_a_picture_that_is_named_and_not_uploaded_is_refused(studio, form, value, words):
    with pytest.raises(Refused) as caught:
        studio.submit("me", form | {"picture": value})
    assert caught.value.place == "picture" and words in str(caught.value)


def test_a_model_that_takes_none_says_so(tiny_sd3):
    opened = Studio(Settings(), METHODS)
    try:
        facts = opened.facts("shapes-sd3")
        form = {**start_form(facts, METHODS), "model": "shapes-sd3", "prompt": "a red circle"}
        with pytest.raises(Refused, match="takes no reference picture"):
            opened.submit("me", form | {"picture": opened.pictures.draw("striped", 1)})
    finally:
        opened.close()
