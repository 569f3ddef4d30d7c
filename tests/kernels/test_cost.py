"""The cost model: by a report, by a datasheet or by a table, and which it says it is."""

from __future__ import annotations

import json

import pytest
import torch

from attn_control.kernels import choose, cost
from attn_control.kernels.cost import CAUTION, Device, estimate, fit

GPU = Device("cuda", "NVIDIA Test 1", "sm_80")
HALF = torch.bfloat16


def row(impl, tokens, density, milliseconds, **more):
    given = {"impl": impl, "tokens": tokens, "density": density, "milliseconds": milliseconds}
    return {"way": "forward", "precision": "half", "dim": 128, "heads": 8, **given, **more}


def taken(impl, tokens, density):
    """Of a made-up machine: milliseconds of a call, and of a pair."""
    call, pair = {"dense": (0.02, 1e-9), "flex": (0.1, 2e-9), "triton": (0.05, 1.5e-9)}[impl]
    return call + pair * 8 * tokens**2 * density


def report(held=True, **change):
    rows = [row("dense", n, 1.0, taken("dense", n, 1.0)) for n in (1024, 4096, 16384)]
    for impl in ("flex", "triton"):
        for n in (1024, 4096, 16384):
            rows += [row(impl, n, d, taken(impl, n, d)) for d in (0.1, 0.5)]
    return {"device": GPU.name, "held": {"flex": True, "triton": held}, "rows": rows, **change}


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """A folder of reports in place of the package's; returns what writes one."""
    monkeypatch.setattr(cost, "REPORTS", tmp_path)

    def write(**change):
        cost._reports.cache_clear()
        (tmp_path / "test.json").write_text(json.dumps(report(**change)))

    yield write
    cost._reports.cache_clear()


def test_by_a_report(reports):
    reports()
    found = estimate(8192, 8192, 0.25, 128, HALF, GPU, heads=8)
    dense = taken("dense", 8192, 1.0)
    # A length and a density that were never measured, by the lines through those that were.
    for impl in ("flex", "triton"):
        assert found.ratios[impl] == pytest.approx(taken(impl, 8192, 0.25) / dense, rel=1e-6)
    assert found.measured and found.impl == "triton" and found.faster
    assert found.why == f"triton takes {found.ratio:.2f} of dense by the report of NVIDIA Test 1"
    # Few tokens: a call takes longer than what is skipped.
    short = estimate(256, 256, 0.25, 128, HALF, GPU, heads=1)
    assert short.ratio > 2 and not short.faster
    # Twice the pairs' time at almost all of them.
    full = estimate(16384, 16384, 0.9, 128, HALF, GPU, heads=8)
    assert not full.faster and full.impl == "triton"


def test_a_kernel_that_was_wrong_is_not_taken(reports):
    reports(held=False)
    assert list(estimate(8192, 8192, 0.25, 128, HALF, GPU, heads=8).ratios) == ["flex"]


def test_a_report_speaks_of_its_own_device_and_precision(reports):
    reports()
    assert estimate(8192, 8192, 0.25, 160, HALF, GPU, heads=8).measured  # the nearest head dim
    for dtype, device, backward in (
        (torch.float32, GPU, False),
        (HALF, GPU, True),
        (HALF, Device("cuda", "NVIDIA Test 2", "sm_80"), False),
    ):
        found = estimate(8192, 8192, 0.25, 128, dtype, device, heads=8, backward=backward)
        assert not found.measured and "datasheet of A100" in found.source


def test_by_a_datasheet(reports):
    found = estimate(8192, 8192, 0.25, 128, HALF, GPU)
    assert found.ratio == pytest.approx(0.25) and found.faster
    assert found.why == (
        "at best 0.25 of dense by the datasheet of A100 SXM 80 GB, a model: not measured"
    )
    assert not estimate(8192, 8192, CAUTION + 0.05, 128, HALF, GPU).faster
    # So few tokens that reading them takes longer than what is computed.
    assert estimate(64, 64, 0.25, 128, HALF, GPU).ratio == 1.0
    unknown = estimate(8192, 8192, 0.3, 128, HALF, Device("mps"))
    assert unknown.ratio == 0.3 and "mps has no datasheet here" in unknown.why
    assert not unknown.measured


def test_by_the_table_of_cpu_costs():
    found = estimate(8192, 8192, 0.25, 64, torch.float32, "cpu")
    # Tiles of 128 rows are measured to take 1.1 of dense a pair, and gathering comes on top.
    assert 0.25 * 1.1 < found.ratio < 0.25 * 1.5 and found.faster and found.measured
    assert "table of CPU costs" in found.why
    assert not estimate(8192, 8192, 0.95, 64, torch.float32, "cpu").faster
    assert not estimate(64, 64, 0.5, 64, torch.float32, "cpu").faster


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("flex", 1000, 1.0, 0.5)], (0.0, 0.5 / 8e6)),
        # More work in less time: no line, but the mean of what was measured.
        ([row("flex", 1000, 1.0, 4.0), row("flex", 2000, 1.0, 1.0)], (2.0, 0.0)),
    ],
)
def test_lines_that_rows_do_not_make(rows, expected):
    assert fit(rows) == pytest.approx(expected)


def test_a_line_with_less_than_nothing_for_a_call_goes_through_zero():
    call, pair = fit([row("flex", 1000, 1.0, 1.0), row("flex", 2000, 1.0, 8.0)])
    assert call == 0.0 and 8.0 / 32e6 > pair > 1.0 / 8e6


def test_auto_on_a_gpu(reports, monkeypatch):
    monkeypatch.setattr(cost, "device_of", lambda _: GPU)
    monkeypatch.setattr(choose, "find_spec", lambda _: True)

    def chosen(visited=0.25, dim=128):
        return choose._on_gpu("cuda:0", HALF, 8, 8192, 8192, dim, visited)

    unmeasured = chosen()
    assert unmeasured.impl == "flex" and unmeasured.predicted is None
    assert "a model: not measured" in unmeasured.reason
    reports()
    measured = chosen()
    assert measured.impl == "triton"
    assert measured.predicted == pytest.approx(
        taken("triton", 8192, 0.25) / taken("dense", 8192, 1.0)
    )
    assert "by the report of NVIDIA Test 1" in measured.reason
    assert chosen(dim=512).impl == "flex"  # past what our kernels take
    reports(held=False)
    assert chosen().impl == "flex"
