"""A whole job on a fake pipeline: files, metadata, resume, interruption, failure, summary."""

from __future__ import annotations

import errno
import json
import os

import pytest
from PIL import Image
from render.fakes import JOB, fake_attach
from rich.console import Console

from attn_control.errors import AttnControlError
from attn_control.render.command import render
from attn_control.render.store import read_record, read_rows


def quiet():
    return Console(file=open(os.devnull, "w"))


def go(world, out, text=JOB, **options):
    return render(world.job(text), out, **options)


def test_a_job_leaves_pictures_rows_reports_and_a_sheet(world, tmp_path):
    out = tmp_path / "out"
    outcome = go(world, out)
    assert (outcome.made, outcome.kept, outcome.total, outcome.notes) == (12, 0, 12, [])
    files = sorted(path.name for path in (out / "images").iterdir())
    assert len(files) == 12 and all(name.endswith(".png") for name in files)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert sorted(row["file"] for row in rows) == files
    assert {row["variant"] for row in rows} == {"plain", "cfg", "soft"}
    assert all(row["seconds"] >= 0 and row["peak_bytes"] > 1e6 for row in rows)
    assert {row["score"]["right"] for row in rows} == {True, False}
    assert sorted(path.name for path in (out / "reports").iterdir()) == [
        "cfg.json", "plain.json", "soft.json",
    ]  # fmt: skip
    assert (out / "sheet.png").is_file()


def test_variants_share_the_seed_and_the_first_noise(world, tmp_path):
    go(world, tmp_path / "out")
    seeds = [call["generator"].initial_seed() for call in world.calls]
    assert seeds == [0, 1, 0, 1] * 3
    assert all(call["generator"].device.type == "cpu" for call in world.calls)
    assert [call["guidance_scale"] for call in world.calls] == [1.0] * 4 + [3.0] * 8
    assert {call["num_inference_steps"] for call in world.calls} == {3}


def test_own_seeds_are_those_fixed_beside_the_zoo_prompts(world, tmp_path):
    text = JOB.replace("[a red circle, a blue square]", "{zoo: shapes-sd3, limit: 3}")
    outcome = go(world, tmp_path / "out", text.replace("0-1", "own"))
    assert [call["generator"].initial_seed() for call in world.calls] == [1000, 1001, 1002] * 3
    assert [(row["prompt"], row["seed"]) for row in outcome.rows[:2]] == [
        ("prompt 0", 1000), ("prompt 1", 1001),
    ]  # fmt: skip


def test_each_variant_is_attached_once_and_closed(world, tmp_path):
    go(world, tmp_path / "out")
    running = world.log[6:]  # the first three pairs are the checks
    assert running[1::2] == ["closed"] * 3
    assert running[0::2] == [
        "attached ", "attached ", "attached SoftPAG(heads='L1H0', u=0.5, scale=2.0)",
    ]  # fmt: skip


def test_the_picture_tells_its_settings(world, tmp_path):
    go(world, tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    for name, row in rows.items():
        record = read_record(tmp_path / "out" / "images" / name)
        assert record == row
    row = next(row for row in rows.values() if row["variant"] == "soft")
    assert row["settings"]["controls"][0]["control"] == "SoftPAG"
    assert row["settings"]["controls"][0]["heads"] == "L1H0"
    assert row["settings"]["controls"][0]["window"] == "0-1", "defaults are written out"
    assert row["settings"]["sampler"]["num_inference_steps"] == 3
    assert row["settings"]["model"]["name"] == "shapes-sd3"
    assert set(row["versions"]) == {"python", "attn-control", "torch", "diffusers", "transformers"}


def test_the_picture_carries_the_parameters_that_browsers_read(world, tmp_path):
    go(world, tmp_path / "out")
    path = next(p for p in (tmp_path / "out" / "images").iterdir() if "-soft-" in p.name)
    with Image.open(path) as image:
        lines = image.text["parameters"].split("\n")
    assert lines[0] in ("a red circle", "a blue square")
    assert lines[-1].startswith("Steps: 3, ")
    assert "CFG scale: 3.0, Seed: " in lines[-1] and "Size: 32x32" in lines[-1]
    assert "SoftPAG(heads=L1H0" in lines[-1]


def test_a_prompt_in_any_script_survives_the_round_trip(world, tmp_path):
    prompt = 'a "red" круг: 圆\u2028, [b]'
    text = JOB.replace("[a red circle, a blue square]", json.dumps([prompt]))
    outcome = go(world, tmp_path / "out", text)
    path = tmp_path / "out" / "images" / outcome.rows[0]["file"]
    assert read_record(path)["prompt"] == prompt
    assert path.name.isascii()
    assert len(read_rows(tmp_path / "out" / "results.jsonl")) == 6


def test_the_same_command_again_renders_nothing(world, tmp_path):
    out = tmp_path / "out"
    first = go(world, out)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    again = go(world, out)
    assert (again.made, again.kept, len(world.calls)) == (0, 12, 12)
    assert again.rows == first.rows
    assert {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()} == stamps
    assert len((out / "results.jsonl").read_text().splitlines()) == 12


def test_overwrite_renders_all_again(world, tmp_path):
    go(world, tmp_path / "out")
    assert go(world, tmp_path / "out", overwrite=True).made == 12
    assert len(world.calls) == 24
    assert len(read_rows(tmp_path / "out" / "results.jsonl")) == 12


def test_changed_settings_make_new_files_beside_the_old(world, tmp_path):
    go(world, tmp_path / "out")
    changed = go(world, tmp_path / "out", JOB.replace("u: 0.5", "u: 0.25"))
    assert (changed.made, changed.kept) == (4, 8)
    assert len(list((tmp_path / "out" / "images").iterdir())) == 16


def test_new_weights_are_new_settings(world, tmp_path):
    go(world, tmp_path / "out")
    (tmp_path / "zoo" / "model.safetensors").write_bytes(b"others!")
    assert go(world, tmp_path / "out").made == 12


def test_a_damaged_picture_is_rendered_again(world, tmp_path):
    first = go(world, tmp_path / "out")
    paths = [tmp_path / "out" / "images" / row["file"] for row in first.rows]
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    paths[1].write_bytes(b"")
    Image.new("RGB", (32, 32)).save(paths[2])  # a picture, but none of ours
    again = go(world, tmp_path / "out")
    assert (again.made, again.kept) == (3, 9)
    assert all(read_record(path) for path in paths)


def test_a_lost_or_half_written_row_is_rebuilt_from_the_picture(world, tmp_path):
    first = go(world, tmp_path / "out")
    results = tmp_path / "out" / "results.jsonl"
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:50])
    again = go(world, tmp_path / "out")
    assert again.made == 0 and again.rows == first.rows
    assert read_rows(results) == {row["file"]: row for row in first.rows}


def test_ctrl_c_keeps_what_is_done_and_says_so(world, tmp_path):
    def interrupt(number):
        if number == 6:
            raise KeyboardInterrupt

    world.before_call = interrupt
    outcome = go(world, tmp_path / "out")
    assert outcome.interrupted and len(outcome.rows) == 5
    assert world.log[-1] == "closed"
    assert len(list((tmp_path / "out" / "images").iterdir())) == 5, "no temporary file is left"
    assert (tmp_path / "out" / "sheet.png").is_file()
    world.before_call = None
    rest = go(world, tmp_path / "out")
    assert (rest.made, rest.kept, rest.interrupted) == (7, 5, False)


def test_the_notice_of_an_interruption_counts(world, tmp_path):
    def interrupt(number):
        if number == 6:
            raise KeyboardInterrupt

    world.before_call = interrupt
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    go(world, tmp_path / "out", console=console)
    text = console.export_text()
    assert "interrupted: 5 pictures made, 0 kept from before, 7 of 12 missing" in text
    assert "goes on from there" in text


def test_a_failing_picture_is_one_error_and_keeps_the_rest(world, tmp_path):
    def fail(number):
        if number == 7:
            raise RuntimeError("mat1 and mat2\nshapes cannot be multiplied")

    world.before_call = fail
    with pytest.raises(AttnControlError) as caught:
        go(world, tmp_path / "out")
    message = str(caught.value)
    assert "variant 'cfg', prompt 'a blue square', seed 0" in message
    assert "RuntimeError: mat1 and mat2 (6 of 12 pictures are finished and kept in" in message
    assert "\n" not in message
    assert world.log[-1] == "closed"
    assert len(read_rows(tmp_path / "out" / "results.jsonl")) == 6


def test_a_disk_that_fills_up_is_one_error_and_leaves_no_half_file(world, tmp_path, monkeypatch):
    from PIL import Image as module

    save = module.Image.save

    def full(self, path, **options):
        if world.calls and len(world.calls) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path, **options)

    monkeypatch.setattr(module.Image, "save", full)
    with pytest.raises(AttnControlError, match="the disk is full.*2 of 12 pictures"):
        go(world, tmp_path / "out")
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2


def test_a_size_that_the_pipeline_changes_is_an_error(world, tmp_path, monkeypatch):
    real = type(world).__call__

    def smaller(self, prompt=None, height=32, width=32, **rest):
        return real(self, prompt=prompt, height=16, width=16, **rest)

    smaller.__signature__ = __import__("inspect").signature(real)
    monkeypatch.setattr(type(world), "__call__", smaller)
    with pytest.raises(AttnControlError, match="made 16 x 16 pixels .* width 32 and height 32"):
        go(world, tmp_path / "out")


def test_a_control_that_never_acted_is_noted(world, tmp_path, monkeypatch):
    monkeypatch.setattr("attn_control.attach", fake_attach([], fired=False), raising=False)
    notes = go(world, tmp_path / "out").notes
    assert len(notes) == 1
    assert "variant 'soft'" in notes[0] and "never acted (no call)" in notes[0]


def test_pictures_of_one_colour_are_noted(world, tmp_path):
    text = JOB.replace("guidance_scale: 1.0", "guidance_scale: 0.0")
    assert "4 picture(s) show one single colour" in go(world, tmp_path / "out", text).notes[0]


def test_prompts_without_a_scorer_have_no_score(world, tmp_path):
    text = JOB.replace("[a red circle, a blue square]", "[un cercle rouge]")
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    outcome = go(world, tmp_path / "out", text, console=console)
    assert all(row["score"] is None for row in outcome.rows)
    assert "no scorer" in console.export_text()


def test_a_dry_run_checks_all_and_writes_nothing(world, tmp_path):
    out = tmp_path / "deep" / "out"
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    assert go(world, out, dry_run=True, console=console) is None
    text = console.export_text()
    assert "12 pictures: 3 variants x 2 prompts x 2 seeds" in text
    # plain 1 x 3 steps, cfg 2 x 3, soft 2 x 3 and 3 of the cond row alone, four pictures each.
    assert "about 72 row-forwards" in text
    assert "SoftPAG(heads='L1H0', u=0.5, scale=2.0)" in text
    assert str(out) in text
    assert not (tmp_path / "deep").exists() and not world.calls
    with pytest.raises(AttnControlError, match="L99"):
        go(world, out, JOB.replace("L1H0", "L99H0"), dry_run=True)
    assert not (tmp_path / "deep").exists()


def test_model_and_device_of_the_command_line_win(world, tmp_path):
    with pytest.raises(AttnControlError, match="sees 0 CUDA device|cuda"):
        go(world, tmp_path / "out", device="cuda:7")
    with pytest.raises(AttnControlError, match="--device: expected auto, cpu.*'gpu'"):
        go(world, tmp_path / "out", device="gpu")
    with pytest.raises(AttnControlError, match="'shapes-sd4'.*did you mean 'shapes-sd3'"):
        go(world, tmp_path / "out", model="shapes-sd4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "prompts,expected",
    [
        ("{zoo: shapes-sd3}", [f"prompt {i}" for i in range(8)]),
        ("{zoo: shapes-sd3, split: heldout}", ["prompt 6", "prompt 7"]),
        ("{zoo: shapes-sd3, split: seen, objects: 2, limit: 2}", ["prompt 1", "prompt 3"]),
        ("{zoo: shapes-sd3, offset: 5, limit: 2}", ["prompt 5", "prompt 6"]),
        ("{zoo: shapes-sd3, spread: 3}", ["prompt 0", "prompt 2", "prompt 5"]),
        ("{zoo: shapes-sd3, offset: 6, spread: 9}", ["prompt 6", "prompt 7"]),
        ("lines.txt", ["one", "two, with a comma"]),
        ("{file: lines.txt, offset: 1}", ["two, with a comma"]),
    ],
)
def test_prompts_come_from_three_places(world, tmp_path, prompts, expected):
    (tmp_path / "lines.txt").write_text("# a comment\none\n\n  two, with a comma  \n")
    text = JOB.replace("[a red circle, a blue square]", prompts)
    outcome = go(world, tmp_path / "out", text)
    assert list(dict.fromkeys(row["prompt"] for row in outcome.rows)) == expected
