"""The promise of the first screen: quickstart draws without a network, in 120 s and 3 GiB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Loaded by every Python that the command starts. It writes attempts down too: a library that
# catches the error and goes on has still asked the network.
SITECUSTOMIZE = """
import os, socket

def refuse(*args, **kwargs):
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(repr(args[-1:]) + "\\n")
    raise OSError("the test blocks the network")

socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
"""

# Its own process, so that RUSAGE_CHILDREN holds this command and nothing else.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
unit = 1 if sys.platform == "darwin" else 1024
json.dump({"status": status, "wall": time.perf_counter() - start,
           "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * unit}, sys.stdout)
"""


def offline(folder: Path, *arguments: str) -> tuple[dict, str, list[str]]:
    """What the command used, what it said, and what it asked of the network."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    attempts = folder / "attempts.txt"
    attempts.touch()
    # Without the variables that would keep libraries offline by themselves: a user has none.
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"PYTHONPATH": str(folder / "site"), "ATTEMPTS": str(attempts), "COLUMNS": "120"}
    env |= {"HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", MEASURE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    return json.loads(done.stdout), done.stderr, attempts.read_text().splitlines()


def test_the_block_blocks(tmp_path):
    code = "import socket; socket.create_connection(('127.0.0.1', 9))"
    used, said, attempts = offline(tmp_path, sys.executable, "-c", code)
    assert used["status"] == 1 and "the test blocks the network" in said
    assert len(attempts) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart_needs_no_network_and_keeps_its_promise(tmp_path):
    # CI names the environment where the wheel is installed; the folder lies outside the checkout.
    python = os.environ.get("ATTN_CONTROL_WHEEL_PYTHON", sys.executable)
    command = Path(python).with_name("attn-control")
    out = tmp_path / "out"
    used, said, attempts = offline(tmp_path, str(command), "quickstart", "--out", str(out))
    assert used["status"] == 0, said[-4000:]
    assert not attempts, attempts
    print({name: round(value, 1) for name, value in used.items()}, said[-3000:])

    pictures = [path for path in out.rglob("*.png") if path.stat().st_size > 500]
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(pictures) > len(rows) > 1, (pictures, rows)  # one each, and the contact sheet
    # Processor time stands in where others keep the cores busy: a render waits for nothing else,
    # so what it computed in 120 s of one core takes no longer on two idle ones.
    assert min(used["wall"], used["cpu"]) <= 120, used
    assert used["peak"] <= 3 * 2**30, used
