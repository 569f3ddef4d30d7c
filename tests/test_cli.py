"""The command line: quick help, one-line errors, exit codes, and a real process that is stopped."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from render import fakes
from typer.testing import CliRunner

import attn_control
from attn_control.cli import app


@pytest.fixture
def world(monkeypatch, tmp_path):
    pipe = fakes.install_zoo(monkeypatch, tmp_path / "zoo")
    monkeypatch.setattr("attn_control.attach", fakes.fake_attach([]), raising=False)
    (tmp_path / "job.yaml").write_text(fakes.JOB)
    monkeypatch.chdir(tmp_path)
    return pipe


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_comes_within_a_second_and_without_torch():
    code = (
        "import sys, attn_control.cli as cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'cv2', 'pydantic')"
        " if name in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("[]\n"), done.stdout[-200:]
    assert min(seconds) < 1.0


@pytest.mark.parametrize("command", ["quickstart", "render", "doctor", "presets", "studio"])
def test_every_command_has_help(command):
    found = run(command, "--help")
    assert found.exit_code == 0 and command in found.output


def test_version():
    found = run("--version")
    assert found.output.strip() == f"attn-control {attn_control.__version__}"


def test_no_command_shows_help():
    assert "quickstart" in run().output


def test_render_prints_the_table_and_the_paths(world, tmp_path):
    found = run("render", "job.yaml", "--out", "out")
    assert found.exit_code == 0, found.output
    for words in ("variant", "fully right", "vs plain", "soft", "sheet    out/sheet.png"):
        assert words in found.output
    assert "results  out/results.jsonl" in found.output
    assert len(list((tmp_path / "out" / "images").iterdir())) == 12
    again = run("render", "job.yaml", "--out", "out")
    assert "0 pictures made, 12 kept from before" in again.output
    assert "12 pictures made" in run("render", "job.yaml", "--out", "out", "--overwrite").output


def test_dry_run(world, tmp_path):
    found = run("render", "job.yaml", "--out", "out", "--dry-run")
    assert found.exit_code == 0 and "nothing was rendered" in found.output
    assert not (tmp_path / "out").exists()


def test_an_error_is_one_message_with_exit_code_2(world, tmp_path):
    (tmp_path / "job.yaml").write_text(fakes.JOB.replace("0-1", "'[/b] [red]'"))
    found = run("render", "job.yaml", "--out", "out")
    assert found.exit_code == 2
    assert found.stderr.startswith("error: job.yaml:3:1: seeds: '[/b] [red]' is not a seed")
    assert found.stderr.count("\n") == 1 and "Traceback" not in found.output


def test_an_interrupted_run_ends_with_130(world, tmp_path):
    def interrupt(number):
        if number == 4:
            raise KeyboardInterrupt

    world.before_call = interrupt
    found = run("render", "job.yaml", "--out", "out")
    assert found.exit_code == 130
    assert "interrupted: 3 pictures made" in found.output
    assert "Traceback" not in found.output


def test_interrupted_before_the_first_picture(world, monkeypatch):
    from attn_control import zoo

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "load", interrupt)
    found = run("render", "job.yaml", "--out", "out")
    assert found.exit_code == 130 and "interrupted" in found.stderr


def test_unknown_options_and_commands_are_refused():
    assert run("render", "job.yaml").exit_code == 2
    assert run("render", "job.yaml", "--out", "x", "--fast").exit_code == 2
    assert run("dance").exit_code != 0
