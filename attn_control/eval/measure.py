"""From the pictures of one job to numbers: shares right, differences, likeness to the baseline.

Everything here follows from the pictures alone, so that the same pictures give the same table byte
for byte. Seconds and bytes are measured apart (`costs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.eval.groups import Where
from attn_control.eval.mass import measure_mass
from attn_control.eval.planted import planted_control
from attn_control.eval.suite import Mass, Measurement
from attn_control.metrics import Interval, bootstrap_mean, psnr, ssim
from attn_control.render.media import mean_over_frames, read_media
from attn_control.render.prepare import Prepared
from attn_control.render.prompts import Key, key_of
from attn_control.render.summary import interval_over_prompts, paired, share_right
from attn_control.zoo.prompts import spread, traits

Row = dict[str, Any]
Rows = dict[tuple[Key, int], Row]
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
    images: Path,
) -> dict[str, Any]:
    """All numbers of one measurement.

    Args:
        prepared: the job.
        rows: its finished pictures, as `render` left them.
        images: the folder of the pictures.

    Raises:
        AttnControlError: a picture that the scorer could not judge, such as one too small.
    """
    model, kind = prepared.choice.name, kinds(prepared)
    by_variant = rows_by_variant(prepared, rows, images)
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
                    name: as_dict(share_right(_in(mine, group, kind), name))
                    for name in zoo.verdicts(model)
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
    mass = measurement.mass
    return {
        "model": model,
        "weights": prepared.tasks[0].settings["model"],
        "prompts": len(prepared.prompts),
        "pictures": len(rows),
        "baseline": measurement.baseline,
        "variants": found,
        "planted": planted_control(
            by_variant[measurement.planted.variant],
            measurement.planted,
            prepared,
            images,
        ),
        **({} if mass is None else {"mass": heads_near(prepared, mass)}),
    }


def rows_by_variant(prepared: Prepared, rows: Sequence[Row], images: Path) -> dict[str, Rows]:
    """The rows of each variant by prompt and seed.

    Raises:
        AttnControlError: a picture that the scorer could not judge.
    """
    for row in rows:
        if row["score"] is None:
            raise AttnControlError(
                f"{images / row['file']}: the scorer of {prepared.choice.name} cannot judge it, so"
                " that no share can be measured; pictures of at least 64 pixels a side, videos of 5"
                " frames"
            )
    return {plan.name: _of(rows, plan.name) for plan in prepared.variants}


def kinds(prepared: Prepared) -> dict[Key, dict[str, Any]]:
    """What each prompt of a job may be chosen by, by its key."""
    model = prepared.choice.name
    return {each.key: traits(model, each.fixed or {}) for each in prepared.prompts}


def heads_near(prepared: Prepared, mass: Mass) -> dict[str, Any]:
    """How near the heads of a job's model stay (`eval/mass.py`).

    `share`: that of heads at or above the bar with one prompt, its mean and interval over prompts.
    """
    plan = next(plan for plan in prepared.variants if plan.name == mass.variant)
    prompts = spread(prepared.prompts, mass.prompts)
    said = [
        {"prompt": each.text, **({"image": each.image.picture()} if each.image else {})}
        for each in prompts
    ]
    found = measure_mass(
        prepared.pipe, said,
        steps=mass.steps or plan.steps, seeds=[prepared.seeds[each.key][0] for each in prompts],
        at=mass.at, heads=mass.heads, call=plan.kwargs,
    )  # fmt: skip
    share = interval_over_prompts(found["near_by_prompt"], [each.key for each in prompts], least=0)
    return {"variant": mass.variant, "share": as_dict(share), **found}


def _of(rows: Sequence[Row], variant: str) -> Rows:
    return {(key_of(row), row["seed"]): row for row in rows if row["variant"] == variant}


def _in(rows: Rows, group: Where, kind: dict[Key, dict[str, Any]]) -> list[Row]:
    return [row for row in rows.values() if group.holds(kind[key_of(row)])]


def _likeness(mine: Rows, theirs: Rows, images: Path) -> dict[str, dict[str, float | int] | None]:
    """How alike the pictures of two variants are, with intervals over prompts."""
    prompts = [prompt for prompt, _ in mine]
    return {
        name: as_dict(bootstrap_mean(numbers, groups=prompts))
        for name, numbers in likeness(mine, theirs, images).items()
    }


def likeness(mine: Rows, theirs: Rows, images: Path) -> dict[str, list[float]]:
    """How alike the pictures of two variants are, one by one in the order of `mine`: PSNR (dB,
    capped at 100), SSIM, LPIPS if there.

    Of videos the mean over their frames. LPIPS (Zhang et al. 2018) takes part where the package
    `lpips` is installed.
    """
    measures: dict[str, Callable[[Any, Any], float]] = {
        "psnr": lambda a, b: min(psnr(a, b), PSNR_CAP),
        "ssim": ssim,
    }
    learnt = lpips_distance()
    if learnt is not None:
        measures["lpips"] = learnt
    values: dict[str, list[float]] = {name: [] for name in measures}
    for key, row in mine.items():
        a, b = read_media(images / row["file"]), read_media(images / theirs[key]["file"])
        for name, function in measures.items():
            values[name].append(mean_over_frames(function, a, b))
    return values


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
