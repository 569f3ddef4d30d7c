"""What each variant costs: every variant once a round, so that a busy machine slows all alike."""

from __future__ import annotations

import math
import time
from contextlib import closing
from statistics import median
from typing import Any

from attn_control.metrics import bootstrap_mean
from attn_control.render.measure import peak_memory, reset_peak
from attn_control.render.prepare import Prepared
from attn_control.render.run import call


def costs(prepared: Prepared, baseline: str, rounds: int) -> dict[str, Any]:
    """Seconds a picture and their ratio to the baseline's of the same round, and peak bytes.

    The variants take turns on one prompt and seed; a round before the first warms up. Ratios are
    geometric means with 95 % intervals over rounds: one slow picture must not decide.
    """
    seconds: dict[str, list[float]] = {plan.name: [] for plan in prepared.variants}
    peaks: dict[str, tuple[int, str]] = {}
    for number in range(rounds + 1):
        for plan in prepared.variants:
            taken, peak = _once(prepared, plan)
            if number:
                seconds[plan.name].append(taken)
                peaks[plan.name] = peak
    found = {}
    for plan in prepared.variants:
        pairs = zip(seconds[plan.name], seconds[baseline], strict=True)
        ratio = bootstrap_mean([math.log(mine / theirs) for mine, theirs in pairs])
        found[plan.name] = {
            "seconds": round(median(seconds[plan.name]), 4),
            "ratio": {
                key: round(math.exp(getattr(ratio, key)), 4) for key in ("mean", "low", "high")
            },
            "row_forwards": plan.row_forwards,
            "peak_bytes": peaks[plan.name][0],
            "peak_kind": peaks[plan.name][1],
        }
    return found


def _once(prepared: Prepared, plan: Any) -> tuple[float, tuple[int, str]]:
    from attn_control import attach

    device, task = prepared.choice.device, prepared.tasks[0]
    # closing(): what never acts on this one prompt is no matter for a warning here.
    with closing(attach(prepared.pipe, *plan.controls)):
        reset_peak(device)
        start = time.perf_counter()
        call(prepared, plan, task)
        return time.perf_counter() - start, peak_memory(device)
