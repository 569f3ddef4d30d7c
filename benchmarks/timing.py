"""How benchmarks here measure: side by side, interleaved, medians; and how they report."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attn_control.eval.attention_clock import clock_of

RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One measurement: what, how much, and the bar that it is held to."""

    what: str
    value: float
    unit: str
    bar: float | None
    note: str

    @property
    def verdict(self) -> str:
        return "-" if self.bar is None else "yes" if self.value < self.bar else "NO"


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call: by the wall, or of the processor where a single thread runs: on a busy machine
    the wall's clock counts the neighbours' work.
    """
    _, clock = clock_of(str(device))
    start = clock()
    call()
    return clock() - start


def side_by_side(
    calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each call, measured in turns, so that a busy machine slows all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warmup + rounds):
        for name, call in calls.items():
            spent = seconds(call, device)
            if round_ >= warmup:
                taken[name].append(spent)
    return taken


def paired_difference(taken: dict[str, list[float]], more: str, less: str) -> float:
    """Median over rounds of ``more - less``."""
    return statistics.median(a - b for a, b in zip(taken[more], taken[less], strict=True))


def report(name: str, rows: list[Row], device: torch.device, **more: str) -> None:
    """Print a Markdown table and write ``benchmarks/results/<name>.json``; ``more`` of where."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    where = {
        "device": f"{device.type} {machine}".strip(),
        "threads": torch.get_num_threads(),
        "clock": clock_of(str(device))[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        **more,
    }
    print(f"\n{', '.join(f'{key} {value}' for key, value in where.items())}\n")
    print("| what | measured | bar | met | how |\n|---|---|---|---|---|")
    for row in rows:
        bar = "-" if row.bar is None else f"< {row.bar:g} {row.unit}"
        print(f"| {row.what} | {row.value:.3g} {row.unit} | {bar} | {row.verdict} | {row.note} |")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    old[device.type] = {"where": where, "rows": [{**asdict(r), "met": r.verdict} for r in rows]}
    path.write_text(json.dumps(old, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")
