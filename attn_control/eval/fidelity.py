"""Sparse attention held against the dense run of the same prompt and seed: how alike, how dense.

Videos are compared as they were decoded, in 8 bits and before any video codec. The unit that is
redrawn for an interval is the prompt where there are enough of them, else the single video: then
the interval speaks of these prompts only, and the result says so. Likeness is measured where the
dense video shows anything (`eval/emptiness.py`); the scorer judges all.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.eval.emptiness import keys_that_show
from attn_control.eval.measure import PSNR_CAP, Rows, as_dict, likeness, rows_by_variant
from attn_control.eval.planted import planted_control
from attn_control.eval.suite import Measurement, Planted, Sparsity
from attn_control.foresight import place_of
from attn_control.metrics import bootstrap_mean, psnr
from attn_control.policy import OUTCOMES
from attn_control.processors.sparse import SparseControl
from attn_control.render.media import mean_over_frames, read_media
from attn_control.render.prepare import Prepared, VariantPlan
from attn_control.render.prompts import Key
from attn_control.render.summary import FEWEST_PROMPTS, interval_over_prompts

HALF = 20 * math.log10(2)  # dB that a video gains when its error is halved
_CORRECTION = ("correction", "rho_gain")


def check_sparse(prepared: Prepared, measurement: Measurement) -> None:
    """Refuse a job that is not one dense run and sparse ones beside it, or whose videos are small.

    Raises:
        AttnControlError: what is wrong; nothing has run.
    """
    spec = _spec(measurement)
    for plan in prepared.variants:
        sparse = [each for each in plan.controls if isinstance(each, SparseControl)]
        dense = plan.name == measurement.baseline
        if len(plan.controls) != (0 if dense else 1) or len(sparse) != len(plan.controls):
            raise AttnControlError(
                f"variant {plan.name!r} has the controls {[str(each) for each in plan.controls]}; "
                + ("the baseline is dense: none" if dense else "expected one that is sparse")
            )
        if plan.kwargs != prepared.variants[0].kwargs:
            raise AttnControlError(
                f"variant {plan.name!r} has a sampler of its own; videos are compared at one"
            )
    if not own_masks(prepared.variants):
        raise AttnControlError("no variant has a correction and its mask without one beside it")
    found = math.prod(shape(prepared))
    if found < spec.tokens:
        raise AttnControlError(
            f"sparse.tokens: videos of {found} tokens, expected at least {spec.tokens}"
        )


def shape(prepared: Prepared) -> tuple[int, int, int]:
    """Frames, rows and columns of the tokens of a job's videos."""
    asked = prepared.variants[0].kwargs
    sizes = (asked.get(name) for name in ("height", "width", "num_frames"))
    return place_of(prepared.pipe, prepared.pipe.transformer, *sizes).shape


def own_masks(plans: Sequence[VariantPlan]) -> dict[str, str]:
    """Of each variant with a correction: the one that has the same mask and policy without it.

    `share` computes nothing between refreshes, so that no mask is its own.
    """
    bare = {_without(plan): plan.name for plan in plans if _correction(plan) == "none"}
    corrected = [plan for plan in plans if _correction(plan) not in (None, "none", "share")]
    return {plan.name: bare[_without(plan)] for plan in corrected if _without(plan) in bare}


def shares(plans: Sequence[VariantPlan]) -> dict[str, str]:
    """Of each variant: the one that re-uses the last output under the same policy."""
    found = {
        str(plan.described[0]["policy"]): plan.name
        for plan in plans
        if _correction(plan) == "share"
    }
    policies = {plan.name: str(plan.described[0]["policy"]) for plan in plans if plan.described}
    return {
        name: found[policy]
        for name, policy in policies.items()
        if policy in found and found[policy] != name
    }


def _correction(plan: VariantPlan) -> str | None:
    return plan.described[0].get("correction") if plan.described else None


def _without(plan: VariantPlan) -> str:
    options = {k: v for k, v in plan.described[0].items() if k not in _CORRECTION}
    return repr(sorted(options.items()))


def units(keys: Sequence[tuple[Key, int]]) -> tuple[str, list[Hashable]]:
    """What is redrawn, in words, and the unit of each video."""
    prompts = [prompt for prompt, _ in keys]
    if len(set(prompts)) >= FEWEST_PROMPTS:
        return "prompts", list(prompts)
    return "videos", list(keys)


def measure_sparse(
    prepared: Prepared, rows: Sequence[dict[str, Any]], measurement: Measurement, images: Path
) -> dict[str, Any]:
    """All numbers of one measurement of sparse attention.

    Args:
        prepared: the job.
        rows: its finished videos, as `render` left them.
        images: the folder of the videos.

    Raises:
        AttnControlError: a video that the scorer could not judge, or without a record of what its
            control did.
    """
    by_variant = rows_by_variant(prepared, rows, images)
    base = by_variant[measurement.baseline]
    keys = list(base)
    redrawn, groups = units(keys)
    compared = keys_that_show(base, images)
    shown = [group for key, group in zip(keys, groups, strict=True) if key in compared]
    seen = {name: {key: mine[key] for key in compared} for name, mine in by_variant.items()}
    alike = {name: likeness(mine, base, images) for name, mine in seen.items()}
    verdicts = zoo.verdicts(prepared.choice.name)
    masks, honest = own_masks(prepared.variants), shares(prepared.variants)

    def gain(name: str, other: str | None) -> dict[str, Any] | None:
        if other is None:
            return None
        pairs = zip(alike[name]["psnr"], alike[other]["psnr"], strict=True)
        return {
            "over": other,
            **(as_dict(bootstrap_mean([a - b for a, b in pairs], groups=shown)) or {}),
        }

    def verdict(mine: Rows, name: str, minus: Rows | None = None) -> dict[str, Any] | None:
        values = [
            float(mine[key]["score"][name]) - (float(minus[key]["score"][name]) if minus else 0)
            for key in keys
        ]
        return as_dict(interval_over_prompts(values, groups, least=-1 if minus else 0))

    found: dict[str, Any] = {}
    for plan in prepared.variants:
        mine = by_variant[plan.name]
        found[plan.name] = {
            "controls": [dict(control) for control in plan.described],
            **_spent(mine, dense=plan.name == measurement.baseline),
            "scores": {name: verdict(mine, name) for name in verdicts},
            "minus_dense": {name: verdict(mine, name, base) for name in verdicts},
            "likeness": {
                name: as_dict(bootstrap_mean(values, groups=shown))
                for name, values in alike[plan.name].items()
            },
            "gain": gain(plan.name, masks.get(plan.name)),
            "over_share": gain(plan.name, honest.get(plan.name)),
        }
    spec = _spec(measurement)
    return {
        "kind": "sparse",
        "model": prepared.choice.name,
        "weights": prepared.tasks[0].settings["model"],
        "prompts": len(prepared.prompts),
        "seeds": len(keys) // len(prepared.prompts),
        "pictures": len(rows),
        "compared": len(compared),
        "redrawn": redrawn,
        "tokens": math.prod(shape(prepared)),
        "grid": list(shape(prepared)),
        "steps": prepared.variants[0].steps,
        "sampler": prepared.variants[0].kwargs,
        "baseline": measurement.baseline,
        "variants": found,
        "goal": goal(found, spec),
        "planted": planted_control(
            by_variant[measurement.planted.variant], measurement.planted, prepared, images, groups
        ),
        "closer": planted_closer(seen[spec.closer.variant], base, spec.closer, images, shown),
    }


def _spec(measurement: Measurement) -> Sparsity:
    assert measurement.sparse is not None
    return measurement.sparse


def _spent(rows: Rows, dense: bool) -> dict[str, Any]:
    """Amortised density, work over that of dense attention, and outcomes of the calls a video."""
    if dense:
        return {"density": 1.0, "computed": 1.0, "outcomes": {}}
    told = []
    for row in rows.values():
        if len(row.get("sparse", [])) != 1:
            raise AttnControlError(
                f"{row['file']} does not say how dense it was: render it anew (--overwrite)"
            )
        told += row["sparse"]
    calls = {name: sum(each["outcomes"].get(name, 0) for each in told) for name in OUTCOMES}
    return {
        **{
            name: round(float(np.mean([each[name] for each in told])), 6)
            for name in ("density", "computed")
        },
        "outcomes": {name: count / len(told) for name, count in calls.items() if count},
    }


def goal(variants: dict[str, Any], spec: Sparsity) -> dict[str, Any]:
    """Whether some variant is as good as asked at a density that is low enough; and each that could
    be: corrected, and no denser than the bar.
    """
    tried = {}
    for name, each in variants.items():
        if each["gain"] is None or each["density"] > spec.density:
            continue
        tried[name] = {
            "density": each["density"],
            "psnr": each["likeness"]["psnr"],
            "gain": each["gain"],
            "met": each["likeness"]["psnr"]["mean"] >= spec.psnr
            and each["gain"]["mean"] >= spec.gain
            and each["gain"]["low"] > 0,
        }
    outcome = "met" if any(each["met"] for each in tried.values()) else "not met"
    asked = {"density": spec.density, "psnr": spec.psnr, "gain": spec.gain}
    return {**asked, "tried": tried, "outcome": outcome if tried else "not measured"}


def planted_closer(
    mine: Rows, base: Rows, planted: Planted, images: Path, groups: Sequence[Hashable]
) -> dict[str, Any]:
    """The positive control of likeness: a share of one variant's videos brought half the way to the
    dense ones, in floating point. That is 6.02 dB in each of them, and has to be found.

    It passes when the found difference leaves zero out from below and its interval holds what was
    planted.
    """
    keys = list(mine)
    count = max(1, round(planted.share * len(keys)))
    order = np.random.default_rng(planted.seed).permutation(len(keys))
    chosen = {keys[i] for i in order[:count]}
    gains = []
    for key in keys:
        before = after = 0.0
        if key in chosen:
            a, b = (read_media(images / rows[key]["file"]) for rows in (mine, base))
            before = mean_over_frames(_psnr, a, b)
            half = [
                (np.asarray(x, float) + np.asarray(y, float)) / 2 for x, y in zip(a, b, strict=True)
            ]
            after = mean_over_frames(_psnr, half, b)
        gains.append(after - before)
    size = round(HALF * count / len(keys), 6)
    found = bootstrap_mean(np.round(gains, 6), groups=groups)
    return {
        "variant": planted.variant,
        "replaced": count,
        "planted": size,
        "found": {key: round(getattr(found, key), 6) for key in ("mean", "low", "high")},
        # A video that equals the dense one has no error to halve: then nothing is found.
        "passed": 0 < round(found.low, 6) <= size <= round(found.high, 6),
    }


def _psnr(a: object, b: object) -> float:
    first, second = np.asarray(a, float), np.asarray(b, float)
    return min(psnr(first, second, data_range=255.0), PSNR_CAP)
