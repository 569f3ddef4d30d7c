"""From the pictures of one job to numbers: shares right, differences, likeness to the baseline.

Everything here follows from the pictures alone, so that the same pictures give the same table byte
for byte. Seconds and bytes are measured apart (`costs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attn_control.eval.planted import planted_control
from attn_control.eval.suite import VERDICTS, Measurement, Where
from attn_control.metrics import Interval, bootstrap_mean, psnr, ssim
from attn_control.render.prepare import Prepared
from attn_control.render.summary import paired, share_right

Row = dict[str, Any]
PSNR_CAP = 100.0  # dB, for equal pictures: infinity has no mean


def as_dict(interval: Interval | None) -> dict[str, float | int] | None:
    """An interval as data, rounded so that it reads well and compares byte for byte."""
    if interval is None:
        return None
    parts = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {**{key: round(value, 6) for key, value in parts.items()}, "n": interval.n}


def measure(
    prepared: Prepared,
    rows: Sequence[Row],
    measurement: Measurement,
    prompts: Sequence[dict[str, Any]],
    images: Path,
) -> dict[str, Any]:
    """All numbers of one measurement.

    Args:
        prepared: the job.
        rows: its finished pictures, as `render` left them.
        prompts: the rows of the zoo's prompt file.
        images: the folder of the pictures.
    """
    kind = {prompt["prompt"]: prompt for prompt in prompts}
    by_variant = {plan.name: _of(rows, plan.name) for plan in prepared.variants}
    found: dict[str, Any] = {}
    for plan in prepared.variants:
        mine = by_variant[plan.name]
        others = dict.fromkeys([measurement.baseline, *measurement.against])
        found[plan.name] = {
            "controls": [dict(control) for control in plan.described],
            "sampler": plan.kwargs,
            "row_forwards": plan.row_forwards,
            "groups": {
                str(group): {
                    name: as_dict(share_right(_in(mine, group, kind), name)) for name in VERDICTS
                }
                for group in measurement.groups
            },
            "against": {
                other: {
                    str(group): as_dict(
                        paired(_in(mine, group, kind), _in(by_variant[other], group, kind))
                    )
                    for group in measurement.groups
                }
                for other in others
                if other != plan.name
            },
            "likeness": _likeness(mine, by_variant[measurement.baseline], images),
        }
    return {
        "model": prepared.choice.name,
        "weights": prepared.tasks[0].settings["model"],
        "prompts": len(prepared.prompts),
        "pictures": len(rows),
        "baseline": measurement.baseline,
        "variants": found,
        "planted": planted_control(
            by_variant[measurement.planted.variant],
            measurement.planted,
            prepared.choice.name,
            images,
        ),
    }


def _of(rows: Sequence[Row], variant: str) -> dict[tuple[str, int], Row]:
    return {(row["prompt"], row["seed"]): row for row in rows if row["variant"] == variant}


def _in(
    rows: dict[tuple[str, int], Row], group: Where, kind: dict[str, dict[str, Any]]
) -> list[Row]:
    return [row for row in rows.values() if group.holds(kind[row["prompt"]])]


def _likeness(
    mine: dict[tuple[str, int], Row], theirs: dict[tuple[str, int], Row], images: Path
) -> dict[str, dict[str, float | int] | None]:
    """How alike the pictures of two variants are: PSNR (dB, capped at 100), SSIM, LPIPS if there.

    LPIPS (Zhang et al. 2018) takes part where the package `lpips` is installed.
    """
    from PIL import Image

    measures: dict[str, Callable[[Any, Any], float]] = {
        "psnr": lambda a, b: min(psnr(a, b), PSNR_CAP),
        "ssim": ssim,
    }
    learnt = lpips_distance()
    if learnt is not None:
        measures["lpips"] = learnt
    values: dict[str, list[float]] = {name: [] for name in measures}
    for key, row in mine.items():
        with (
            Image.open(images / row["file"]) as a,
            Image.open(images / theirs[key]["file"]) as b,
        ):
            for name, function in measures.items():
                values[name].append(function(a.convert("RGB"), b.convert("RGB")))
    prompts = [prompt for prompt, _ in mine]
    return {
        name: as_dict(bootstrap_mean(numbers, groups=prompts)) for name, numbers in values.items()
    }


def lpips_distance() -> Callable[[Any, Any], float] | None:
    """LPIPS on two PIL pictures, or None where the package is missing."""
    try:
        import lpips
    except ImportError:
        return None
    import numpy as np
    import torch

    net = lpips.LPIPS(net="alex", verbose=False)

    def tensor(image: Any) -> torch.Tensor:
        data = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return data.float() / 127.5 - 1

    def distance(a: Any, b: Any) -> float:
        with torch.inference_mode():
            return float(net(tensor(a), tensor(b)))

    return distance
