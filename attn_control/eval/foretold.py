"""What a sparse measurement will come to, before it runs: densities, and the time that it takes."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from attn_control.eval.attention_clock import attention_share, clock_of
from attn_control.eval.fidelity import shape
from attn_control.foresight import Expected
from attn_control.metrics import psnr, ssim
from attn_control.render.judge import judge
from attn_control.render.media import made_of, mean_over_frames, read_media, write_png
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

    def steps(count: int, output: str = "latent") -> Any:
        short = dataclasses.replace(dense, kwargs={**dense.kwargs, "num_inference_steps": count})
        return call(prepared, short, task, output)

    def video() -> None:
        """One step, and all that comes after the last: decoded, judged, written, compared."""
        made = made_of(steps(1, "pil"))
        judge(prepared.choice, made, task.prompt)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.png"
            write_png(made, path, None, None)
            again = read_media(path)
        for measure in (psnr, ssim):
            mean_over_frames(measure, again, made.frames)

    def spent(work: Callable[[], Any]) -> float:
        start = clock()
        work()
        return clock() - start

    steps(1)  # warm
    one, two, decoded = (spent(work) for work in (partial(steps, 1), partial(steps, 2), video))
    step, rest = max(two - one, 0.0), max(decoded - one, 0.0)
    share = attention_share(prepared.pipe, partial(steps, 1), device)
    denoising = 0.0
    for plan in prepared.variants:
        found = expected(prepared, plan)
        computed = 1.0 if found is None or found.computed is None else found.computed
        denoising += plan.steps * step * (1 - share * (1 - computed))
    videos = len(prepared.tasks) // len(prepared.variants)
    todo = (len(prepared.tasks) - made) / len(prepared.tasks)
    whole = todo * videos * (denoising + len(prepared.variants) * rest)
    return whole + rounds * denoising + 2 * dense.steps * step
