"""How near attention stays: each head's softmax mass within a quarter of space and time.

Around every query of a video's (or picture's) grid lies a box of at most a quarter of the grid's
tokens. At the border it is moved inwards instead of cut, as NATTEN does (arXiv 2204.07143), so that
every query has equally many keys in it. What the softmax gives to those keys is summed, in float32
or better, and averaged over the queries, the steps and the prompts. Boxes come in three fixed
shapes:

    spatial   all frames, a window of rows and columns
    temporal  a window of frames, all of their rows and columns
    cube      a window in all three

A head counts as near when its *best* shape holds at least 60 % of its mass: choosing one of the
three for each head is part of the definition, as it is what sparse attention by head does (Sparse
VideoGen, arXiv 2502.01776). All three are in the result, with what uniform attention would give.
Only the conditional rows are looked at. Mass on other keys, such as a joint attention's text, lies
outside of every box; `on_grid` is what remains for the grid.

Run by itself on a built-in model: `python -m attn_control.eval.mass NAME`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_control import attach, zoo
from attn_control.call import Call, Layout, Segment, Site, Step
from attn_control.errors import AttnControlError
from attn_control.eval.boxes import QUARTER, SHAPES, Grid, boxes_of, mass_inside, windows
from attn_control.kernels.epilogues import cut_mask
from attn_control.kernels.scores import CHUNK, scale_of
from attn_control.plan import Part, PlanBuilder
from attn_control.processors.control import Control
from attn_control.zoo.prompts import spread

BAR = 0.6


@dataclass(eq=False)
class Tally:
    """What the heads of one site give to their boxes, summed over queries."""

    grid: Grid
    heads: tuple[int, ...]
    keys: int
    queries: int = 0

    def __post_init__(self) -> None:
        self.boxes = boxes_of(self.grid)
        sides = [*self.boxes.values(), self.grid]  # the last: all keys of the grid
        self.tables = [
            torch.stack([windows(n, side[axis]) for side in sides], -1)
            for axis, n in enumerate(self.grid)
        ]
        self.sums = torch.zeros(len(self.heads), len(sides), dtype=torch.float64)

    @torch.no_grad()
    def add(self, call: Call, rows: slice, q: Segment, k: Segment) -> None:
        """Weigh the queries of segment `q` among the keys of segment `k`, in some rows of a call.

        Holds `CHUNK` scores at once.
        """
        wide = torch.promote_types(call.q.dtype, torch.float32)
        tables = [table.to(call.q.device, wide) for table in self.tables]
        repeats = call.q.shape[1] // call.k.shape[1]
        factor = scale_of(call.q, call.scale)
        count = max(1, CHUNK // call.k.shape[2])
        for row in range(*rows.indices(len(call.q))):
            for number, head in enumerate(self.heads):
                keys = call.k[row, head // repeats].to(wide).T
                for first in range(q.start, q.stop, count):
                    span = (first, min(first + count, q.stop))
                    scores = call.q[row, head, slice(*span)].to(wide) * factor @ keys
                    mask = cut_mask(call.mask, slice(row, row + 1), slice(head, head + 1), span)
                    if mask is not None and mask.dtype == torch.bool:
                        scores = scores.masked_fill(~mask[0, 0], float("-inf"))
                    elif mask is not None:
                        scores = scores + mask[0, 0]
                    weights = scores.softmax(-1)[:, k.start : k.stop]
                    places = torch.arange(*span, device=weights.device) - q.start
                    inside = mass_inside(weights, places, tables)
                    self.sums[number] += inside.double().sum(0).cpu()
            self.queries += q.length


class Ledger:
    """What one run leaves behind: a tally for each site, of the steps that count."""

    def __init__(self, at: frozenset[int]) -> None:
        self.at, self.seen = at, set[int]()
        self.counting = False
        self.tallies: dict[Site, Tally] = {}

    def begin(self, step: Step) -> None:
        """Before each forward."""
        self.counting = step.index in self.at
        if step.index is not None:
            self.seen.add(step.index)


@dataclass(frozen=True, eq=False)
class _Weigh:
    """Looks at a call and hands its output on as it is."""

    ledger: Ledger
    site: Site
    rows: slice
    q: Segment
    k: Segment

    def prepare(self, step: Step) -> None:
        self.ledger.begin(step)

    def __call__(self, out: Tensor, call: Call) -> Tensor:
        if self.ledger.counting:
            self.ledger.tallies[self.site].add(call, self.rows, self.q, self.k)
        return out


@dataclass(frozen=True)
class AttentionMass(Control):
    """Measures the conditional rows and changes nothing: every output keeps its bits."""

    ledger: Ledger = field(kw_only=True, repr=False)

    @property
    def needs(self) -> tuple[str, ...]:
        return (*super().needs, "layout", "step", "branch")

    @property
    def branch(self) -> str | None:
        return "cond"

    def check(self, site: Site, layout: Layout) -> None:
        q, k = _pictures(layout.q), _pictures(layout.k)
        if len(q) != 1 or len(k) != 1 or q[0].grid is None or q[0].grid != k[0].grid:
            raise AttnControlError(
                f"{self}: {site.label} has pictures on the grids {[s.grid for s in q]} among its"
                f" queries and {[s.grid for s in k]} among its keys; expected the same one in both"
            )
        if not boxes_of(q[0].grid):
            raise AttnControlError(
                f"{self}: no box within a quarter of grid {q[0].grid} of {site.label}"
            )

    def contribute(
        self,
        builder: PlanBuilder,
        number: int,
        layout: Layout | None,
        heads: tuple[int, ...],
        rows: tuple[int, int] | None,
    ) -> None:
        assert layout is not None
        (q,), (k,), site = _pictures(layout.q), _pictures(layout.k), builder.site
        assert q.grid is not None
        self.ledger.tallies.setdefault(site, Tally(q.grid, heads, layout.k_len))
        within = slice(*rows) if rows else slice(None)
        builder.add(Part(number, _Weigh(self.ledger, site, within, q, k)))


def _pictures(segments: tuple[Segment, ...]) -> list[Segment]:
    return [s for s in segments if s.role in ("image", "video")]


def measure_mass(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    steps: int,
    seeds: Sequence[int],
    at: Sequence[int] | None = None,
    heads: str = "all",
    call: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """How near every self- and joint-attention head of a pipeline stays, as data for JSON.

    Args:
        prompts: texts, or the pipeline's arguments in place of one (``prompt_embeds``, a picture).
        steps: of the sampler; seeds: one a prompt.
        at: the steps at which to measure, from 0; None for all.
        heads: selector of heads.
        call: the pipeline's other arguments, such as `zoo.defaults(name)`; `steps` goes before its
            number of steps. Nothing is decoded unless it asks for an ``output_type``.

    Returns:
        ``heads``: a row a head with its masses, best shape and what uniform attention would give;
        ``near``: the share of heads whose best shape holds 60 % or more, ``near_by_shape`` the same
        for each shape alone, ``near_by_prompt`` for each prompt alone; ``boxes``: their sides.

    Raises:
        AttnControlError: no prompt, seeds that do not match, steps outside the run, a site whose
            tokens have no grid, attention that is not finite.
    """
    wanted = frozenset(range(steps) if at is None else at)
    if not prompts or len(prompts) != len(seeds):
        raise AttnControlError(
            f"measure_mass: expected one seed a prompt, got {len(prompts)} prompts and"
            f" {len(seeds)} seeds"
        )
    if not wanted or not wanted <= set(range(steps)):
        raise AttnControlError(
            f"measure_mass: at={at!r} must name steps from 0 to {steps - 1}, of {steps=}"
        )
    found = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        ledger = Ledger(wanted)
        said = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        arguments = {"output_type": "latent", **(call or {}), **said, "num_inference_steps": steps}
        with closing(attach(pipe, AttentionMass(heads, ledger=ledger))):
            pipe(**arguments, generator=torch.Generator("cpu").manual_seed(seed))
        if not wanted <= ledger.seen:
            raise AttnControlError(
                f"measure_mass: the run was asked for the steps {sorted(wanted)} and made"
                f" {sorted(ledger.seen)}"
            )
        found.append({site: tally for site, tally in ledger.tallies.items() if tally.queries})
    return {
        "pipeline": type(pipe).__name__,
        "prompts": len(prompts),
        "seeds": list(seeds),
        "steps": steps,
        "at": sorted(wanted),
        "volume": QUARTER,
        "bar": BAR,
        **_summed_up(found),
    }


def _summed_up(runs: list[dict[Site, Tally]]) -> dict[str, Any]:
    """The rows of the heads and the shares at the bar, from the tallies of each prompt."""
    rows: list[dict[str, Any]] = []
    alone: list[list[float]] = []  # by head, the best shape's mass with each prompt
    boxes: dict[str, dict[str, list[int]]] = {}
    for site, first in runs[0].items():
        grid = "x".join(map(str, first.grid))
        boxes[grid] = {shape: list(sides) for shape, sides in first.boxes.items()}
        by_prompt = torch.stack([run[site].sums / run[site].queries for run in runs])
        if not by_prompt.isfinite().all():
            raise AttnControlError(f"measure_mass: the attention of {site.label} is not finite")
        uniform = {shape: math.prod(s) / first.keys for shape, s in first.boxes.items()}
        for number, head in enumerate(first.heads):
            *inside, whole = by_prompt[:, number].mean(0).tolist()
            mass = {shape: round(m, 6) for shape, m in zip(first.boxes, inside, strict=True)}
            alone.append(by_prompt[:, number, :-1].amax(-1).tolist())
            rows.append(
                {
                    "model": site.model,
                    "site": site.label,
                    "head": head,
                    "grid": grid,
                    "mass": mass,
                    "best": max(mass, key=mass.__getitem__),
                    "on_grid": round(whole, 6),
                    "uniform": {shape: round(share, 6) for shape, share in uniform.items()},
                }
            )
    best = [max(row["mass"].values()) for row in rows]
    return {
        "near": _share(best),
        "near_by_shape": {
            shape: _share([row["mass"].get(shape, 0.0) for row in rows])
            for shape in SHAPES
            if any(shape in row["mass"] for row in rows)
        },
        "near_by_prompt": [_share(list(masses)) for masses in zip(*alone, strict=True)],
        "boxes": boxes,
        "heads": rows,
    }


def _share(masses: list[float]) -> float:
    """The share of heads at or above the bar."""
    return round(sum(mass >= BAR for mass in masses) / len(masses), 6)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m attn_control.eval.mass", description=__doc__)
    cli.add_argument("name", choices=zoo.NAMES)
    cli.add_argument("--prompts", type=int, default=4, help="of the fixed ones, spread evenly")
    cli.add_argument("--steps", type=int, help="of the sampler (default: the model's own)")
    cli.add_argument("--at", type=int, nargs="+", help="steps to measure (default: three, spread)")
    cli.add_argument("--json", type=Path, help="also write the whole result here")
    args = cli.parse_args(argv)
    alone = [row for row in zoo.load_prompts(args.name) if not row.get("reference")]
    rows = spread(alone, args.prompts)
    call = zoo.defaults(args.name)
    steps = args.steps or call["num_inference_steps"]
    found = measure_mass(
        zoo.load(args.name), [row["prompt"] for row in rows], steps=steps,
        seeds=[row["seed"] for row in rows], at=args.at or thirds(steps), call=call,
    )  # fmt: skip
    for row in found["heads"]:
        masses = "  ".join(f"{shape} {100 * mass:5.1f} %" for shape, mass in row["mass"].items())
        print(f"{row['site'] + 'H' + str(row['head']):12s} {masses}  best: {row['best']}")
    print(f"{100 * found['near']:.1f} % of {len(found['heads'])} heads hold {BAR:.0%} or more")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def thirds(steps: int) -> list[int]:
    """The middles of a run's three thirds: 4, 12 and 20 of 25 steps."""
    return sorted({steps * third // 6 for third in (1, 3, 5)})


if __name__ == "__main__":
    main()
