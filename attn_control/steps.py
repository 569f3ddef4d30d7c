"""Where the sampler is, read from the scheduler; attention calls are never counted."""

from __future__ import annotations

import itertools
import math
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn

from attn_control.call import Step, rows_in
from attn_control.errors import AttnControlError
from attn_control.families import COMPONENTS, Arguments, Family, unwrap

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
    visited: set[int] = field(default_factory=set)


def calling_pipeline(model: nn.Module) -> Any:
    """The pipeline that is calling this denoiser, from the call stack; None in a loop of one's own.

    Pipelines share denoisers (``from_pipe``), attached or not, and only the one that runs has the
    scheduler and the guidance flag of this call.
    """
    model = unwrap(model)
    for owner, _ in _methods():
        # What diffusers' pipelines have and a user's own classes do not.
        if hasattr(type(owner), "components") and hasattr(owner, "scheduler"):
            parts = (getattr(owner, name, None) for name in COMPONENTS)
            if any(part is not None and unwrap(part) is model for part in parts):
                return owner
    return None


def _methods() -> Iterator[tuple[Any, FrameType]]:
    """The running methods of the call stack, innermost first: their object and their frame."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            yield frame.f_locals.get("self"), frame
        frame = frame.f_back


def guides_itself(pipe: Any) -> bool:
    """Whether a pipeline runs classifier-free guidance now.

    Many say so only in a local variable of the method that samples. Some have that and an attribute
    too: then the attribute counts if that method reads it.
    """
    name = "do_classifier_free_guidance"
    for owner, frame in _methods():
        code = frame.f_code
        if owner is pipe and "apply_cfg" in code.co_varnames:  # decided anew at each step
            return bool(frame.f_locals.get("apply_cfg", False))
        if owner is pipe and name in code.co_varnames and name not in code.co_names:
            return bool(frame.f_locals.get(name, False))
    return bool(getattr(pipe, name, False))


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

    def locate(self, family: Family, arguments: Arguments, context: str | None) -> Step:
        """The Step of a denoiser call.

        Args:
            family: of the denoiser that is called.
            arguments: what it is called with, by name.
            context: the name given to diffusers' ``cache_context``, if any.
        """
        rows = rows_in(arguments[family.sample])
        scheduler = getattr(self.pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if scheduler is None or not isinstance(timesteps, torch.Tensor) or timesteps.numel() == 0:
            return Step(0, None, None, None, ("cond",) * rows)
        run = self._follow(scheduler, timesteps, family, arguments)
        branch = self._branch(family, arguments, context, rows, run.calls)
        run.calls += 1
        sigma = run.sigmas[run.position] if run.sigmas else None
        return Step(run.id, run.position, len(run.values), sigma, branch)

    def _follow(
        self, scheduler: Any, timesteps: torch.Tensor, family: Family, arguments: Arguments
    ) -> Run:
        thread = threading.get_ident()
        run = self._runs.get(thread)
        if run is not None and run.timesteps is not timesteps:
            run = None
        values = run.values if run else [float(t) for t in timesteps.flatten()]
        position = self._position(scheduler, values, run, family, arguments)
        if run is None or position < run.position:
            sigmas = noise_levels(scheduler, values)
            run = Run(next(_run_ids), timesteps, values, sigmas, position, position)
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
        # Repeated timesteps (PNDM): the next unused position, unless the other half of split
        # guidance is due here.
        if family.cfg == "split" and run.position in matches and run.calls < 2:
            return run.position
        return next((n for n in matches if n > run.position), matches[0])

    def _branch(
        self, family: Family, arguments: Arguments, context: str | None, rows: int, calls: int
    ) -> tuple[str, ...]:
        if family.cfg.startswith("batched"):
            if getattr(self.pipe, "do_perturbed_attention_guidance", False):
                raise AttnControlError(
                    f"{type(self.pipe).__name__} already runs its own perturbed rows; use the"
                    " plain pipeline with SoftPAG"
                )
            if arguments.get("skip_layers") is not None:
                return ("other:skip_layers",) * rows
            if context not in (None, "cond_uncond"):  # a pipeline's own perturbed forward
                return (f"other:{context}",) * rows
            if guides_itself(self.pipe):
                if rows % 2:
                    raise AttnControlError(
                        f"classifier-free guidance needs an even batch, the denoiser got {rows}"
                        " rows"
                    )
                halves = ("cond", "uncond") if "cond first" in family.cfg else ("uncond", "cond")
                return tuple(branch for branch in halves for _ in range(rows // 2))
            return ("cond",) * rows
        if context is not None:
            context = context.removeprefix("pred_")  # as diffusers' guiders name their batches
            return (context if context in ("cond", "uncond") else f"other:{context}",) * rows
        return (("cond", "uncond")[calls] if calls < 2 else f"other:{calls}",) * rows


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def noise_levels(scheduler: Any, values: list[float]) -> list[float] | None:
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and sigmas.numel() >= len(values):
        return [float(s) for s in sigmas.flatten()[: len(values)]]
    products = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(products, torch.Tensor):
        alphas = [float(products[min(int(t), len(products) - 1)]) for t in values]
        return [math.sqrt((1 - a) / a) for a in alphas]
    return None
