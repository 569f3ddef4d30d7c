"""The pictures of a result: one dot with its interval a variant and group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attn_control.eval.fidelity_plot import COLOURS, INK, SOFT, plot_sparse
from attn_control.eval.tables import headlines


def plot_result(result: dict[str, Any], out: Path) -> list[Path]:
    """Write `NAME.png` for each measurement into `out`; [] where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    for name, each in result["measurements"].items():
        if each.get("kind") == "sparse":
            paths.append(plot_sparse(each, out / f"{name}.png"))
            continue
        variants = each["variants"]
        groups = list(next(iter(variants.values()))["groups"])
        others = list(dict.fromkeys(o for v in variants.values() for o in v["against"]))
        shares = headlines(name, result["bars"])
        panels = [*shares, *others]
        height = 1.4 + 0.34 * len(variants)
        figure, axes = plt.subplots(
            1, len(panels), figsize=(3.6 * len(panels) + 1.2, height), sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axis, panel in zip(axes[0], panels, strict=True):
            for index, group in enumerate(groups):
                _dots(axis, variants, panel, group, index, len(groups))
            title = {"right": "fully right (%)"}.get(panel, f"{panel} (%)")
            axis.set_title(
                title if panel in shares else f"right, minus {panel} (points)",
                fontsize=10, color=INK, loc="left",
            )  # fmt: skip
            if panel not in shares:
                axis.axvline(0, color=SOFT, linewidth=0.8)
            axis.grid(axis="x", color="#e5e5ea", linewidth=0.7)
            axis.set_axisbelow(True)
            axis.tick_params(labelsize=8, colors=INK, length=0)
            for side in axis.spines.values():
                side.set_visible(False)
        axes[0][0].set_yticks(range(len(variants)), list(variants))
        axes[0][0].invert_yaxis()
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower left", fontsize=8, frameon=False,
            ncols=min(4, len(groups)),
        )  # fmt: skip
        figure.suptitle(
            f"{each['model']}: {each['prompts']} prompts, 95 % intervals",
            fontsize=11, x=0.01, ha="left", color=INK,
        )  # fmt: skip
        path = out / f"{name}.png"
        figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        paths.append(path)
    return paths


def _dots(
    axis: Any, variants: dict[str, Any], panel: str, group: str, index: int, groups: int
) -> None:
    first = True
    for row, each in enumerate(variants.values()):
        numbers = each["groups"][group].get(panel) or each["against"].get(panel, {}).get(group)
        if numbers is None:
            continue
        y = row + (index - (groups - 1) / 2) * 0.7 / groups
        mean, low, high = (100 * numbers[key] for key in ("mean", "low", "high"))
        colour = COLOURS[index % len(COLOURS)]
        axis.plot([low, high], [y, y], color=colour, linewidth=1.4, solid_capstyle="round")
        axis.plot([mean], [y], "o", color=colour, markersize=4, label=group if first else None)
        first = False
