"""``python -m attn_control.kernels.report``: measures the GPU that is here, in under ten minutes.

Writes ``docs/gpu/<name>.md``, and for `kernels.cost` a file into the package. Without a GPU it says
"not run" and is content; it fails where a kernel is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from attn_control.kernels import cost
from attn_control.kernels.report.checks import DTYPES, cases, check
from attn_control.kernels.report.page import Report
from attn_control.kernels.report.times import CLOSE, Cell, Events, Timer, measure


@dataclass(frozen=True)
class Plan:
    """What is run, the most telling first: minutes may end before it does.

    checked: dtype, head dim and cases of each call; only: what an executor has none of.
    """

    impls: tuple[str, ...] = ("flex", "triton")
    checked: tuple[tuple[str, int, tuple[str, ...]], ...] = (
        ("bf16", 128, ("blocks", "band", "own mask", "added", "orders", "groups")),
        ("bf16", 64, ("band",)),
        ("fp16", 128, ("band",)),
        ("fp32", 64, ("band",)),
        ("tf32", 64, ("band",)),
        ("bf16", 32, ("band",)),
        ("bf16", 256, ("band",)),
    )
    check_tokens: int = 1000
    block: int = 128
    dtype: torch.dtype = torch.bfloat16
    heads: int = 16
    tokens: tuple[int, ...] = (8192, 32768, 2048)
    dims: tuple[int, ...] = (128, 64)
    densities: tuple[float, ...] = (0.25, 0.1, 0.5, 1.0)
    minutes: float = 9.0


ONLY_OURS = ("orders", "groups")


def run(plan: Plan, device: torch.device, report: Report, timer: Timer) -> None:
    """Everything, into the report."""
    start = time.monotonic()

    def in_time(what: str) -> bool:
        if time.monotonic() - start < plan.minutes * 60:
            return True
        report.left.append(f"{what}: {plan.minutes:g} minutes were over")
        return False

    for (dtype, dim, names), impl in product(plan.checked, plan.impls):
        own = [name for name in names if impl == "triton" or name not in ONLY_OURS]
        kind = DTYPES["fp32" if dtype == "tf32" else dtype]
        with _precision("high" if dtype == "tf32" else "highest"):
            for name, case in cases(device, kind, dim, plan.check_tokens, plan.block, own):
                what = f"check of {impl}, {name}, {dtype}, head dim {dim}"
                if in_time(what):
                    with _memory(report, what):
                        report.checks += check(impl, name, case, dtype)
    grid = product(plan.dims, plan.tokens, plan.densities)
    cells = [Cell("blocks", plan.heads, tokens, dim, density) for dim, tokens, density in grid]
    middle = plan.tokens[0]
    cells[1:1] = [Cell("band", plan.heads, middle, dim, 0.25) for dim in plan.dims]
    for cell in cells:
        what = f"times of {cell}"
        if in_time(what):
            with _memory(report, what):
                report.rows += measure(cell, plan.dtype, device, timer, plan.impls, plan.block)


@contextmanager
def _memory(report: Report, what: str) -> Iterator[None]:
    """A small GPU leaves out what it has no room for, and says so."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        report.left.append(f"{what}: out of memory")


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """Of products of float32, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def versions(device: torch.device) -> dict[str, str]:
    """What results depend on."""
    import triton

    return {
        "date": datetime.date.today().isoformat(),
        "target": cost.device_of(device).target or device.type,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def write(report: Report, out: Path, data: Path) -> Path:
    """Both files; returns the page."""
    name = re.sub(r"[^a-z0-9]+", "-", report.device.lower()).strip("-")
    for folder in (out, data):
        folder.mkdir(parents=True, exist_ok=True)
    page = out / f"{name}.md"
    page.write_text(report.page(), encoding="utf-8")
    text = json.dumps(report.data(), indent=1)
    (data / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return page


def main(
    argv: Sequence[str] | None = None,
    *,
    plan: Plan | None = None,
    device: torch.device | None = None,
    timer: Callable[[torch.device], Timer] = Events,
) -> int:
    """1 if something is wrong. plan, device, timer: of tests, which have no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m attn_control.kernels.report", description=__doc__
    )
    parser.add_argument("--out", type=Path, default=Path("docs/gpu"), help="folder of the page")
    parser.add_argument("--data", type=Path, default=cost.REPORTS, help="folder of what auto reads")
    parser.add_argument("--minutes", type=float, help="when to stop")
    asked = parser.parse_args(argv)
    if device is None:
        if not torch.cuda.is_available():
            print("gpu-report: not run: there is no GPU here")
            return 0
        device = torch.device("cuda", torch.cuda.current_device())
    plan = plan or Plan(**({} if asked.minutes is None else {"minutes": asked.minutes}))
    name = cost.device_of(device).name or device.type
    report = Report(name, versions(device), CLOSE[plan.dtype])
    run(plan, device, report, timer(device))
    page = write(report, asked.out, asked.data)
    print(f"gpu-report: written to {page}; right: {report.held}; left out: {len(report.left)}")
    return int(not all(report.held.values()))


if __name__ == "__main__":
    sys.exit(main())
