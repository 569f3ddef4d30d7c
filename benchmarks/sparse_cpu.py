"""Block-sparse attention on a CPU, beside dense attention and compiled flex_attention with the same
mask: ``python benchmarks/sparse_cpu.py [--only REGEX] [--again] [--minutes M] [--threads N]``.

Every cell of the grid in `sparse_grid.py` is a triple of setup, benchmark and verify, measured in
one process and in turns (dense, torch, flex, auto, dense, ...), and is written down as soon as it
is done, with the commit: a run that was stopped goes on where it was, `--minutes` stops it itself,
`--again` measures also what is known. Reported are ratios of the minima over rounds, of which long
cells have fewer. `auto` has its mask built and compiled anew in each call.

Bars, as time over dense time, d the density of the visited blocks: bands 1.15 d + .02 in float32
and 1.3 d + .03 in bfloat16; radial, neighbourhood and tiles 1.3 d + .03; random blocks 1.6 d + .04;
backward 1.3 times those; `auto` 1.05 at every density. `sparse_verdicts.py` holds them against it.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sparse_grid import CELLS, Cell
from sparse_verdicts import DONE, key, misses_auto, read, verdicts
from timing import RESULTS, side_by_side
from torch import Tensor

from attn_control.kernels import attend
from attn_control.masks import BlockMask

CPU = torch.device("cpu")
TABLE = RESULTS / "sparse_cpu.md"
LONG = 6 * 8192
"""Tokens times rounds, at most, down to two rounds."""
SAMPLED = 24
"""Queries of each head that are verified."""


def rows_of(mask: BlockMask, head: int, queries: list[int]) -> Tensor:
    """bool (queries, keys): whole rows of a mask, read from its lists and tiles here."""
    head = head if mask.heads > 1 else 0
    q_bounds, k_bounds = mask.q_bounds.tolist(), mask.k_bounds.tolist()
    found = torch.zeros(len(queries), mask.k_len, dtype=torch.bool)
    for at, query in enumerate(queries):
        block = max(b for b, start in enumerate(q_bounds[:-1]) if start <= query)
        for slot in range(int(mask.count[0, head, block])):
            key = int(mask.index[0, head, block, slot])
            tile = int(mask.tile[0, head, block, slot])
            start, stop = k_bounds[key], k_bounds[key + 1]
            if tile < 0:
                found[at, start:stop] = True
                continue
            words = mask.pool[tile, query - q_bounds[block]]
            bits = (words[:, None] >> torch.arange(32)) & 1
            found[at, start:stop] = bits.flatten()[: stop - start] == 1
    return found


class Sparse:
    """One cell."""

    def __init__(self, cell: Cell, build: Callable[[], BlockMask], flex: bool) -> None:
        self.cell, self.build, self.mask = cell, build, build()
        dtype = getattr(torch, cell.dtype)
        g = torch.Generator().manual_seed(1)
        self.q, self.k, self.v, self.grad = (
            torch.randn(cell.shape, generator=g).to(dtype) for _ in range(4)
        )
        self.flex = flex and cell.with_flex

    def _attend(self, impl: str, mask: BlockMask) -> Tensor:
        return attend(self.q, self.k, self.v, mask, impl=impl, need_lse=False)[0]

    def _dense(self) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(self.q, self.k, self.v)

    def calls(self) -> dict[str, Callable[[], Any]]:
        if self.cell.backward:
            return self._backward()
        found: dict[str, Callable[[], Any]] = {
            "dense": self._dense,
            "torch": lambda: self._attend("torch", self.mask),
        }
        if self.flex:
            found["flex"] = lambda: self._attend("flex", self.mask)
        found["auto"] = lambda: self._attend("auto", self.build())
        return found

    def _backward(self) -> dict[str, Callable[[], Any]]:
        inputs = tuple(x.requires_grad_() for x in (self.q, self.k, self.v))
        outs = {"dense": self._dense(), "torch": self._attend("torch", self.mask)}
        return {
            name: lambda out=out: torch.autograd.grad(out, inputs, self.grad, retain_graph=True)
            for name, out in outs.items()
        }

    def benchmark(self, rounds: int) -> dict[str, float]:
        """Least seconds of each."""
        taken = side_by_side(self.calls(), CPU, rounds, warmup=0)  # `verify` has called them
        return {name: min(spent) for name, spent in taken.items()}

    @torch.no_grad()
    def verify(self) -> None:
        """Whole rows of the output against a float64 softmax over the mask's own bits."""
        g = torch.Generator().manual_seed(2)
        queries = torch.randperm(self.cell.tokens, generator=g)[:SAMPLED].tolist()
        names = ["torch", "auto", *(["flex"] if self.flex else [])]
        outs = {name: self._attend(name, self.mask) for name in names}
        bar = 2e-6 if self.cell.dtype == "float32" else 2e-2
        for head in range(self.cell.shape[1]):
            q, k, v = (x[0, head].double() for x in (self.q, self.k, self.v))
            scores = q[queries] @ k.T * k.shape[1] ** -0.5
            allowed = rows_of(self.mask, head, queries)
            expected = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
            for name, out in outs.items():
                off = (out[0, head, queries].double() - expected).abs().max().item()
                assert off < bar, f"{self.cell.name}: {name} is off by {off:.2g}"


def commit() -> str:
    """Of the code that is measured; with a + where its files differ from it."""
    code = ["git", "-C", str(RESULTS.parent.parent)]
    found = subprocess.run([*code, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    paths = [f"attn_control/{name}" for name in ("kernels/tiles", "masks")]
    changed = subprocess.run([*code, "diff", "--quiet", "HEAD", "--", *paths]).returncode
    return found.stdout.strip() + "+" * bool(changed)


def measure(cell: Cell, rounds: int, flex: bool) -> dict[str, Any]:
    """What is written down of a cell."""
    rounds = min(rounds, max(2, LONG // cell.tokens))
    where = {"threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit()}
    build = cell.mask()
    if build is None:
        return {"cell": cell.name, **where, "missing": "no mask of this density"}
    triple = Sparse(cell, build, flex)
    triple.verify()
    seconds = triple.benchmark(rounds)
    mask, dense = triple.mask, seconds.pop("dense")
    return {
        "cell": cell.name,
        **where,
        "machine": platform.processor() or platform.machine(),
        "rounds": rounds,
        "density": mask.density(),
        "visited": mask.visited_density(),
        "dense_seconds": dense,
        "ratio": {name: spent / dense for name, spent in seconds.items()},
        "bar": cell.bar(mask),
    }


def told(found: dict[str, Any]) -> str:
    """One row of the table."""
    if "missing" in found:
        return f"| {found['cell']} | {found['missing']} | | | | | | | |"
    ratio, bar = found["ratio"], found["bar"]
    numbers = [f"{ratio[name]:.3f}" if name in ratio else "-" for name in ("torch", "flex", "auto")]
    met = "-" if bar is None else "yes" if ratio["torch"] <= bar else "NO"
    met += ", auto NO" if misses_auto(found) else ""
    won = "-" if "flex" not in ratio else "yes" if ratio["torch"] < ratio["flex"] else "no"
    return (
        f"| {found['cell']} | {found['density']:.3f} | {found['visited']:.3f} |"
        f" {found['dense_seconds'] * 1e3:.0f} ms | {' | '.join(numbers)} |"
        f" {'-' if bar is None else f'{bar:.3f}'} {met} | {won} |"
    )


HEAD = (
    "| cell | density | visited | dense | torch | flex | auto | bar, met | quicker than flex |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cells whose name this expression finds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then stop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-flex", action="store_true", help="leave flex out (it compiles)")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--dry", action="store_true", help="write nothing down, measure anew")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = {} if options.dry else read()
    end = time.monotonic() + 60 * options.minutes
    print(HEAD)
    for cell in CELLS:
        if not re.search(options.only, cell.name):
            continue
        known = done.get((cell.name, options.threads, torch.__version__))
        if known is None or options.again:
            if time.monotonic() > end:
                continue
            torch._dynamo.reset()  # what was compiled for other cells is of no use
            known = measure(cell, options.rounds, not options.no_flex)
            if not options.dry:
                write(DONE, json.dumps(known) + "\n", "a")
        print(told(known), flush=True)
        done[key(known)] = known
    if not options.dry:
        order = {cell.name: number for number, cell in enumerate(CELLS)}
        rows = sorted(done.values(), key=lambda found: order.get(found["cell"], len(order)))
        one = [found for found in rows if found["threads"] == options.threads]
        write(TABLE, "\n".join([*verdicts(one), "", HEAD, *map(told, rows), ""]), "w")


def write(path: Path, text: str, mode: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    with path.open(mode, encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
