"""docs/kernels.md: its code runs as printed, and its tables name what there is."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

from attn_control.kernels.attention import IMPLS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_the_code_runs_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 3
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/kernels.md, block {number}", "exec"), names)
    said = capsys.readouterr().out
    on, visited = map(float, re.search(r"(0\.\d\d) of the pairs are on, (0\.\d\d)", said).groups())
    assert on <= visited < names["apart"].lowered.visited_density() == 1.0


def table(heading):
    section = re.search(rf"## {heading}\n(.*?)(?:\n## |\Z)", PAGE, re.S)[1]
    return set(re.findall(r"^\| `(\w+)`", section, re.M))


def test_every_executor_is_told():
    assert table("Executors") - {"impl"} == {*IMPLS, "auto"}


def test_every_kernel_is_told():
    folder = ROOT / "attn_control" / "kernels" / "triton"
    made = set()
    for name in ("forward", "backward", "probe"):
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        made |= set(re.findall(r"^@triton\.jit\ndef (\w+)", text, re.M))
    assert table("The Triton kernels") == made


def test_the_times_are_those_of_the_benchmark():
    lines = (ROOT / "benchmarks" / "results" / "sparse_cpu.jsonl").read_text("utf-8").splitlines()
    found = {row["cell"]: row for row in map(json.loads, lines)}
    table = re.search(r"^\| mask, 16,384 tokens(.*?)\n\n", PAGE, re.S | re.M)[0].strip()
    head, _, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines())
    assert len(rows) == 12
    for (name, *cells), density in product(rows, head[1:]):
        kind, dtype = name.split(", ")
        row = found[f"{kind} 16384 {float(density):g} {dtype} forward"]
        told = cells[head.index(density) - 1]
        if told == "-":
            assert "missing" in row
            continue
        ratio = row["ratio"]
        assert told == f"{ratio['torch']:.3f} / {ratio['flex']:.3f} of {row['visited']:.3f}"
