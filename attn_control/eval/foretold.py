"""What a sparse measurement will come to, before it runs: densities, and the time that it takes."""

from __future__ import annotations

import dataclasses
import math
from contextlib import closing
from typing import Any

from attn_control.eval.attention_clock import attention_share, clock_of
from attn_control.eval.fidelity import shape
from attn_control.foresight import Expected
from attn_control.render.prepare import Prepared, VariantPlan
from attn_control.render.run import call


def expected(prepared: Prepared, plan: VariantPlan) -> Expected | None:
    """What the control of a variant will come to; None for the dense one."""
    from attn_control import attach

    if not plan.controls:
        return None
    with closing(attach(prepared.pipe, *plan.controls)) as session:
        return session.preview(plan.steps, grid=shape(prepared)).sparse[0]


def foretold(prepared: Prepared) -> dict[str, Any]:
    """Tokens, and the amortised density of each variant; None where it is not known beforehand."""
    densities = {}
    for plan in prepared.variants:
        found = expected(prepared, plan)
        density = 1.0 if found is None else found.amortised
        densities[plan.name] = None if density is None else round(density, 4)
    return {"tokens": math.prod(shape(prepared)), "densities": densities}


def estimate(prepared: Prepared, rounds: int, made: int = 0) -> float:
    """Seconds that a sparse measurement will take on this machine as it is now, by the clock of
    `clock_of`: from two dense steps and one, and from what each variant's attention computes.

    rounds: of the costs; made: videos that are already there.
    """
    device, task = prepared.choice.device, prepared.tasks[0]
    dense = next(plan for plan in prepared.variants if not plan.controls)
    _, clock = clock_of(device)

    def spent(steps: int, output: str) -> float:
        short = dataclasses.replace(dense, kwargs={**dense.kwargs, "num_inference_steps": steps})
        start = clock()
        call(prepared, short, task, output)
        return clock() - start

    def one_step() -> None:
        short = dataclasses.replace(dense, kwargs={**dense.kwargs, "num_inference_steps": 1})
        call(prepared, short, task, "latent")

    one_step()  # warm
    one, two, decoded = spent(1, "latent"), spent(2, "latent"), spent(1, "pil")
    step, rest = max(two - one, 0.0), max(decoded - one, 0.0)
    share = attention_share(prepared.pipe, one_step, device)
    denoising = 0.0
    for plan in prepared.variants:
        found = expected(prepared, plan)
        computed = 1.0 if found is None or found.computed is None else found.computed
        denoising += plan.steps * step * (1 - share * (1 - computed))
    videos = len(prepared.tasks) // len(prepared.variants)
    todo = (len(prepared.tasks) - made) / len(prepared.tasks)
    whole = todo * videos * (denoising + len(prepared.variants) * rest)
    return whole + rounds * denoising + 2 * dense.steps * step
