"""The Markdown of a result: every number from the JSON, none of its own."""

from __future__ import annotations

from attn_control.eval.cells import Numbers, grid, percent, plain, planted_line, points
from attn_control.eval.fidelity_tables import sparse_costs, sparse_section


def result_page(result: Numbers) -> str:
    """The whole page of one suite, without times: the same pictures give it byte for byte."""
    parts = [f"## Suite `{result['suite']}`", result["question"]]
    if result["spread"] is not None:
        parts.append(
            f"**The short form: {result['spread']} prompts a job. Not a published figure.**"
        )
    sparse = all(_is_sparse(each) for each in result["measurements"].values())
    redrawn = "; differences in dB" if sparse else ", whole prompts redrawn; differences in points"
    parts.append(
        f"Intervals: 95 %{redrawn}, paired by prompt and seed. "
        f"Suite digest `{result['digest'][:12]}`."
    )
    parts += [f"**Note:** {note}" for note in result["notes"]]
    if result["bars"]:
        parts += ["### Bars", bars_table(result["bars"])]
    for name, each in result["measurements"].items():
        told = headlines(name, result["bars"])
        section = sparse_section(each) if _is_sparse(each) else _measurement(each, told)
        parts += [f"### {name}: `{each['model']}`", *section]
    return "\n\n".join(parts) + "\n"


def _is_sparse(measurement: Numbers) -> bool:
    return measurement.get("kind") == "sparse"


def headlines(name: str, bars: list[Numbers]) -> list[str]:
    """The verdicts of a measurement that stand by group: `right`, and those that have a bar."""
    asked = [bar["verdict"] for bar in bars if bar["job"] == name and bar["verdict"] != "mass"]
    return list(dict.fromkeys(["right", *asked]))


def bars_table(bars: list[Numbers]) -> str:
    """One row a bar: what was asked, what was found, and on which side that lies."""
    rows = []
    for bar in bars:
        show = points if bar["against"] else percent
        floor = "-" if bar["floor"] is None else f"{100 * bar['floor']:.0f}"
        asked = f"{bar['job']}: {bar['variant']}"
        asked += f" minus {bar['against']}" if bar["against"] else ""
        rows.append(
            [
                f"{asked}, {bar['verdict']}, {bar['where']}", show(bar["found"]),
                f"{100 * bar['target']:.0f}", floor, bar["outcome"],
            ]
        )  # fmt: skip
    return grid(["bar", "measured", "target", "floor", "outcome"], rows)


def _measurement(each: Numbers, told: list[str]) -> list[str]:
    variants: Numbers = each["variants"]
    first = next(iter(variants.values()))
    groups = list(first["groups"])
    counts = [f"{g} {(first['groups'][g]['right'] or {'n': 0})['n']}" for g in groups]
    parts = [
        f"{each['prompts']} prompts, {each['pictures']} pictures; n a group: {', '.join(counts)}.",
        *(_shares(variants, groups, verdict) for verdict in told),
    ]
    if any(v["against"] for v in variants.values()):
        parts += ["Differences in being right (points):", _differences(variants, groups)]
    compared = len(variants) > 1
    likeness = f", and likeness to the pictures of {each['baseline']}" if compared else ""
    parts.append(f"Parts of the verdict{likeness}:")
    parts.append(_parts(variants, "all" if "all" in groups else groups[0], each["baseline"]))
    if "mass" in each:
        parts.append(_mass(each["mass"]))
    return [*parts, planted_line(each["planted"])]


def _shares(variants: Numbers, groups: list[str], verdict: str) -> str:
    rows = [
        [name, str(v["row_forwards"]), *(percent(v["groups"][g][verdict]) for g in groups)]
        for name, v in variants.items()
    ]
    return grid(["variant", "row-forwards", *(f"{verdict}: {group}" for group in groups)], rows)


def _differences(variants: Numbers, groups: list[str]) -> str:
    others = list(dict.fromkeys(o for v in variants.values() for o in v["against"]))
    rows = [
        [name, *(points(v["against"].get(o, {}).get(g)) for o in others for g in groups)]
        for name, v in variants.items()
    ]
    return grid(["variant", *(f"minus {o}: {g}" for o in others for g in groups)], rows)


def _parts(variants: Numbers, group: str, baseline: str) -> str:
    first = next(iter(variants.values()))
    verdicts = [name for name in first["groups"][group] if name != "right"]
    likeness = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
    measures = [name for name in likeness if name in first["likeness"] and len(variants) > 1]
    rows = []
    for name, v in variants.items():
        shares = [percent(v["groups"][group][verdict]) for verdict in verdicts]
        like = {} if name == baseline else v["likeness"]
        rows.append([name, *shares, *(plain(like.get(each), 3) for each in measures)])
    head = ["variant", *(f"{each} ({group})" for each in verdicts)]
    return grid([*head, *(likeness[each] for each in measures)], rows)


def _mass(mass: Numbers) -> str:
    alone = ", ".join(f"{name} {100 * part:.0f} %" for name, part in mass["near_by_shape"].items())
    boxes = "; ".join(
        f"{grid}: " + ", ".join(f"{name} {'x'.join(map(str, b))}" for name, b in sides.items())
        for grid, sides in mass["boxes"].items()
    )
    return (
        f"Attention mass, {mass['variant']}, {mass['prompts']} prompts, {len(mass['at'])} of "
        f"{mass['steps']} steps: {percent(mass['share'])} of {len(mass['heads'])} heads keep at "
        f"least {100 * mass['bar']:.0f} % of it in a box of at most {100 * mass['volume']:.0f} % "
        f"of space and time around the query, in the best of its shapes; averaged over the prompts "
        f"{100 * mass['near']:.1f} %, by one shape alone: {alone}. Boxes on {boxes}."
    )


def costs_page(costs: Numbers) -> str:
    """What the run took on its machine; measured, so it differs from run to run."""
    parts = []
    for name, variants in costs["measurements"].items():
        if name in costs.get("dense", {}):
            parts += [f"### {name}: time", *sparse_costs(variants, costs["dense"][name])]
            continue
        rows = [
            [
                variant,
                f"{v['seconds']:.2f}",
                plain(v["ratio"]),
                str(v["row_forwards"]),
                f"{v['peak_bytes'] / 1e9:.2f} GB ({v['peak_kind']})",
            ]
            for variant, v in variants.items()
        ]
        head = ["variant", "median s", "ratio to the baseline", "row-forwards", "peak memory"]
        parts += [f"### {name}: costs", grid(head, rows)]
    clock = f" by the {costs['clock']}'s clock" if "clock" in costs else ""
    rounds = " and ".join(dict.fromkeys(str(number) for number in costs["rounds"].values()))
    parts.append(
        f"Measured on {costs['machine']}{clock}; {rounds} rounds in which the variants took "
        "turns, ratios paired by round."
    )
    return "\n\n".join(parts) + "\n"
