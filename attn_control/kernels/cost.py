"""Is attention that skips faster than dense attention here? And how sure is that.

Of a GPU that `make gpu-report` has measured, by its report; of any other, by its datasheet, which
can say no more than what would be possible; of a CPU, by the table of measured costs that its tiles
are chosen by. Nothing is timed here: a decision, and with it the bits of a result, must not depend
on how busy a machine is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from attn_control.kernels.chips import chip_of
from attn_control.kernels.tiles.costs import costs

REPORTS = Path(__file__).with_name("measured")
"""Where reports keep what programs read: one file a GPU."""
CAUTION = 0.5
"""Of a GPU that was never measured, skipping has to promise twice the speed, to be worth it."""
BLOCK = 128
"""Queries of a tile on a CPU, where no mask says otherwise."""
NAMES = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "single"}
"""As `chips` and reports name precisions."""


class Device(NamedTuple):
    """kind: "cuda" (AMD's too), "cpu" or another of torch's; name: as the driver spells it; target:
    what its code is compiled for.
    """

    kind: str
    name: str = ""
    target: str = ""


@dataclass(frozen=True)
class Estimate:
    """ratios: of each executor, its time over dense attention's. measured: whether by a report or
    a table; else it is the least that the datasheet allows, a model. source: which, in words.
    """

    ratios: dict[str, float]
    measured: bool
    source: str

    @property
    def impl(self) -> str:
        """The fastest of the executors."""
        return min(self.ratios, key=lambda name: self.ratios[name])

    @property
    def ratio(self) -> float:
        return self.ratios[self.impl]

    @property
    def faster(self) -> bool:
        """Whether to skip: on a GPU that was never measured only where much is to be gained."""
        return self.ratio < (1.0 if self.measured else CAUTION)

    @property
    def why(self) -> str:
        """One clause for a report."""
        if self.measured:
            return f"{self.impl} takes {self.ratio:.2f} of dense by {self.source}"
        return f"at best {self.ratio:.2f} of dense by {self.source}, a model: not measured"


def device_of(device: torch.device | str) -> Device:
    """What is known of a device of torch's."""
    device = torch.device(device)
    if device.type != "cuda":
        return Device(device.type)
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device("cuda", found.name, found.gcnArchName.partition(":")[0])
    return Device("cuda", found.name, f"sm_{found.major}{found.minor}")


def estimate(
    queries: int,
    keys: int,
    density: float,
    dim: int,
    dtype: torch.dtype,
    device: Device | torch.device | str,
    *,
    heads: int = 1,
    backward: bool = False,
) -> Estimate:
    """Time over dense attention's, with a mask that keeps ``density`` of the pairs in whole blocks.

    heads: of all batch rows. backward: of the gradients alone.

    >>> estimate(8192, 8192, 0.25, 64, torch.float32, "cpu").faster
    True
    """
    if not isinstance(device, Device):
        device = device_of(device)
    if device.kind == "cpu":
        return _by_table(keys, density, dtype, backward)
    report = _reports(REPORTS).get(device.name) if device.kind == "cuda" else None
    found = {}
    if report is not None:
        pairs = heads * queries * keys
        found = _by_report(report, pairs, density, dim, NAMES.get(dtype, ""), backward)
    if found:
        return Estimate(found, True, f"the report of {device.name}")
    return _by_datasheet(device, queries, keys, density, dim, dtype)


def _by_table(keys: int, density: float, dtype: torch.dtype, backward: bool) -> Estimate:
    height, width = np.array(float(BLOCK)), np.array(max(1.0, density * keys))
    cost = costs(dtype, backward).of(height, width, False, 2)
    ratio = float(cost) / (BLOCK * max(1, keys))
    return Estimate({"torch": ratio}, True, "the table of CPU costs")


def _by_datasheet(
    device: Device, queries: int, keys: int, density: float, dim: int, dtype: torch.dtype
) -> Estimate:
    chip = chip_of(device.name, device.target) if device.kind == "cuda" else None
    if chip is None:
        name = device.name or device.kind
        return Estimate(
            {"flex": density}, False, f"its density alone, {name} has no datasheet here"
        )
    precision = NAMES.get(dtype, "single")
    rate = chip.multiprocessors * chip.clock * 1e9
    a_pair = max(4 * dim / chip.a_cycle(precision), 1 / chip.exponents) / rate
    size = 2 if precision == "half" else 4
    moved = 2 * (queries + keys) * dim * size / (chip.bandwidth * 1e9)
    dense = max(a_pair * queries * keys, moved)
    ratio = max(a_pair * queries * keys * density, moved) / dense if dense else 1.0
    return Estimate({"flex": ratio, "triton": ratio}, False, f"the datasheet of {chip.name}")


def _by_report(
    report: dict[str, Any], pairs: int, density: float, dim: int, precision: str, backward: bool
) -> dict[str, float]:
    """By the rows of the head dim that is nearest; nothing without rows of this precision."""
    way = "backward" if backward else "forward"
    rows = [row for row in report["rows"] if row["way"] == way and row["precision"] == precision]
    if not rows:
        return {}
    nearest = min({row["dim"] for row in rows}, key=lambda each: abs(math.log(each / dim)))
    of = {
        name: [row for row in rows if row["dim"] == nearest and row["impl"] == name]
        for name in ("dense", "flex", "triton")
    }
    if not of["dense"]:
        return {}
    call, pair = fit(of["dense"])
    dense = call + pair * pairs
    found = {}
    for name in ("flex", "triton"):
        # What was wrong when it was measured is not taken, however fast.
        if of[name] and report["held"].get(name, False):
            call, pair = fit(of[name])
            found[name] = (call + pair * pairs * density) / dense
    return found


def fit(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Milliseconds of a call, and of a pair that is computed: the line with the least relative
    errors through ``rows``, neither of them negative.
    """
    pairs = np.array([row["heads"] * row["tokens"] ** 2 * row["density"] for row in rows])
    taken = np.array([row["milliseconds"] for row in rows])
    if len(set(pairs.tolist())) > 1:
        (call, pair), *_ = np.linalg.lstsq(
            np.stack([1 / taken, pairs / taken], 1), np.ones_like(taken), rcond=None
        )
        if call >= 0 and pair >= 0:
            return float(call), float(pair)
        if pair < 0:  # more work took less time: nothing but the call
            return float(np.exp(np.log(taken).mean())), 0.0
    share = pairs / taken  # through zero
    return 0.0, float(share.sum() / (share**2).sum())


@cache
def _reports(folder: Path) -> dict[str, dict[str, Any]]:
    """By the device's name; read once a process."""
    files: Iterable[Path] = sorted(folder.glob("*.json"))
    found = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return {report["device"]: report for report in found}
