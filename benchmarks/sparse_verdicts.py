"""The bars of `sparse_cpu.py`, held against its grid: ``python benchmarks/sparse_verdicts.py``.

A bar is met where every cell that it speaks of meets it; cells that were not measured are counted
too. Ends with 1 where a bar is missed or a cell is missing.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

from sparse_grid import BARRED, CELLS
from timing import RESULTS

AUTO = 1.05
DONE = RESULTS / "sparse_cpu.jsonl"
Found = dict[str, Any]


def read() -> dict[tuple[Any, ...], Found]:
    """The last measurement of each cell, by `key`."""
    if not DONE.exists():
        return {}
    lines = DONE.read_text(encoding="utf-8").splitlines()
    return {key(found): found for found in map(json.loads, lines)}


def key(found: Found) -> tuple[Any, ...]:
    return found["cell"], found["threads"], found["torch"]


def parts(found: Found) -> tuple[str, int, str, str]:
    """Kind, tokens, dtype, way."""
    kind, tokens, _, dtype, way = found["cell"].rsplit(" ", 4)
    return kind, int(tokens), dtype, way


def misses_auto(found: Found) -> bool:
    """Whether `auto` takes longer than it may."""
    return parts(found)[1] >= BARRED and found.get("ratio", {}).get("auto", 0.0) > AUTO


def _line(what: str, cells: list[tuple[float, float, str]]) -> str:
    """Of cells: ratio, bar, name."""
    missed = [f"{name} {ratio:.3f} > {bar:.3f}" for ratio, bar, name in cells if ratio > bar]
    ratio, bar, name = max(cells, key=lambda cell: cell[0] / cell[1])
    said = "; ".join(missed) if missed else f"nearest: {name} {ratio:.3f} of {bar:.3f}"
    return f"| {what} | {len(cells) - len(missed)} of {len(cells)} | {said} |"


def verdicts(rows: Iterable[Found]) -> list[str]:
    """Lines of Markdown, about rows of one number of threads and one torch."""
    measured = [found for found in rows if "ratio" in found]
    absent = len(CELLS) - len({found["cell"] for found in rows})
    none = sum("missing" in found for found in rows)
    bars: dict[str, list[tuple[float, float, str]]] = {}
    for found in measured:
        kind, tokens, dtype, way = parts(found)
        kind = "band, block band" if kind.endswith("band") else kind
        if found["bar"] is not None:
            cell = found["ratio"]["torch"], found["bar"], found["cell"]
            bars.setdefault(f"torch, {kind}, {dtype}, {way}", []).append(cell)
        if "auto" in found["ratio"] and tokens >= BARRED:
            cell = found["ratio"]["auto"], AUTO, found["cell"]
            bars.setdefault(f"auto, any mask, {dtype}", []).append(cell)
    lines = ["| bar | cells that meet it | |", "|---|---|---|"]
    lines += [_line(what, cells) for what, cells in sorted(bars.items())]
    for dtype in ("float32", "bfloat16"):
        beside = [f for f in measured if "flex" in f["ratio"] and parts(f)[2] == dtype]
        lost = [f for f in beside if f["ratio"]["torch"] >= f["ratio"]["flex"]]
        kinds = Counter(parts(found)[0] for found in lost).most_common()
        said = ", ".join(f"{count} of {kind}" for kind, count in kinds)
        lines.append(
            f"| quicker than flex, {dtype} | {len(beside) - len(lost)} of {len(beside)} |"
            f" {'flex is quicker: ' + said if lost else ''} |"
        )
    state = f"{len(measured)} cells measured, {none} that have no mask, {absent} not measured"
    commits = Counter(found.get("commit", "bd22f3a or before") for found in measured).most_common()
    at = ", ".join(f"{count} at {commit}" for commit, count in commits)
    return [*lines, "", f"{len(CELLS)} cells in the grid: {state}. By commit: {at}."]


def main() -> int:
    rows = [found for found in read().values() if found["threads"] == 1]
    lines = verdicts(rows)
    print("\n".join(lines))
    missed = any(misses_auto(found) for found in rows)
    missed |= any(f.get("bar") is not None and f["ratio"]["torch"] > f["bar"] for f in rows)
    return int(missed or " 0 not measured" not in lines[-1])


if __name__ == "__main__":
    sys.exit(main())
