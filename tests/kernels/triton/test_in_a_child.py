"""The kernels as Python, in a process whose triton is the interpreter from the start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from attn_control.errors import AttnControlError
from attn_control.kernels.triton.run import attend_triton

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("test_interpreted_*.py"))
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the child")
@pytest.mark.parametrize("name", FILES)
def test_interpreted(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    child = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
    closing = child.stdout.strip().splitlines()[-1]
    assert re.search(r"^[1-9]\d* passed", closing) and "skipped" not in closing, closing


def test_every_file_is_run():
    names = ("values", "gradients", "compiled", "groups", "epilogues", "probe")
    assert {f"test_interpreted_{name}.py" for name in names} <= set(FILES)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="there it does run")
def test_one_clear_error_without_a_gpu():
    q = torch.randn(1, 1, 32, 16)
    missing = find_spec("triton") is None
    expected = "needs triton, which is not installed" if missing else "needs a GPU, q is on cpu"
    with pytest.raises(AttnControlError, match=expected):
        attend_triton(q, q, q, None, None, 1.0)
