"""docs/masks.md: its code runs as printed, its numbers are those of the benchmark."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attn_control import masks
from attn_control.masks import draw

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "masks.md").read_text(encoding="utf-8")
VIDEOS = "Wan 480p", "Wan 720p", "HunyuanVideo 768p"


def test_the_code_runs_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 6
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/masks.md, block {number}", "exec"), names)
    assert "3 ['" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["band", "neighborhood", "radial", "tiles"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"attn_control.masks.{name}")
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_every_pattern_is_in_the_table():
    told = set(re.findall(r"`(\w+_mask)`", re.search(r"## Patterns(.*?)\n## ", PAGE, re.S)[1]))
    assert told == {name for name in masks.__all__ if name.endswith("_mask")}


def test_the_measured_numbers_are_those_of_the_benchmark():
    results = json.loads((ROOT / "benchmarks" / "results" / "masks.json").read_text("utf-8"))
    rows = {row["what"]: row for row in results["cpu"]["rows"]}
    assert all(row["met"] == "yes" for row in rows.values())
    table = re.search(r"^\| pattern \|.*?\n\n", PAGE, re.S | re.M)[0].strip().splitlines()[2:]
    assert len(table) == 13
    for line in table:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for video, cell in zip(VIDEOS, cells, strict=True):
            found = [rows.get(f"{video}, {order}, {name}") for order in ("raster", "tiled")]
            times = " / ".join(f"{row['value']:.1f}" for row in found if row)
            size = float(re.match(r"([\d.]+) MB", found[0]["note"])[1])
            assert cell == f"{times} ms, {size:.1f} MB"


def test_the_picture_is_what_its_command_draws(tmp_path, monkeypatch):
    out = tmp_path / "masks.png"
    monkeypatch.setattr(sys, "argv", ["draw", "--out", str(out)])
    draw.main()
    drawn, shown = (
        np.asarray(Image.open(p)).astype(int) for p in (out, ROOT / "docs/images/masks.png")
    )
    assert drawn.shape == shown.shape
    # The names are written in Pillow's own font, which may change; the masks may not.
    assert (np.abs(drawn - shown).max(-1) > 8).mean() < 0.02
