"""Runs: the same pictures as `attn-control render`, cancelling within a step, one at a time."""

from __future__ import annotations

import gc
import hashlib
import json
import random
import threading
import time

import numpy as np
import pytest
from PIL import Image

from attn_control.errors import AttnControlError
from attn_control.render.command import render
from attn_control.session import Session
from attn_control.studio.runner import Runner, Stopped
from attn_control.studio.settings import Refused, Settings
from attn_control.studio.studio import Studio
from attn_control.studio.tabs import METHODS


def finished(run, seconds=120):
    assert run.wait(seconds), "the run is stuck"
    return run


def pixels(path):
    return hashlib.sha256(np.asarray(Image.open(path)).tobytes()).hexdigest()


def at_rest(pipe):
    """Nothing of a session is left on the model, its processors or the scheduler."""
    model = pipe.transformer
    assert "_attn_control" not in vars(model) and type(model).__module__.startswith("diffusers")
    assert all(
        type(each).__module__.startswith("diffusers") for each in model.attn_processors.values()
    )
    assert "step" not in vars(pipe.scheduler)


def open_sessions():
    gc.collect()
    return {id(each) for each in gc.get_objects() if type(each) is Session and not each._closed}


def test_a_run_makes_both_sides_and_says_what_fired(studio, form, tiny_sd3):
    result = finished(studio.submit("me", form)).result
    without, with_ = result.sides["without"], result.sides["with"]
    assert pixels(without.file) != pixels(with_.file) and 0 < result.psnr < 100
    assert without.step_seconds > 0 and without.size == (16, 16)
    (control,) = result.report["controls"]
    assert control["fired"] and sorted(s["label"] for s in control["sites"].values()) == [
        "L0.joint",
        "L1.joint",
    ]
    at_rest(tiny_sd3)


def test_the_command_renders_the_same_pictures_from_the_pages_yaml(studio, form, tmp_path):
    """By name, which is a hash of all settings, and by pixels."""
    form |= {"NAG.on": True, "seed": 11, "SoftPAG.more": "{parallel: 0.5}", "SoftPAG.to": 0.7}
    run = finished(studio.submit("me", form))
    assert run.state == "done", run.error
    job = tmp_path / "job.yaml"
    job.write_text(studio.job(form))
    assert job.read_text() == run.result.job
    outcome = render(job, tmp_path / "out")
    theirs = {row["variant"]: tmp_path / "out" / "images" / row["file"] for row in outcome.rows}
    for variant, side in run.result.sides.items():
        assert side.file.name == theirs[variant].name
        assert pixels(side.file) == pixels(theirs[variant])
    assert len(theirs) == 2


def test_without_a_control_there_is_one_side(studio, form):
    run = finished(studio.submit("me", form | {"SoftPAG.on": False}))
    assert list(run.result.sides) == ["without"] and run.result.report is None


@pytest.mark.parametrize("at", [1, 2, 4])
def test_cancel_takes_effect_at_the_next_step(studio, form, tiny_sd3, monkeypatch, at):
    run = studio.submit("other", form)
    finished(run)
    seen = []
    step = type(tiny_sd3.scheduler).step

    def watched(self, *arguments, **options):
        seen.append(1)
        if len(seen) == at:
            studio.cancel("me")
        return step(self, *arguments, **options)

    monkeypatch.setattr(type(tiny_sd3.scheduler), "step", watched)
    run = finished(studio.submit("me", form))
    assert run.state == "cancelled" and len(seen) == at
    assert ("without" in run.result.sides) == (at > 3), "what was finished stays"
    at_rest(tiny_sd3)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        ({"prompt": "  "}, "prompt", "write a prompt"),
        ({"prompt": "x" * 3000}, "prompt", "3000 characters"),
        ({"prompt": "a\ud800b"}, "prompt", "no text"),
        ({"prompt": "a\x00b"}, "prompt", "no text"),
        ({"prompt": ["a"]}, "prompt", "must be text"),
        ({"steps": 100_000}, "sampler", "from 1 to 100"),
        ({"steps": 0}, "sampler", "from 1 to 100"),
        ({"steps": 2.5}, "sampler", "whole number"),
        ({"steps": float("inf")}, "sampler", "whole number"),
        ({"height": 100_000}, "sampler", "pixels"),
        ({"width": 1 << 40}, "sampler", "width must be from"),
        ({"width": 17}, "sampler", "multiple of"),
        ({"width": None}, "sampler", "whole number"),
        ({"seed": -1}, "sampler", "seed must be from 0"),
        ({"seed": 2**80}, "sampler", "seed must be from 0"),
        ({"cfg": float("nan")}, "sampler", "CFG scale"),
        ({"cfg": "9"}, "sampler", "CFG scale"),
        ({"negative": "x" * 3000}, "sampler", "characters"),
        ({"cfg": 1.0, "negative": "blue"}, "sampler", "ignored without CFG"),
        ({"SoftPAG.heads": "L99"}, "SoftPAG", "L99"),
        ({"SoftPAG.from": 0.4, "SoftPAG.to": 0.5}, "SoftPAG", "0.4-0.5"),
        ({"SkipLayers.on": True, "SkipLayers.heads": "L7"}, "SkipLayers", "L7"),
        ({"model": "shapes-none"}, "model", "no model of this studio"),
        ({"model": None}, "model", "choose a model"),
    ],
)
def test_bad_input_is_a_sentence_at_its_place(studio, form, change, place, words):
    def attempt():
        run = studio.submit("me", form | change)
        raise finished(run).error or AssertionError("it ran")

    with pytest.raises(Refused) as caught:
        attempt()
    assert caught.value.place == place and words in str(caught.value)
    assert str(studio.folder) not in str(caught.value)
    assert finished(studio.submit("me", form)).state == "done", "the studio goes on"


def test_an_unexpected_failure_tells_no_detail_and_ends_nothing(studio, form, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("secret /etc/passwd")

    with monkeypatch.context() as patch:
        patch.setattr("attn_control.studio.work.prepare", broken)
        run = finished(studio.submit("me", form))
    assert run.state == "failed" and "secret" not in str(run.error)
    assert finished(studio.submit("me", form)).state == "done"


def test_a_run_that_takes_too_long_ends(tiny_sd3, form):
    quick = Studio(Settings(seconds=0.2), METHODS)
    try:
        run = finished(quick.submit("me", form | {"steps": 100}))
        assert run.state == "failed" and "longer than 0.2 s" in str(run.error)
    finally:
        quick.close()


# ---- the line alone, with work that only waits


def sleeper(seconds, log):
    def work(run):
        log.append(("begins", threading.get_ident()))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            run.check()
            time.sleep(0.001)
        log.append(("ends", threading.get_ident()))
        return "made"

    return work


def test_one_run_at_a_time_in_the_order_of_the_line():
    runner, log = Runner(Settings()), []
    runs = [runner.submit(f"owner {n}", sleeper(0.01, log)) for n in range(5)]
    assert sorted(runner.ahead(run) for run in runs)[-1] >= 3
    assert all(finished(run).state == "done" for run in runs)
    assert [what for what, _ in log] == ["begins", "ends"] * 5 and len({i for _, i in log}) == 1
    runner.close()


def test_the_line_has_an_end_and_each_page_one_run():
    runner, stop = Runner(Settings(waiting=2)), threading.Event()
    first = runner.submit("a", lambda run: stop.wait(60))
    while first.state == "waiting":
        time.sleep(0.001)
    runner.submit("b", lambda run: None)
    with pytest.raises(Refused, match="has not ended"):
        runner.submit("b", lambda run: None)
    runner.submit("c", lambda run: None)
    with pytest.raises(Refused, match="2 runs wait already"):
        runner.submit("d", lambda run: None)
    assert runner.cancel("c") and not runner.cancel("nobody")
    stop.set()
    runner.close()


@pytest.mark.parametrize("error", [MemoryError(), SystemExit(3), ValueError("x"), Stopped()])
def test_whatever_work_raises_the_line_goes_on(error):
    def work(run):
        raise error

    runner = Runner(Settings())
    assert finished(runner.submit("a", work)).state in ("failed", "cancelled")
    assert finished(runner.submit("a", lambda run: 5)).result == 5
    runner.close()


def test_fifty_queued_runs_with_random_cancels_leave_nothing(tiny_sd3, form, monkeypatch):
    """Real renders, some cancelled in the line, some at a step under way, from other threads."""
    rng = random.Random(0)
    studio = Studio(Settings(waiting=60, kept=10), METHODS)
    fates = [rng.choice(["done", "done", "line", "step"]) for _ in range(50)]
    at_step = {f"page {n}": rng.randint(1, 4) for n, fate in enumerate(fates) if fate == "step"}
    steps, step, gate = {}, type(tiny_sd3.scheduler).step, threading.Event()
    before = open_sessions()

    def cancel(owner):
        thread = threading.Thread(target=studio.cancel, args=[owner])
        thread.start()
        thread.join()

    def watched(self, *arguments, **options):
        owner = studio.runner._now.owner
        steps[owner] = steps.get(owner, 0) + 1
        if steps[owner] == at_step.get(owner):
            cancel(owner)
        return step(self, *arguments, **options)

    monkeypatch.setattr(type(tiny_sd3.scheduler), "step", watched)
    try:
        studio.facts("shapes-sd3")
        runs = {}
        studio.runner.submit("gate", lambda run: gate.wait(60))
        for number, fate in enumerate(fates):
            owner = f"page {number}"
            runs[owner] = studio.submit(owner, form | {"seed": number, "steps": 2})
            if fate == "line":
                cancel(owner)
                cancel(owner)  # an impatient visitor
        gate.set()
        assert all(finished(run, 280) for run in runs.values())
        for number, fate in enumerate(fates):
            run = runs[f"page {number}"]
            wanted = "done" if fate == "done" else "cancelled"
            assert run.state == wanted, f"{number}, {fate}: {run.error}"
            assert (run.started is None) == (fate == "line")
        assert all(steps[owner] == at for owner, at in at_step.items()), "at that very step"
        assert 5 < fates.count("line") and 5 < fates.count("step")
        assert not studio.runner._line and studio.runner._now is None
        assert len([each for each in studio.folder.iterdir() if each.is_dir()]) <= 10
        at_rest(tiny_sd3)
        last = finished(studio.submit("me", form))
        assert last.state == "done"
    finally:
        studio.close()
    assert not studio.folder.exists()
    assert not studio.runner._thread.is_alive()
    assert open_sessions() <= before, "a session is open"


def test_the_pages_record_is_inside_the_picture(studio, form):
    side = finished(studio.submit("me", form | {"seed": 5})).result.sides["with"]
    record = json.loads(Image.open(side.file).text["attn_control"])
    assert record["seed"] == 5 and record["settings"]["controls"][0]["control"] == "SoftPAG"


def test_the_studio_refuses_to_open_after_it_closed(tiny_sd3, form):
    closed = Studio(Settings(), METHODS)
    closed.close()
    with pytest.raises(AttnControlError, match="closing"):
        closed.submit("me", form)
