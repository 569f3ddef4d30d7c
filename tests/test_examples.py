"""Every example runs as a user runs it, on the built-in model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
# Those that train have tests of their own.
SCRIPTS = sorted(p.name for p in EXAMPLES.glob("*.py") if not p.name.startswith("train_"))


def test_scripts_are_short():
    for name in ("guide.py", "set_processors.py"):
        assert len((EXAMPLES / name).read_text().splitlines()) <= 40


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_on_the_built_in_model(name, tmp_path):
    out = tmp_path / "picture.png"
    command = [sys.executable, str(EXAMPLES / name), "--model", "zoo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Image.open(out).size == (128, 128)
