"""Where the sampler is, read from the scheduler; attention calls are never counted."""

from __future__ import annotations

import functools
import itertools
import math
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_control.branches import InLoop, branch_by_row
from attn_control.call import Step, rows_in
from attn_control.errors import AttnControlError
from attn_control.families import Arguments, Family

_run_ids = itertools.count(1)


@dataclass
class Run:
    """One walk through the scheduler's timesteps, whose identity tells runs apart."""

    id: int
    timesteps: Any
    values: list[float]
    sigmas: list[float] | None
    first: int
    position: int
    calls: int = 0  # denoiser calls at this position so far
    ahead: bool = False  # a ControlNet has been called at this position, its denoiser not yet
    visited: set[int] = field(default_factory=set)
    block: int | None = None  # of a text, each of which is denoised from the beginning

    @functools.cached_property
    def levels(self) -> list[int]:
        """Of each position, which of the distinct timesteps it is."""
        return levels_of(self.values)


def levels_of(values: list[float]) -> list[int]:
    """Of each timestep of a run its number among the distinct ones; equal ones follow each other,
    as Heun's and the first of PNDM's do.
    """
    changes = (int(a != b) for a, b in itertools.pairwise(values))
    return list(itertools.accumulate(changes, initial=0))


class StepTracker:
    """Follows one pipeline's sampler. Without one, steps are unknown and every row is "cond"."""

    def __init__(self, pipe: Any = None) -> None:
        self._pipe = weakref.ref(pipe) if pipe is not None else lambda: None
        self._runs: dict[int, Run] = {}  # by thread: each may run the model on its own

    @property
    def pipe(self) -> Any:
        return self._pipe()

    @property
    def run(self) -> Run | None:
        """The calling thread's current run."""
        return self._runs.get(threading.get_ident())

    def locate(
        self,
        family: Family,
        arguments: Arguments,
        context: str | None,
        beside: str | None = None,
        loop: InLoop | None = None,
    ) -> Step:
        """The Step of a denoiser call.

        Args:
            family: of the denoiser that is called.
            arguments: what it is called with, by name.
            context: the name given to diffusers' ``cache_context``, if any.
            beside: the component's name, if it is not the denoiser that is called but a ControlNet
                before it, whose calls do not count.
            loop: of a language model's pipeline, where it is. Each block of text is a run.
        """
        rows = rows_in(arguments[family.sample])
        scheduler = getattr(self.pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        unknown = not isinstance(timesteps, torch.Tensor) or timesteps.numel() == 0
        if scheduler is None or unknown or (family.language and loop is None):
            return Step(0, None, None, None, ("cond",) * rows)
        run = self._follow(scheduler, timesteps, family, arguments, loop)
        sigma = run.sigmas[run.position] if run.sigmas else None
        run.ahead = beside is not None
        if beside is not None:
            branch = (f"other:{beside}",) * rows
        else:
            branch = branch_by_row(self.pipe, family, arguments, context, rows, run.calls)
            run.calls += 1
        level, levels = run.levels[run.position], run.levels[-1] + 1
        return Step(run.id, run.position, len(run.values), sigma, branch, level, levels)

    def _follow(
        self,
        scheduler: Any,
        timesteps: torch.Tensor,
        family: Family,
        arguments: Arguments,
        loop: InLoop | None,
    ) -> Run:
        thread = threading.get_ident()
        run, block = self._runs.get(thread), loop.block if loop is not None else None
        if run is not None and (run.timesteps is not timesteps or run.block != block):
            run = None
        values = run.values if run else [float(t) for t in timesteps.flatten()]
        if loop is not None:
            position = min(loop.step, len(values) - 1)  # edits of a finished block come after that
        else:
            position = self._position(scheduler, values, run, family, arguments)
        if run is None or position < run.position:
            sigmas = noise_levels(scheduler, values)
            run = Run(next(_run_ids), timesteps, values, sigmas, position, position, block=block)
            self._runs[thread] = run
        elif position != run.position:
            run.position, run.calls = position, 0
        run.visited.add(position)
        return run

    def _position(
        self,
        scheduler: Any,
        values: list[float],
        run: Run | None,
        family: Family,
        arguments: Arguments,
    ) -> int:
        index = getattr(scheduler, "step_index", None)
        if index is not None:
            return min(int(index), len(values) - 1)
        if run is None and getattr(scheduler, "begin_index", None) is not None:
            return int(scheduler.begin_index)
        if run is not None and hasattr(scheduler, "step_index"):
            return (
                run.position
            )  # the scheduler counts from its first step on, and has not made one yet
        if family.timestep_scale is None:
            return run.position if run is not None else 0
        given: Any = arguments.get("timestep")
        value = (
            float(given.max() if isinstance(given, torch.Tensor) else given) / family.timestep_scale
        )
        # Pipelines round timesteps to the latents' precision; FLUX divides them after that.
        rounding = torch.finfo(given.dtype).eps if _is_floating(given) else 0.0
        distance = min(abs(t - value) for t in values)
        matches = [n for n, t in enumerate(values) if abs(t - value) <= distance * (1 + 1e-6)]
        if distance > 1e-3 + abs(value) * max(1e-3, rounding):
            raise AttnControlError(
                f"the denoiser was called at timestep {value:g}, which is not among the scheduler's"
                f" {len(values)} timesteps; attach to the bare model instead, without windows"
            )
        if run is None:
            return matches[0]
        if run.ahead and run.position in matches:
            return run.position
        # Repeated timesteps (PNDM): the next unused position, unless the other half of split
        # guidance is due here.
        if family.cfg == "split" and run.position in matches and run.calls < 2:
            return run.position
        return next((n for n in matches if n > run.position), matches[0])


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def noise_levels(scheduler: Any, values: list[float]) -> list[float] | None:
    """The sigma of each timestep, infinite where no picture is left in it; None if unknown."""
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and sigmas.numel() >= len(values):
        return [float(s) for s in sigmas.flatten()[: len(values)]]
    products = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(products, torch.Tensor):
        alphas = [float(products[min(int(t), len(products) - 1)]) for t in values]
        # Under zero terminal SNR the first step starts from noise alone.
        return [math.sqrt((1 - a) / a) if a > 0 else math.inf for a in alphas]
    return None


_trackers: weakref.WeakKeyDictionary[Any, StepTracker] = weakref.WeakKeyDictionary()


def tracker_of(pipe: Any) -> StepTracker:
    """One tracker a pipeline: its two denoisers (Wan 2.2) walk through the same steps."""
    return _trackers.setdefault(pipe, StepTracker(pipe))
