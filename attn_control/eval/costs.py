"""What each variant costs: every variant once a round, so that a busy machine slows all alike."""

from __future__ import annotations

import math
from contextlib import closing
from statistics import median
from typing import Any

from attn_control.eval.attention_clock import attention_share, clock_of
from attn_control.metrics import bootstrap_mean
from attn_control.render.measure import peak_memory, reset_peak
from attn_control.render.prepare import Prepared
from attn_control.render.run import call


def costs(
    prepared: Prepared, baseline: str, rounds: int, *, denoising: bool = False
) -> dict[str, Any]:
    """Seconds a picture and their ratio to the baseline's of the same round, and peak bytes.

    The variants take turns on one prompt and seed; a round before the first warms up. Ratios are
    geometric means with 95 % intervals over rounds: one slow picture must not decide.

    denoising: leave decoding out, and warm up by the baseline alone.
    """
    seconds: dict[str, list[float]] = {plan.name: [] for plan in prepared.variants}
    peaks: dict[str, tuple[int, str]] = {}
    for number in range(rounds + 1):
        for plan in prepared.variants:
            if not number and denoising and plan.name != baseline:
                continue
            taken, peak = _once(prepared, plan, "latent" if denoising else "pil")
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


def sparse_costs(
    prepared: Prepared, measured: dict[str, Any], rounds: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The time of denoising with each variant of a sparse measurement, and of the dense run: what
    of it is attention's. `amdahl`: the time over dense that the computed attention foretells.
    """
    baseline = measured["baseline"]
    plan = next(plan for plan in prepared.variants if plan.name == baseline)
    found = costs(prepared, baseline, rounds, denoising=True)
    share = attention_share(
        prepared.pipe, lambda: call(prepared, plan, prepared.tasks[0], "latent"),
        prepared.choice.device,
    )  # fmt: skip
    for name, each in found.items():
        each["computed"] = measured["variants"][name]["computed"]
        each["amdahl"] = round(1 - share * (1 - each["computed"]), 4)
    tokens = measured["tokens"]
    return found, {"variant": baseline, "attention_share": round(share, 4), "tokens": tokens}


def _once(prepared: Prepared, plan: Any, output: str) -> tuple[float, tuple[int, str]]:
    from attn_control import attach

    device, task = prepared.choice.device, prepared.tasks[0]
    # closing(): what never acts on this one prompt is no matter for a warning here.
    with closing(attach(prepared.pipe, *plan.controls)):
        reset_peak(device)
        _, clock = clock_of(device)
        start = clock()
        call(prepared, plan, task, output)
        return clock() - start, peak_memory(device)
