"""Times of dense, flex and triton in turns, over lengths, densities and kinds of masks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from attn_control.kernels import attend
from attn_control.masks import BlockMask, band_mask

SAMPLED = 16
"""Queries of a head that are verified in each cell."""
CLOSE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest error of a verified output: inputs are normal, so outputs are below 4 or so."""


class Timer(Protocol):
    """What measures: milliseconds of each call, taken in turns."""

    def __call__(self, calls: dict[str, Callable[[], Any]]) -> dict[str, float]: ...


class Events:
    """By the GPU's own clock; medians. Each call finds the second-level cache full of zeros."""

    def __init__(self, device: torch.device, seconds: float = 0.4) -> None:
        self.device, self.seconds = device, seconds
        self.flush = torch.empty(1 << 26, dtype=torch.int32, device=device)

    def __call__(self, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        for call in calls.values():  # what is compiled is compiled here
            call()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for call in calls.values():
            call()
        torch.cuda.synchronize(self.device)
        spent = time.perf_counter() - start
        rounds = min(50, max(5, int(self.seconds / max(spent, 1e-4))))
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flush.zero_()
                before.record()
                call()
                after.record()
                torch.cuda.synchronize(self.device)
                taken[name].append(before.elapsed_time(after))
        return {name: sorted(times)[len(times) // 2] for name, times in taken.items()}


@dataclass(frozen=True)
class Cell:
    """One mask at one size. kind: "blocks", random ones, each whole; "band", with cut ones."""

    kind: str
    heads: int
    tokens: int
    dim: int
    density: float


@dataclass(frozen=True)
class Drawn:
    """A cell's mask, and what it allows queries, said without it."""

    plan: BlockMask
    allowed: Callable[[Tensor, int], Tensor]


def draw(cell: Cell, block: int) -> Drawn:
    """allowed: of int64 (queries,) and a head, bool (queries, tokens)."""
    place = torch.arange(cell.tokens)
    if cell.kind == "band":
        # A band of reach r holds about 2 r / n - (r / n)^2 of the pairs.
        reach = round(cell.tokens * (1 - (1 - cell.density) ** 0.5))
        return Drawn(
            band_mask((cell.tokens,), reach),
            lambda rows, head: (rows[:, None] - place).abs() <= reach,
        )
    side = -(-cell.tokens // block)
    kept = max(1, round(cell.density * side))
    g = torch.Generator().manual_seed(cell.tokens)
    # As many in each row: the rows of real masks differ, and wait for the longest no longer.
    chosen = torch.rand(cell.heads, side, side, generator=g).topk(kept, dim=-1).indices
    table = torch.zeros(cell.heads, side, side, dtype=torch.bool).scatter_(-1, chosen, True)
    plan = BlockMask.from_table(table, block_size=block, q_len=cell.tokens, k_len=cell.tokens)

    def allowed(rows: Tensor, head: int) -> Tensor:
        return table[head, rows // block].repeat_interleave(block, 1)[:, : cell.tokens]

    return Drawn(plan, allowed)


def measure(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer,
    impls: tuple[str, ...],
    block: int,
) -> Iterator[dict[str, Any]]:
    """Rows as `kernels.cost` reads them, forward and backward; ``error`` of what was verified."""
    drawn = draw(cell, block)
    plan = drawn.plan.to(device)
    g = torch.Generator().manual_seed(1)
    shape = 1, cell.heads, cell.tokens, cell.dim
    q, k, v, grad = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(4))

    def run(impl: str) -> Tensor:
        if impl == "dense":
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return attend(q, k, v, plan, impl=impl, need_lse=False)[0]

    precision = "single" if dtype == torch.float32 else "half"
    names = ("dense", *impls)
    visited = plan.visited_density()
    for way in ("forward", "backward"):
        inputs = tuple(x.requires_grad_(way == "backward") for x in (q, k, v))
        with torch.set_grad_enabled(way == "backward"):
            outs = {name: run(name) for name in names}
        errors = {} if way == "backward" else _verify(cell, drawn, outs, inputs)

        def forward(name: str) -> Callable[[], Any]:
            return torch.no_grad()(lambda: run(name))

        def backward(name: str, outs: dict[str, Tensor] = outs) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(outs[name], (q, k, v), grad, retain_graph=True)

        make = forward if way == "forward" else backward
        for name, taken in timer({name: make(name) for name in names}).items():
            yield {
                "impl": name,
                "kind": cell.kind,
                "way": way,
                "precision": precision,
                "heads": cell.heads,
                "tokens": cell.tokens,
                "dim": cell.dim,
                "density": 1.0 if name == "dense" else visited,
                "milliseconds": taken,
                "error": errors.get(name),
            }


def _verify(
    cell: Cell, drawn: Drawn, outs: dict[str, Tensor], inputs: tuple[Tensor, ...]
) -> dict[str, float]:
    """Largest errors of some queries, of the first and the last head, against float64."""
    g = torch.Generator().manual_seed(2)
    rows = torch.randint(0, cell.tokens, (SAMPLED,), generator=g)
    found = dict.fromkeys((name for name in outs if name != "dense"), 0.0)
    for head in {0, cell.heads - 1}:
        q, k, v = (x[0, head].detach().double() for x in inputs)
        scores = q[rows.to(q.device)] @ k.T * cell.dim**-0.5
        allowed = drawn.allowed(rows, head).to(q.device)
        expected = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
        for name in found:
            off = (outs[name][0, head, rows.to(q.device)].double() - expected).abs().max()
            found[name] = max(found[name], float(off))
    return found
