"""make gpu-report from end to end, in the interpreter, with a clock that only counts."""

from __future__ import annotations

import json

import pytest
import torch

from attn_control.kernels import cost
from attn_control.kernels.report.__main__ import Plan, main
from attn_control.kernels.report.page import Report

TINY = Plan(
    impls=("triton",),
    checked=(
        ("fp16", 16, ("blocks", "band", "own mask", "added", "orders", "groups")),
        ("fp32", 16, ("band",)),
        ("tf32", 16, ("band",)),
    ),
    check_tokens=70,
    block=32,
    dtype=torch.float16,
    heads=2,
    tokens=(96, 160),
    dims=(16,),
    densities=(0.34, 1.0),
)
CPU = torch.device("cpu")


def counting(device):
    """Each call is made once, and takes a millisecond more than the one before it."""
    assert device == CPU
    count = iter(range(1, 1000))

    def timer(calls):
        for call in calls.values():
            call()
        return {name: float(next(count)) for name in calls}

    return timer


@pytest.fixture
def folders(tmp_path):
    return ["--out", str(tmp_path / "docs"), "--data", str(tmp_path / "data")], tmp_path


def test_the_whole_report(folders, monkeypatch):
    argv, tmp = folders
    assert main(argv, plan=TINY, device=CPU, timer=counting) == 0
    page, data = (tmp / "docs/cpu.md").read_text(), json.loads((tmp / "data/cpu.json").read_text())
    assert data["device"] == "cpu" and data["held"] == {"triton": True}
    # Of each check the output, the lse and three gradients; of each cell two ways, two executors.
    assert page.count("| triton | ") == 8 * 5 + 2 and "**NO**" not in page
    assert len(data["rows"]) == 5 * 2 * 2
    forward = [row for row in data["rows"] if row["way"] == "forward" and row["impl"] == "triton"]
    assert all(0 <= row["error"] < 5e-3 for row in forward) and len(forward) == 5
    assert {row["density"] for row in data["rows"] if row["impl"] == "dense"} == {1.0}
    assert "Nothing was left out." in page and "nothing here is modelled" in page
    # What was written is what the cost model reads.
    monkeypatch.setattr(cost, "REPORTS", tmp / "data")
    cost._reports.cache_clear()
    found = cost.estimate(160, 160, 0.5, 16, torch.float16, cost.Device("cuda", "cpu"), heads=2)
    cost._reports.cache_clear()
    assert found.measured and list(found.ratios) == ["triton"]


def test_a_wrong_kernel_fails_it(folders, monkeypatch):
    from attn_control.kernels.report import checks

    right = checks.EXECUTORS["triton"]

    def wrong(q, k, v, case):
        out, lse = right(q, k, v, case)
        return out * 1.05, lse

    monkeypatch.setitem(checks.EXECUTORS, "triton", wrong)
    argv, tmp = folders
    few = Plan(**{**vars(TINY), "checked": (("fp32", 16, ("band",)),), "densities": (1.0,)})
    assert main(argv, plan=few, device=CPU, timer=counting) == 1
    assert "| out |" in (page := (tmp / "docs/cpu.md").read_text()) and "**NO**" in page
    assert json.loads((tmp / "data/cpu.json").read_text())["held"] == {"triton": False}


def test_no_time_left(folders):
    argv, tmp = folders
    none = Plan(**{**vars(TINY), "minutes": 0.0})
    main(argv, plan=none, device=CPU, timer=counting)
    page = (tmp / "docs/cpu.md").read_text()
    assert page.count("0 minutes were over") == 8 + 5 and "## Not run" in page


def test_without_a_gpu(folders, capsys, monkeypatch):
    argv, tmp = folders
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(argv) == 0
    assert "not run: there is no GPU here" in capsys.readouterr().out
    assert not list(tmp.iterdir())


def test_what_was_verified_wrong_while_timed_is_not_held():
    rows = [{"impl": "triton", "error": 0.5}, {"impl": "triton", "error": None}]
    report = Report("x", {}, close=0.1, rows=rows)
    assert report.held == {}
    from attn_control.kernels.report.checks import Check

    report.checks = [Check("triton", "band", "fp32", 16, "out", 0.0, 1.0)]
    assert report.held == {"triton": False}
    rows[0]["error"] = 0.05
    assert report.held == {"triton": True}
