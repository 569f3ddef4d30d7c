"""How much of a dense run goes into the softmax of self-attention: Amdahl's share, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_control.call import Call, Layout, Step
from attn_control.plan import Part, PlanBuilder
from attn_control.processors.control import Control


def clock_of(device: str) -> tuple[str, Callable[[], float]]:
    """The clock that runs are timed by, and its name: that of the processor where a single thread
    runs, because on a busy machine the wall's counts the neighbours' work.
    """
    if device.startswith("cpu") and torch.get_num_threads() == 1:
        return "processor", time.process_time
    if not device.startswith("cuda"):
        return "wall", time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return "wall", synchronised


@dataclass(eq=False)
class Spent:
    """Seconds in attention so far."""

    clock: Callable[[], float]
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class _Timed:
    """Runs the stock call and looks at the clock."""

    heads: tuple[int, ...]
    spent: Spent

    def prepare(self, step: Step) -> None:
        pass

    def run(self, call: Call, whole: Callable[[], Tensor]) -> Tensor | None:
        start = self.spent.clock()
        whole()
        self.spent.seconds += self.spent.clock() - start
        return None  # the stock output itself


@dataclass(frozen=True)
class AttentionClock(Control):
    """Times the selected heads' attention and changes nothing: every output keeps its bits."""

    spent: Spent = field(kw_only=True, repr=False)

    def contribute(
        self,
        builder: PlanBuilder,
        number: int,
        layout: Layout | None,
        heads: tuple[int, ...],
        rows: tuple[int, int] | None,
    ) -> None:
        builder.add(Part(number, attention=_Timed(heads, self.spent)))


def attention_share(pipe: Any, run: Callable[[], Any], device: str) -> float:
    """The share of self- or joint-attention in the time of `run`, which calls the pipeline."""
    from attn_control import attach

    spent = Spent(clock_of(device)[1])
    with closing(attach(pipe, AttentionClock("all", spent=spent))):
        start = spent.clock()
        run()
        return spent.seconds / (spent.clock() - start)
