"""The set-up behind the Makefile: which pip arguments each TORCH= leads to, without installing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "setup_env.py"
spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)

PYTORCH = "https://download.pytorch.org/whl/"
LINUX_CPU = [
    ["--no-deps", "torch==2.13.0+cpu"],
    ["--no-deps", "torch==2.13.0+cpu", "--index-url", PYTORCH + "cpu"],
]
PLAIN = [["torch==2.13.0"]]


@pytest.mark.parametrize(
    ("choice", "system", "gpu", "flavour", "attempts"),
    [
        ("auto", "Linux", None, "cpu", LINUX_CPU),
        ("auto", "Linux", "amd", "cpu", LINUX_CPU),
        ("auto", "Linux", "nvidia", "cuda", PLAIN),
        ("cpu", "Linux", "nvidia", "cpu", LINUX_CPU),
        ("cuda", "Linux", None, "cuda", PLAIN),
        ("auto", "Darwin", None, "cpu", PLAIN),
        ("auto", "Windows", None, "cpu", PLAIN),
        (
            *("auto", "Windows", "nvidia", "cuda"),
            [["--no-deps", "torch==2.13.0", "--index-url", PYTORCH + "cu130"]],
        ),
        ("keep", "Linux", "nvidia", "keep", []),
    ],
)
def test_each_choice_leads_to_its_build(choice, system, gpu, flavour, attempts):
    torch = setup_env.resolve(choice, "2.13.0", system, gpu)
    assert (torch.flavour, torch.attempts) == (flavour, attempts)


def test_cuda_on_a_mac_is_refused():
    with pytest.raises(SystemExit, match="no CUDA build"):
        setup_env.resolve("cuda", "2.13.0", "Darwin", None)


@pytest.mark.parametrize(
    ("paths", "commands", "smi", "seen"),
    [
        ({"/dev/nvidia0"}, set(), 1, "nvidia"),
        (set(), {"nvidia-smi"}, 0, "nvidia"),
        (set(), {"nvidia-smi"}, 9, None),  # the command without a GPU, as in many images
        ({"/dev/kfd"}, set(), 1, "amd"),
        (set(), set(), 1, None),
    ],
)
def test_what_counts_as_a_gpu(paths, commands, smi, seen):
    which = {name: name for name in commands}.get
    assert setup_env.gpu_seen(paths.__contains__, which, lambda *_, **__: smi) == seen


def test_the_size_grows_with_the_choice():
    def megabytes(choice, extras=(), there=False):
        torch = setup_env.resolve(choice, "2.13.0", "Linux", None)
        return int(setup_env.size_line(torch, extras, "Linux", there).split()[2])

    keep, cpu, cuda = (megabytes(choice) for choice in ("keep", "cpu", "cuda"))
    assert keep < cpu < 1000 < cuda
    assert megabytes("cpu", ["dev"]) > cpu
    assert megabytes("cpu", there=True) == keep


def test_the_pins_fit_the_choice():
    cpu = setup_env.constraints_for("cpu", (3, 11))
    assert cpu["torch"] == "2.13.0" and "triton" in cpu and "torchvision" not in cpu
    assert "triton" not in setup_env.constraints_for("cuda", (3, 11))
    assert set(setup_env.constraints_for("cpu", (3, 10))) == {"torch"}


def run(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=100, **kwargs
    )


def test_a_dry_run_says_the_size_before_any_pip():
    lines = run("--torch", "cpu", "--extra", "dev", "--dry-run").stdout.splitlines()
    size = next(n for n, line in enumerate(lines) if line.startswith("Download: about"))
    calls = [n for n, line in enumerate(lines) if "pip install" in line]
    assert calls and size < min(calls)
    assert lines[calls[-1]].endswith("-e .[dev]")


@pytest.fixture
def fake_pip(monkeypatch):
    """Record what pip would be asked, in the order of what is printed."""
    said = []
    monkeypatch.setattr(setup_env, "print", lambda *a, **_: said.append(" ".join(a)), raising=False)
    monkeypatch.setattr(setup_env, "torch_in", lambda python: None)
    monkeypatch.setattr(setup_env, "make_venv", lambda venv: sys.executable)

    def pip(python, arguments, quiet_errors=False):
        said.append("pip " + " ".join(arguments))
        return "+cpu" not in said[-1] or "--index-url" in said[-1]  # no wheel at hand

    monkeypatch.setattr(setup_env, "pip", pip)
    return said


def install(tmp_path, *extras):
    (tmp_path / "env").mkdir(exist_ok=True)
    words = [word for extra in extras for word in ("--extra", extra)]
    args = setup_env.parse(["--torch", "cpu", "--venv", str(tmp_path / "env"), *words])
    torch = setup_env.resolve("cpu", "2.13.0", "Linux", None)
    return setup_env.install(args, torch, "2.13.0")


def test_the_size_is_said_first_and_the_cpu_index_asked_second(tmp_path, fake_pip):
    install(tmp_path)
    pips = [n for n, line in enumerate(fake_pip) if line.startswith("pip ")]
    size = next(n for n, line in enumerate(fake_pip) if line.startswith("Download: about"))
    assert size < pips[0]
    first, second, third = (fake_pip[n] for n in pips)
    assert "--index-url" not in first and PYTORCH + "cpu" in second
    assert third.startswith("pip -e . -c ")


def test_a_second_run_installs_nothing_until_something_changes(tmp_path, fake_pip):
    install(tmp_path, "dev")
    fake_pip.clear()
    install(tmp_path, "dev")
    install(tmp_path)  # quickstart after test: what is there suffices
    assert fake_pip == []
    install(tmp_path, "demo")  # and what was there stays wanted
    assert any("-e .[demo,dev]" in line for line in fake_pip)
    stamp = tmp_path / "env" / setup_env.STAMP
    stamp.write_text(json.dumps({"mark": "of an older pyproject.toml", "extras": ["dev"]}))
    fake_pip.clear()
    install(tmp_path, "dev")
    assert fake_pip


def test_no_cpu_build_never_means_gigabytes(tmp_path, fake_pip, monkeypatch):
    calls = []
    monkeypatch.setattr(setup_env, "pip", lambda python, arguments, quiet: calls.append(arguments))
    with pytest.raises(SystemExit, match="TORCH=keep"):
        install(tmp_path)
    assert calls == LINUX_CPU


def test_keep_without_torch_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env, "torch_in", lambda python: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(SystemExit, match="TORCH=keep: .* has no torch"):
        setup_env.main(["--torch", "keep"])


def test_keep_holds_torch_where_it_is(monkeypatch, tmp_path):
    limits = []
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(setup_env, "torch_in", lambda python: "2.9.1+cu130")

    def pip(python, arguments):
        assert python == sys.executable
        limits.append(Path(arguments[-1]).read_text())
        return True

    monkeypatch.setattr(setup_env, "pip", pip)
    assert setup_env.main(["--torch", "keep"]) == 0
    assert limits == ["torch==2.9.1+cu130\n"]


def test_an_old_python_gets_a_sentence(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 8, 1))
    with pytest.raises(SystemExit, match="needs Python 3.10 or newer"):
        setup_env.main([])


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="no virtual environment"):
        setup_env.make_venv(str(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_half_made_environment_is_made_anew_in_a_path_with_spaces(tmp_path):
    venv = tmp_path / "a path" / ".venv"
    venv.mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("home = /nowhere\n")
    python = setup_env.make_venv(str(venv))
    assert setup_env.ask(python, "import pip") == ""
    before = Path(python).stat().st_mtime_ns, (venv / "pyvenv.cfg").read_text()
    assert setup_env.make_venv(str(venv)) == python
    assert before == (Path(python).stat().st_mtime_ns, (venv / "pyvenv.cfg").read_text())
