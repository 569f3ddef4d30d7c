"""Several processes make what one would, each picture once, and tell what went wrong."""

from __future__ import annotations

import types

import pytest
import torch
from typer.testing import CliRunner

from attn_control.cli import app
from attn_control.errors import AttnControlError
from attn_control.eval import workers
from attn_control.eval.run import prepare_suite, run_suite

FEW = ("spread: 40", "spread: 12")  # 24 pictures


def pictures(folder):
    found = {p.name: p.read_bytes() for p in (folder / "paint" / "images").glob("*.png")}
    assert len(found) == 24
    return found


@pytest.mark.parametrize("jobs", [2, 3, 5])
def test_every_picture_is_in_one_share_and_variants_are_dealt_out_evenly(
    painter, suite, tmp_path, jobs
):
    (each,) = prepare_suite(suite(), tmp_path, None).values()
    shares = [workers.part(each, number, jobs).tasks for number in range(jobs)]
    assert sorted(task.file for share in shares for task in share) == sorted(
        task.file for task in each.tasks
    )
    for plan in each.variants:
        counts = [sum(task.variant == plan.name for task in share) for share in shares]
        assert max(counts) - min(counts) <= 1


def test_as_many_processes_as_pay(monkeypatch):
    def on(device):
        return {"paint": types.SimpleNamespace(choice=types.SimpleNamespace(device=device))}

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert workers.processes(on("cpu"), 400) == 4
    assert workers.processes(on("cpu"), 25) == 2
    assert workers.processes(on("cpu"), 3) == workers.processes(on("cuda:0"), 400) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert workers.processes(on("cpu"), 4000) == workers.MOST


def test_what_is_missing_is_counted(painter, suite, tmp_path):
    few, out = suite(*FEW), tmp_path / "out"
    prepared = prepare_suite(few, out, None)
    assert workers.missing(prepared, out, False) == 24
    run_suite(few, out)
    (out / "paint" / "images" / prepared["paint"].tasks[5].file).unlink()
    assert workers.missing(prepared, out, False) == 1
    assert workers.missing(prepared, out, True) == 24


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(suite, tmp_path):
    """On shapes-sd3 itself; what is there already stays, unless it is to be made anew."""
    few = suite(*FEW)
    alone, both = tmp_path / "alone", tmp_path / "both"
    run_suite(few, alone)
    run_suite(few, both, jobs=2)
    assert (alone / "result.json").read_bytes() == (both / "result.json").read_bytes()
    want = {name: pixels(png) for name, png in pictures(alone).items()}
    assert {name: pixels(png) for name, png in pictures(both).items()} == want
    files = sorted((both / "paint" / "images").glob("*.png"))
    times = {path: path.stat().st_mtime_ns for path in files}
    files[3].unlink()
    files[17].unlink()
    run_suite(few, both, jobs=2)
    made = [path for path in files if path.stat().st_mtime_ns != times[path]]
    assert made == [files[3], files[17]]
    run_suite(few, both, jobs=2, overwrite=True)
    assert all(path.stat().st_mtime_ns != times[path] for path in files)
    assert (alone / "result.json").read_bytes() == (both / "result.json").read_bytes()


def pixels(png: bytes) -> bytes:
    """Without the record, which has the time that a picture took."""
    import io

    from PIL import Image

    return Image.open(io.BytesIO(png)).tobytes()


@pytest.mark.slow
def test_a_process_that_fails_says_why(suite, tmp_path):
    few, out = suite(*FEW), tmp_path / "out"
    (out / "paint").mkdir(parents=True)
    (out / "paint" / "images").write_text("in the way")
    with pytest.raises(AttnControlError, match="paint.* cannot be written"):
        run_suite(few, out, jobs=2)


@pytest.mark.slow
def test_a_process_that_is_killed_is_told(suite, tmp_path, monkeypatch):
    import multiprocessing

    def kill(*_):
        while not multiprocessing.active_children():
            pass
        multiprocessing.active_children()[0].kill()

    monkeypatch.setattr(workers, "_follow", kill)
    with pytest.raises(AttnControlError, match="ended from outside.*--jobs 1"):
        run_suite(suite(*FEW), tmp_path / "out", jobs=2)


def test_an_interrupted_share_ends_the_run(painter, suite, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("attn_control.eval.run.render_shared", interrupted)
    outcome = run_suite(suite(*FEW), tmp_path / "out", jobs=2)
    assert outcome.interrupted and outcome.result is None and not painter.calls


@pytest.mark.parametrize(
    ("asked", "got"), [(["--jobs", "3"], [3]), (["--jobs", "1"], []), ([], [8])]
)
def test_the_command_takes_a_number_of_processes(painter, suite, tmp_path, monkeypatch, asked, got):
    """Left alone it takes one a core, if each has ten pictures to make: here there are 80."""
    taken = []
    monkeypatch.setattr(
        "attn_control.eval.run.render_shared", lambda *_, jobs, **__: taken.append(jobs) or []
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    args = ["eval", str(suite(load=False)), "--out", str(tmp_path / "out"), *asked]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert taken == got


def test_no_process_is_refused(suite, tmp_path):
    result = CliRunner().invoke(app, ["eval", str(suite(load=False)), "--jobs", "0"])
    assert result.exit_code == 2 and "--jobs" in result.output
