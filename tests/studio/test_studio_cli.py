"""`attn-control studio` and the launcher of the Space: what they allow, and what they refuse."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attn_control.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launched(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "attn_control.studio.launch.launch",
        lambda settings, **where: calls.append((settings, where)),
    )
    return calls


def run(*arguments):
    return CliRunner().invoke(app, ["studio", *map(str, arguments)])


def test_it_is_closed_to_all_but_this_machine_by_default(launched):
    assert run().exit_code == 0
    ((settings, where),) = launched
    assert where["host"] == "127.0.0.1" and not settings.allow_hub and settings.folders == ()


def test_options_become_settings(launched, tmp_path):
    found = run(
        "--models", tmp_path, "--allow-hub", "--max-pixels", 4096, "--max-steps", 9,
        "--max-frames", 5, "--host", "0.0.0.0", "--port", 7861, "--device", "cpu",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    ((settings, where),) = launched
    assert settings.folders == (tmp_path,) and settings.allow_hub and settings.device == "cpu"
    assert (settings.pixels, settings.steps, settings.frames) == (4096, 9, 5)
    assert where == {"host": "0.0.0.0", "port": 7861, "browser": False}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--models", "/nothing/here"), "no folder"),
        (("--device", "tpu"), "expected auto, cpu, cuda"),
    ],
)
def test_bad_options_are_one_sentence(launched, arguments, words):
    found = run(*arguments)
    assert found.exit_code == 2 and words in found.output and not launched


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    found = run()
    assert found.exit_code == 2 and "pip install 'attn-control[demo]'" in found.output


def test_the_space_serves_built_in_models_alone(launched, monkeypatch):
    monkeypatch.delenv("STUDIO_ALLOW_HUB", raising=False)
    monkeypatch.setenv("PORT", "7862")
    runpy.run_path(str(ROOT / "demos" / "app.py"), run_name="__main__")
    ((settings, where),) = launched
    assert not settings.allow_hub and settings.folders == () and where["port"] == 7862


def test_the_space_has_its_header_and_its_requirements():
    import yaml

    head = (ROOT / "demos" / "README.md").read_text(encoding="utf-8").split("---")[1]
    header = yaml.safe_load(head)
    assert header["sdk"] == "gradio" and (ROOT / "demos" / header["app_file"]).is_file()
    pins = (ROOT / "constraints.txt").read_text()
    assert f"gradio=={header['sdk_version']}\n" in pins
    assert "attn-control[demo]" in (ROOT / "demos" / "requirements.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_launcher_serves_the_page(tmp_path):
    """`python demos/app.py` itself, as a Space runs it: the page comes, and Ctrl-C ends it."""
    pytest.importorskip("gradio", reason="the studio's page needs the demo extra")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    secret = "hf_thisIsNobodysToken"
    environment = {**os.environ, "PORT": str(port), "PYTHONUNBUFFERED": "1", "HF_TOKEN": secret}
    command = [sys.executable, str(ROOT / "demos" / "app.py")]
    # A suite in the background of a shell ignores Ctrl-C, and its children inherit that.
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        told = next(line for line in server.stdout if "the studio is at" in line)
        assert f":{port}" in told
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=300) as answer:
            parts = answer.read().decode()
        assert "attn-control studio" in parts and "shapes-sd3" in parts
        assert str(Path.home()) not in parts and str(ROOT) not in parts, "no path of this machine"
        assert secret not in parts
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(120) is not None
