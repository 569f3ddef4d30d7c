"""The scores on a model's card: what a published evaluation found, if it measured its weights."""

from __future__ import annotations

from typing import Any

Data = dict[str, Any]


def scores(result: Data | None, name: str, weights: str) -> list[str]:
    """The figures of a published evaluation, where it measured these weights."""
    all_of_them = (result or {}).get("measurements", {})
    mine = {job: each for job, each in all_of_them.items() if each["model"] == name}
    if result is None or not mine:
        return ["Not yet measured."]
    if result["spread"] is not None:
        return ["Not yet measured on all prompts."]
    if any(each["weights"].get("weights") != weights for each in mine.values()):
        return ["Not yet measured: the published evaluation is of other weights."]
    parts = [
        f"`attn-control eval {result['suite']}`, on the fixed prompts and seeds: shares with 95 %"
        " bootstrap\nintervals over prompts, differences in points."
    ]
    for each in mine.values():
        parts += _measured(each)
    bars = [
        [
            bar["variant"] + (f" minus {bar['against']}" if bar.get("against") else ""),
            str(bar.get("verdict", "")), str(bar.get("where", "")), _share(bar["found"]),
            f"{100 * bar['target']:g} %", _floor(bar.get("floor")), bar["outcome"],
        ]
        for bar in result["bars"] if bar["job"] in mine
    ]  # fmt: skip
    if bars:
        head = ["variant", "verdict", "prompts", "found", "bar", "floor", "outcome"]
        parts += ["The project's bars:", table(head, bars)]
    return parts


def _measured(each: Data) -> list[str]:
    """What is fully right in each group of prompts; each part of the verdict in the widest."""
    variants, base = each["variants"], each["baseline"]
    others = [v for v in variants if v != base]
    groups = next(iter(variants.values()))["groups"]
    head = ["prompts, fully right", "n", *variants, *(f"{v} minus {base}" for v in others)]
    rows = []
    for group in groups:
        shares = [_share(of["groups"][group].get("right")) for of in variants.values()]
        gains = [_points(variants[v]["against"][base][group]) for v in others]
        rows.append([group, _count(groups[group]), *shares, *gains])
    widest = max(groups, key=lambda group: int(_count(groups[group])))
    verdicts = list(groups[widest])
    parts = [
        [variant, *(_share(of["groups"][widest][verdict]) for verdict in verdicts)]
        for variant, of in variants.items()
    ]
    return [table(head, rows), table([f"of prompts: {widest}", *verdicts], parts)]


def _count(group: Data) -> str:
    return str(next((found["n"] for found in group.values() if found), 0))


def _share(found: Data | None) -> str:
    if found is None:
        return "-"
    if "low" not in found:  # a count of heads, say, has no interval
        return f"{100 * found['mean']:.1f} %"
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * found[k] for k in ("mean", "low", "high")))


def _points(found: Data | None) -> str:
    if found is None:
        return "-"
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * found[k] for k in ("mean", "low", "high")))


def _floor(floor: float | None) -> str:
    return "-" if floor is None else f"{100 * floor:g} %"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)
