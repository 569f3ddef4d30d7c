"""docs/guidance.md: its code runs as printed, and its tables of options are the controls' own."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from attn_control import zoo
from attn_control.processors import CONTROLS as ALL
from attn_control.processors import SPARSE
from attn_control.processors.guide import Guide

ROOT = Path(__file__).parents[2]
# Sparse ones have a page of their own, and tests/sparse/test_docs.py.
CONTROLS = {name: cls for name, cls in ALL.items() if cls not in SPARSE}
PAGE = (ROOT / "docs" / "guidance.md").read_text(encoding="utf-8")


def test_the_code_runs_in_order(monkeypatch):
    """On two steps instead of 25."""
    monkeypatch.setitem(zoo._DEFAULTS["shapes-sd3"], "num_inference_steps", 2)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) >= 8
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/guidance.md, block {number}", "exec"), names)


def _options(section: str) -> dict[str, str]:
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M).group(1)
    tables = re.findall(r"^\| option \|.*?\n\n", text, re.S | re.M)
    assert len(tables) == 1, section
    return dict(re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? *\|", tables[0], re.M))


@pytest.mark.parametrize("name", CONTROLS)
def test_options_and_defaults_are_those_of_the_control(name):
    told = _options(name)
    if issubclass(CONTROLS[name], Guide):
        told = _options("Guides") | told
    assert told == {
        field.name: "" if field.default is MISSING else str(_quoted(field.default))
        for field in fields(CONTROLS[name])
    }


def _quoted(value: object) -> object:
    return f'"{value}"' if isinstance(value, str) else value


def test_the_measured_numbers_are_those_of_the_benchmark():
    results = ROOT / "benchmarks" / "results" / "guidance_cost.json"
    rows = json.loads(results.read_text(encoding="utf-8"))["cpu"]["rows"]
    measured = {row["what"]: row["value"] for row in rows if row["unit"] == "x CFG"}
    told = re.findall(r"^\| (`\w+\(.*?) \| ([\d.]+) x \| ([\d.]+) x \|$", PAGE, re.M)
    order = ("SoftPAG", "SoftPAG, separate forward", "SEG, sigma 2")
    order += ("SkipLayers, separate forward", "NAG", "SoftPAG, fused")
    assert len(told) == len(order)
    for name, (_, time, memory) in zip(order, told, strict=True):
        assert f"{measured[f'time of a step with {name}']:.2f}" == time
        assert f"{measured[f'memory of a step with {name}']:.2f}" == memory
    assert all(row["met"] != "NO" for row in rows)
