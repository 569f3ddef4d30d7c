"""docs/sparse-video.md: its code runs as printed, its options are the controls' own, its figures
those that were published.

After a change: ``UPDATE_README=1 pytest tests/sparse/test_docs.py`` writes the tables anew.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from made_tables import held
from sparse_shared import video

from attn_control.kernels.corrections import CORRECTIONS
from attn_control.policy import StepPolicy
from attn_control.processors import SPARSE
from attn_control.processors.sparse import SparseControl

FILE = Path(__file__).parents[2] / "docs" / "sparse-video.md"
PAGE = FILE.read_text(encoding="utf-8")


def test_the_code_runs_in_order(capsys):
    pipe, call = video(steps=8, size=128)
    names = {"pipe": pipe, "call": call | {"num_frames": 17, "output_type": "latent"}}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 4
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/sparse-video.md, block {number}", "exec"), names)
    told = capsys.readouterr().out
    assert "amortised density" in told and "of dense;" in told
    assert "'wan2.1-t2v-14b-radial'" in told


def options_table() -> str:
    lines = ["| control | its own options |", "|---|---|"]
    shared = {field.name for field in fields(SparseControl)}
    for cls in SPARSE:
        own = [field for field in fields(cls) if field.name not in shared]
        told = ", ".join(f"`{field.name}={field.default!r}`" for field in own)
        lines.append(f"| `{cls.__name__}` | {told} |")
    return "\n".join(lines)


def measured_table() -> str:
    """Of every variant that all three parts of the suite have: the means alone."""
    folder = FILE.parent / "evaluation" / "video"
    found, costs = (
        json.loads((folder / file).read_text())["measurements"]
        for file in ("result.json", "costs.json")
    )
    sizes = "tokens-2304", "tokens-2304-guided", "tokens-8192"
    short, guided, long = (
        {name.replace(" 0.09", ""): each for name, each in found[size]["variants"].items()}
        for size in sizes
    )
    head = (
        "variant | 2,304 tokens | with guidance 4 | frames right there | 8,192 tokens | time there"
    )
    lines = [f"| {head} |", "|---" * 6 + "|"]
    for name in (name for name in short if name in guided and name in long):
        likes = [
            "-" if name == "dense" else f"{v['likeness']['psnr']['mean']:.1f} of {v['density']:.2f}"
            for v in (short[name], guided[name], long[name])
        ]
        frames = f"{100 * guided[name]['scores']['frames']['mean']:.0f} %"
        time = f"{costs[sizes[2]][name]['ratio']['mean']:.2f}"
        lines.append(f"| {name} | {likes[0]} | {likes[1]} | {frames} | {likes[2]} | {time} |")
    return "\n".join(lines)


@pytest.mark.parametrize("name, make", [("options", options_table), ("measured", measured_table)])
def test_the_tables_are_the_controls_own_and_what_was_published(name, make):
    held(FILE, name, "tests/sparse/test_docs.py", make())


def told(section: str, head: str) -> dict[str, str]:
    text = re.search(rf"^{section}.*?(?=^## |\Z)", PAGE, re.S | re.M).group()
    table = re.search(rf"^\| {head} \|.*?\n\n", text, re.S | re.M).group()
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.M))


def test_shared_options_policies_and_corrections_are_all_told():
    policy = told("## Which steps", "option")
    defaults = {field.name: field.default for field in fields(StepPolicy)}
    assert policy.keys() == defaults.keys()
    for name, value in policy.items():
        if name != "layers":
            assert value.strip("`") == str(defaults[name])
    assert told("## What is put back", "correction").keys() == CORRECTIONS.keys()
    shared = told("## The controls", "option")
    assert shared.keys() == {field.name for field in fields(SparseControl)}
    assert shared["correction"] == "`residual`" and shared["heads"] == "`all`"
    every = {cls.__name__ for cls in SPARSE}
    assert told("## The controls", "control").keys() == every
