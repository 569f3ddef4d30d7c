"""``python -m attn_control.kernels.aot``: the Triton kernels, compiled for GPUs that are not here.

Prints what their binaries say beside a plain dense kernel at the same tile, and fails where one
spills registers, does not fit shared memory, lost its matrix instructions, has a share of them in
its loop under 95 % of the dense one's, or a lower occupancy; the same beside the figures of a
published kernel (`aot_tutorial`). Nothing runs. The last two columns are a model, from datasheets:
they are no measurement.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attn_control.kernels.aot_limits import behind, faults, occupancy, short
from attn_control.kernels.aot_tutorial import Figure, known
from attn_control.kernels.aot_variants import KERNELS, WALKS, Variant, chosen
from attn_control.kernels.chips import CHIPS
from attn_control.kernels.roofline import Loop, seconds

if TYPE_CHECKING:
    from attn_control.kernels.aot_binary import Binary
    from attn_control.kernels.triton.tune import Tile

DENSITY = 0.25
"""Of the modelled call."""
COLUMNS = {
    "target": 7,
    "kernel": 10,
    "dim": 3,
    "variant": 11,
    "tile": 13,
    "registers": 9,
    "spilled": 7,
    "shared": 6,
    "matrix": 6,
    "of loop": 7,
    "x dense": 7,
    "x tutorial": 10,
    "occupancy": 9,
    "dense's": 7,
    "tutorial's": 10,
    "bound (model)": 13,
    f"time at {DENSITY:.0%} (model)": 19,
}


@dataclass(frozen=True)
class Row:
    """One compiled variant. dense: the yardstick's binary, of plain variants; tutorial: what is
    known of the published kernel at this tile; model: what bounds the loop, and its time at
    `DENSITY` over dense attention's, both by datasheet. found: faults.
    """

    variant: Variant
    tile: Tile
    binary: Binary
    dense: Binary | None
    tutorial: Figure | None
    model: tuple[str, float] | None
    found: tuple[str, ...]

    @property
    def remarks(self) -> str:
        return "; ".join(self.found)

    def cells(self) -> list[str]:
        """As `COLUMNS` has them."""
        v, b, t = self.variant, self.binary, self.tile
        beside = (self.dense, self.tutorial)
        return [
            *(v.target, v.kernel, str(v.dim), v.name),
            f"{t.m}x{t.n} w{t.warps} s{t.stages}" if t.n else f"{t.m} w{t.warps}",
            *map(str, (b.registers, b.spilled, b.shared, b.matrix)),
            f"{b.share:.1%}" if b.share else "-",
            *(f"{b.share / each.share:.3f}" if each and each.share else "-" for each in beside),
            f"{occupancy(v.target, t.warps, b):.0%}",
            *(f"{occupancy(v.target, t.warps, each):.0%}" if each else "-" for each in beside),
            self.model[0] if self.model else "-",
            f"{self.model[1]:.2f}" if self.model else "-",
        ]


def measure(variant: Variant) -> Row:
    """Compiled, read and judged."""
    import torch

    from attn_control.kernels import aot_compile as make
    from attn_control.kernels.aot_binary import read
    from attn_control.kernels.triton.tune import Tile, wide

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    shape = make.Shape(
        dim=variant.dim,
        dtype=dtypes.get(variant.dtype, torch.float32),
        extra=variant.extra,
        tf32=variant.dtype != "fp32",
    )
    args, constants = make.launch(variant.kernel, shape, variant.target)
    warps, stages = constants["num_warps"], constants["num_stages"]
    cap = constants.get("maxnreg", 0)
    tile = Tile(constants["M"], constants.get("N", 0), warps, stages, cap)
    function = make.KERNELS[variant.kernel]
    binary = read(make.compile_for(variant.target, function, args, constants))
    walks = variant.kernel in WALKS
    multiplies = variant.kernel != "row_sums" and variant.dtype != "fp32"
    found = faults(variant.target, warps, binary, matrix=multiplies, loop=walks)
    dense, tutorial, model = None, None, None
    if variant.plain:
        tutorial, lags = beside_tutorial(variant, tile, binary)
        found += lags
        given = make.launch_dense(variant.kernel, shape, tile)
        yardstick = make.YARDSTICKS[variant.kernel]
        dense = read(make.compile_for(variant.target, yardstick, *given))
        if binary.share:
            found += short(behind(variant.target, warps, binary, dense), "dense's")
        chip, times = CHIPS[variant.target], []
        for each, density in ((binary, DENSITY), (dense, 1.0)):
            loop = Loop(variant.kernel, tile.m, tile.n, wide(variant.dim), warps, each.loop)
            call = {"heads": shape.heads, "tokens": shape.tokens, "dim": shape.dim}
            times.append(seconds(chip, loop, variant.precision, **call, density=density))
        model = times[0][1], times[0][0] / times[1][0]
    return Row(variant, tile, binary, dense, tutorial, model, tuple(found))


def beside_tutorial(
    variant: Variant, tile: Tile, binary: Binary
) -> tuple[Figure | None, list[str]]:
    """What is known of it for this kernel, and in what ours falls short of that."""
    figure = known(variant)
    if figure is None or not binary.share:
        return None, []
    if figure.tile != tile[:4]:
        return None, [f"the tutorial was compiled at another tile, {figure.tile}"]
    share, held = behind(variant.target, tile.warps, binary, figure)
    # Warps that it has by spilling are no yardstick: ours may not spill.
    return figure, short((share, max(held, 1.0) if figure.spilled else held), "the tutorial's")


def rows(variants: Sequence[Variant], jobs: int) -> Iterable[Row]:
    """In their order, as they get ready."""
    if jobs == 1:
        yield from map(measure, variants)
    else:
        with ProcessPoolExecutor(jobs) as pool:
            yield from pool.map(measure, variants)


def markdown(done: Sequence[Row], version: str) -> str:
    """A page of the table, with what it means."""
    head = [
        "# The Triton kernels as compiled",
        "",
        f"Written by `python -m attn_control.kernels.aot --out` with triton {version}; nothing",
        "here ran on a GPU. What the columns mean is in [README.md](README.md). **Columns with",
        "(model) are computed from datasheets: they are not measured, and no speed-up.**",
        "",
        "| " + " | ".join(COLUMNS) + " | faults |",
        "|" + "---|" * (len(COLUMNS) + 1),
    ]
    body = ["| " + " | ".join([*row.cells(), row.remarks]) + " |" for row in done]
    return "\n".join(head + body) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The table; 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(prog="python -m attn_control.kernels.aot", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=CHIPS)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS)
    parser.add_argument("--dims", nargs="+", type=int, help="64 and 128 if not given")
    parser.add_argument(
        *("--extras",),
        choices=("none", "few", "all"),
        default="none",
        help="other precisions, the model's own mask, row orders",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--out", type=Path, help="write the table there too, as Markdown")
    asked = parser.parse_args(argv)
    variants = chosen(asked.targets, asked.kernels, asked.dims, asked.extras)
    wide = {name: max(len(name), size) for name, size in COLUMNS.items()}
    print(*(name.rjust(size) for name, size in wide.items()))
    done = []
    for row in rows(variants, asked.jobs):
        done.append(row)
        cells = zip(row.cells(), wide.values(), strict=True)
        print(*(cell.rjust(size) for cell, size in cells), row.remarks, flush=True)
    wrong = sum(bool(row.found) for row in done)
    if asked.out:
        import triton

        asked.out.write_text(markdown(done, triton.__version__), encoding="utf-8")
    print(f"{len(done)} kernels: {wrong or 'none'} with faults")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
