"""The picture of a measurement of sparse attention: likeness to dense against amortised density."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, SOFT = "#1d1d1f", "#8e8e93"
COLOURS = ("#0b62d6", "#d6680b", "#12805c", "#8a2be2", "#b00040", "#6b6b00", "#00707a", "#5b5b60")
MARKS = {"none": "o", "share": "X", "residual": "s", "rho": "^", "lse": "D"}


def plot_sparse(each: dict[str, Any], path: Path) -> Path:
    """Write one picture: a point a variant, its control by colour and its correction by shape; a
    line joins each mask without a correction to the same mask with one. matplotlib must be there.
    """
    from matplotlib import pyplot as plt

    points = {name: _point(v) for name, v in each["variants"].items() if v["controls"]}
    names = list(dict.fromkeys(control for control, *_ in points.values() if control))
    colours = dict(zip(names, COLOURS * (1 + len(names) // len(COLOURS)), strict=False))
    figure, axis = plt.subplots(figsize=(7.6, 5.0), layout="constrained")
    goal = each["goal"]
    axis.axhline(goal["psnr"], color=SOFT, linewidth=0.8, linestyle="--")
    axis.axvline(goal["density"], color=SOFT, linewidth=0.8, linestyle="--")
    corrections: dict[str, None] = {}
    for name, (control, correction, x, numbers) in points.items():
        colour = colours[control] if control else INK
        low, mean, high = (numbers[key] for key in ("low", "mean", "high"))
        gain = each["variants"][name]["gain"]
        if gain is not None:
            _, _, other, theirs = points[gain["over"]]
            axis.plot([other, x], [theirs["mean"], mean], color=colour, linewidth=0.7, alpha=0.5)
        axis.plot([x, x], [low, high], color=colour, linewidth=1.2, solid_capstyle="round")
        axis.plot([x], [mean], MARKS[correction], color=colour, markersize=6)
        corrections[correction] = None
    for control in names:
        axis.plot([], [], "-", color=colours[control], label=control)
    for correction in corrections:
        axis.plot([], [], MARKS[correction], color=SOFT, label=_told(correction))
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.set_xlabel("amortised density", fontsize=9, color=INK)
    axis.set_ylabel("PSNR to the dense video (dB)", fontsize=9, color=INK)
    axis.grid(color="#e5e5ea", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, colors=INK, length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    guidance = each["sampler"].get("guidance_scale", 1)
    guided = f" with guidance {guidance:g}" if guidance > 1 else ""
    figure.suptitle(
        f"{each['model']}: {each['tokens']} tokens{guided}, {each['compared']} videos, 95 % "
        "intervals; dashed: the bar",
        fontsize=11, x=0.01, ha="left", color=INK,
    )  # fmt: skip
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return path


def _point(variant: dict[str, Any]) -> tuple[str | None, str, float, dict[str, float]]:
    """Control (None for output share, which has no mask), correction, density and PSNR."""
    (control,) = variant["controls"]
    correction = control["correction"]
    name = None if correction == "share" else control["control"]
    return name, correction, variant["density"], variant["likeness"]["psnr"]


def _told(correction: str) -> str:
    return {"none": "no correction", "share": "output share"}.get(correction, correction)
