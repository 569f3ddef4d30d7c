"""Prompts with reference pictures: a toy shapes-flux, through a stock FluxKontextPipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from render.fakes import JOB as PLAIN

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.render.command import render
from attn_control.render.judge import judge
from attn_control.render.media import Made
from attn_control.render.models import ModelChoice
from attn_control.render.prompts import Prompt, Reference, key_of
from attn_control.render.signature import check_pictures
from attn_control.render.yamlfile import YamlFile
from attn_control.zoo.references import draw_reference, with_references

JOB = """\
model: shapes-flux
prompts:
  - a red circle
  - {prompt: a red circle with the texture of the reference, image: one.png}
seeds: 3
sampler: {num_inference_steps: 1, height: 64, width: 64}
variants: {plain: {}}
"""
CAPTION = "a red circle with the texture of the reference"


@pytest.fixture
def job(tmp_path):
    """Writes and renders a job beside a picture, one.png."""
    Image.fromarray(draw_reference("striped", 1)).save(tmp_path / "one.png")

    def go(old="", new="", text=JOB, out="out"):
        assert old in text
        (tmp_path / "job.yaml").write_text(text.replace(old, new) if old else text)
        return render(tmp_path / "job.yaml", tmp_path / out)

    return go


def pixels(tmp_path, row, out="out"):
    return np.asarray(Image.open(tmp_path / out / "images" / row["file"]))


def call(row, pipe, **more):
    defaults = {**zoo.defaults("shapes-flux"), "num_inference_steps": 1}
    generator = torch.Generator().manual_seed(row["seed"])
    return np.asarray(pipe(prompt=row["prompt"], generator=generator, **defaults | more).images[0])


def test_a_picture_goes_in_with_its_prompt(toy_zoo, job, tmp_path):
    without, with_it = job().rows
    assert without.get("image") is None and with_it["image"]["name"] == "one.png"
    kontext = with_references(zoo.load("shapes-flux"))
    more = {"height": 64, "width": 64, "max_area": 64 * 64, "_auto_resize": False}
    picture = Image.open(tmp_path / "one.png")
    assert np.array_equal(pixels(tmp_path, with_it), call(with_it, kontext, image=picture, **more))
    # Without a picture the same pipeline makes the very picture that FluxPipeline makes.
    plain = call(without, zoo.load("shapes-flux"), height=64, width=64)
    assert np.array_equal(pixels(tmp_path, without), plain)


def test_another_picture_is_another_result_and_another_name_is_not(toy_zoo, job, tmp_path):
    first = job()
    picture = Image.open(tmp_path / "one.png")
    picture.save(tmp_path / "same.webp", lossless=True)
    assert job("one.png", "same.webp").kept == 2
    Image.fromarray(draw_reference("dotted", 1)).save(tmp_path / "one.png")
    second = job()
    assert (second.made, second.kept) == (1, 1)
    assert key_of(first.rows[1]) != key_of(second.rows[1])
    assert not np.array_equal(pixels(tmp_path, first.rows[1]), pixels(tmp_path, second.rows[1]))


def test_fixed_prompts_are_rendered_with_their_references(toy_zoo, job, tmp_path):
    text = JOB.replace(JOB[JOB.index("prompts") : JOB.index("seeds")],
                       "prompts: {zoo: shapes-flux, spread: 5}\n")  # fmt: skip
    text = text.replace("seeds: 3", "seeds: own").replace(", height: 64, width: 64", "")
    rows = job(text=text).rows
    fixed = zoo.load_prompts("shapes-flux")
    fixed = [fixed[i * len(fixed) // 5] for i in range(5)]
    kontext = with_references(zoo.load("shapes-flux"))
    assert {bool(each["reference"]) for each in fixed} == {True, False}
    for row, want in zip(rows, fixed, strict=True):
        assert (row["prompt"], row["seed"]) == (want["prompt"], want["seed"])
        more = {"max_area": 128 * 128, "_auto_resize": False}
        if want["reference"]:
            more["image"] = Image.fromarray(draw_reference(**want["reference"]))
            assert row["image"]["name"] == want["reference"]["texture"]
        assert np.array_equal(pixels(tmp_path, row), call(want, kontext, **more))
    # Other prompts beside them change no picture: all five are kept.
    assert job("spread: 5", "spread: 10", text=text).kept == 5


def test_prompts_that_differ_in_the_picture_alone_are_two(toy_zoo, job, tmp_path):
    rows = zoo.load_prompts("shapes-flux")
    twice = next(r["prompt"] for i, r in enumerate(rows) if r["prompt"] in
                 [other["prompt"] for other in rows[:i]])  # fmt: skip
    Image.fromarray(draw_reference("dotted", 1)).save(tmp_path / "two.png")
    text = JOB.replace("a red circle\n", f"{{prompt: {twice}, image: two.png}}\n")
    text = text.replace("a red circle with the texture of the reference", twice)
    outcome = job(text=text)
    assert outcome.made == 2 and len({key_of(row) for row in outcome.rows}) == 2
    assert (tmp_path / "out" / "sheet.png").is_file()


def files(tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "tiny.png")
    frames = [Image.new("RGB", (16, 16), (v, 0, 0)) for v in (0, 99)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    Image.new("L", (9000, 1)).save(tmp_path / "thin.png")
    Image.fromarray(draw_reference("striped", 1)).save(tmp_path / "copy.png")


@pytest.mark.parametrize(
    "new, words",
    [
        ("absent.png", ["job.yaml:4:", "prompts[1].image", "no such picture", "absent.png"]),
        ("notes.png", ["prompts[1].image", "notes.png", "expected PNG, JPEG"]),
        (".", ["prompts[1].image", "a folder"]),
        ("tiny.png", ["4 x 4 pixels", "8 to 16384"]),
        ("thin.png", ["9000 x 1 pixels"]),
        ("moving.png", ["holds 2 frames"]),
        ("one.png, size: 3", ["prompts[1].size", "unknown key", "prompt, image"]),
        ("''", ["prompts[1].image", "at least 1 character"]),
        (f"one.png}}\n  - {{prompt: {CAPTION}, image: one.png", ["prompts[2]", "already prompt 1"]),
        (f"one.png}}\n  - {{prompt: {CAPTION}, image: copy.png",
         ["prompts[2]", "'copy.png'", "same pixels", "'one.png'"]),
        ("one.png}\n  - {image: one.png", ["prompts[2]", "'prompt' is missing"]),
    ],
)  # fmt: skip
def test_pictures_that_cannot_go_in_are_refused_early(toy_zoo, job, tmp_path, new, words):
    files(tmp_path)
    with pytest.raises(AttnControlError) as caught:
        job("one.png", new)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_without_pictures_refuses_them(world, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
    text = PLAIN.replace("a blue square]", "{prompt: b, image: one.png}]")
    with pytest.raises(AttnControlError, match="prompts: FakePipe takes no reference pictures"):
        render(world.job(text), tmp_path / "out")
    assert not world.calls


def test_pipelines_are_asked_whether_they_take_or_need_a_picture():
    import diffusers

    def ask(name, *prompts):
        check_pictures(object.__new__(getattr(diffusers, name)), list(prompts), source)

    source = YamlFile("job.yaml", {})
    plain, pictured = Prompt("a"), Prompt("b", Reference("b.png", "0"))
    ask("FluxKontextPipeline", plain, pictured)
    ask("StableDiffusionImg2ImgPipeline", pictured)
    ask("WanImageToVideoPipeline", pictured)
    with pytest.raises(AttnControlError, match=r"prompts\[1\].image: FluxPipeline takes no.*b.png"):
        ask("FluxPipeline", plain, pictured)
    with pytest.raises(AttnControlError, match="WanImageToVideoPipeline needs a picture.*'a'"):
        ask("WanImageToVideoPipeline", pictured, plain)


def test_the_reference_decides_the_texture_of_the_verdict(tmp_path):
    choice = ModelChoice("zoo", "shapes-flux", None, None, "float32", "cpu")
    made = Made((Image.fromarray(zoo.draw_truth("shapes-flux", CAPTION, 5, "dotted")),))
    for texture in ("dotted", "barred"):
        Image.fromarray(draw_reference(texture, 2)).save(tmp_path / f"{texture}.png")
        given = Reference("x", "0", path=tmp_path / f"{texture}.png")
        fixed = Reference(texture, "0", drawn=(texture, 2))
        for reference in (given, fixed):
            score = judge(choice, made, Prompt(CAPTION, reference))
            assert score["right"] == score["texture"] == (texture == "dotted")
    assert judge(choice, made, Prompt(CAPTION)) is None, "nothing says which texture"
    named = Prompt("a dotted red circle", fixed)
    assert judge(choice, made, named)["right"], "the caption names it itself"


def test_the_size_of_the_picture_does_not_change_that_of_the_result(toy_zoo, job, tmp_path):
    Image.new("RGB", (48, 80), (9, 99, 9)).save(tmp_path / "one.png")
    assert job().rows[1]["size"] == [64, 64]
    wide = job("height: 64, width: 64", "height: 32, width: 96")
    assert wide.rows[1]["size"] == [96, 32]
