"""The denoiser under control: healing, step tracking, the main forward and the extra ones."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_control.appended import append, with_riders
from attn_control.branches import calling_pipeline, in_loop, learns_variance, told_to
from attn_control.bypass import Bypass
from attn_control.caches import StepCaches
from attn_control.call import Site, Step, rows_in, sample_of, tensor_in, with_sample
from attn_control.entry import Entry
from attn_control.errors import AttnControlError
from attn_control.families import bind, family_of, refuse_pipeline, slice_rows, unwrap
from attn_control.guidance import add_to_rows, difference
from attn_control.intercept import Interception, Port
from attn_control.interface import InterfaceInterception
from attn_control.phases import Pass, Phases
from attn_control.processors.guide import Guide
from attn_control.recompute import refuse_in_backward, remembered
from attn_control.report import Stopwatch
from attn_control.steps import StepTracker, tracker_of
from attn_control.swapped import context, swapped_class

MAX_RUNS = 16
"""Runs whose last difference is kept: as many threads may share one model under split guidance."""


_CACHES = ("kv_cache", "kv_caches")
"""Arguments in which pipelines hand the model a cache to fill."""


class Denoiser:
    """Everything that is attached to one denoiser module, shared by nested sessions."""

    def __init__(self, model: Any, component: str) -> None:
        self.model, self.component = model, component
        self.beside = component.startswith("controlnet")
        self._alone = StepTracker()
        self.family = family_of(model)
        watch = InterfaceInterception if self.family.language else Interception
        self.interception = watch(model, component)
        self.phases = Phases(unwrap(model), self.family, self.interception)
        self.caches = StepCaches(unwrap(model))
        self.step: Step | None = None
        self.plain, self.guided = Stopwatch(), Stopwatch()
        self.sessions: list[tuple[Any, list[Entry]]] = []
        # By run: the difference of a split cond call, for the uncond call of the same step.
        self._kept: dict[int, tuple[int, Tensor]] = {}
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())  # a copied or pickled model is detached

    @property
    def sites(self) -> list[Site]:
        return [port.site for port in self.interception.ports]

    def install(self) -> None:
        try:
            self.interception.install()
        except BaseException:
            self.interception.restore()
            raise
        self.model.__dict__["_attn_control"] = self
        cls: Any = type(self.model)
        self.model.__class__ = swapped_class(cls)

    def restore(self) -> None:
        self.phases.set_entries([])
        self.interception.restore()
        self.caches.restore()
        self.model.__dict__.pop("_attn_control", None)
        self.model.__class__ = type(self.model)._attn_control_class

    def set_entries(self, entries: list[Entry]) -> None:
        """The controls in force changed."""
        for entry in entries if self.beside else ():
            if entry.control.guidance_scale is not None or entry.control.appends:
                raise AttnControlError(
                    f"{entry.control}: {self.component} runs before the denoiser, whose rows alone"
                    " run again; expected a control that acts in place, or sites of the denoiser"
                )
        self.phases.set_entries(entries)
        self._kept.clear()

    def _tracker(self) -> StepTracker:
        """Of the pipeline that is calling, if the session was given a pipeline at all."""
        attached = next((s.pipe for s, _ in self.sessions if s.pipe is not None), None)
        if attached is None:
            return self._alone
        return tracker_of(calling_pipeline(self.model) or attached)

    def call(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One denoiser call of the pipeline."""
        with self._lock:
            if self.interception.heal():
                for entry in self.phases.entries:
                    entry.doubt()
            active = [entry for entry in self.phases.entries if not entry.control.idle]
            if not active:
                return forward(*args, **kwargs)
            try:
                return self._controlled(active, forward, args, kwargs)
            except BaseException:
                self.phases.forget()
                self._kept.clear()
                raise
            finally:
                self.phases.apply({})

    def _controlled(
        self,
        active: list[Entry],
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        arguments = bind(self.model, args, kwargs)
        # Models pop from nested dicts while they run: keep what the extra forwards will need.
        spare = _copied(arguments)
        tracker = self._tracker()
        if tracker.pipe is not None:
            refuse_in_backward(type(unwrap(self.model)).__name__)
        beside = self.component if self.beside else None
        loop = in_loop(tracker.pipe, self.family.loop)
        step = self.step = tracker.locate(self.family, arguments, context.name, beside, loop)
        for entry in active:
            refuse_pipeline(tracker.pipe, entry.control)  # not the attached one, perhaps
            entry.begin(step, tracker.run)
        due = [entry for entry in active if entry.due_at(step)]
        cond = step.rows("cond")
        for entry in due:
            if entry.control.branch == "uncond":
                entry.expect_negative(step, split=self.family.cfg == "split")
        in_place = [
            entry
            for entry in due
            if entry.control.guidance_scale is None
            and (entry.control.branch is None or entry.control.branch in step.branch)
        ]
        for entry in in_place:
            if entry.control.branch is not None and len(set(step.branch)) > 1:
                self.caches.refuse_halves(entry.control)
        guides = [entry for entry in due if entry.control.guidance_scale is not None]
        twice = [*guides, *(entry for entry in in_place if entry.control.appends)]
        if twice and any(arguments.get(name) is not None for name in _CACHES):
            raise AttnControlError(
                f"{twice[0].control}: {type(unwrap(self.model)).__name__} was called with a cache"
                " of keys and values, into which another forward would write; switch the cache off"
            )
        riders = [entry for entry in guides if entry.control.rides and cond is not None]
        main = Pass(arguments, in_place, cond, uncond=step.rows("uncond"), branch=step.branch)
        if due and self.family.language:
            main = replace(main, told=told_to(self.family, arguments, loop))
        main = with_riders(main, riders, self.family)
        output = self._forward(forward, main, step, [self.plain])
        if not guides:
            return output
        everything = sample_of(output)
        sample = everything[: rows_in(arguments[self.family.sample])]
        if cond is None:
            return with_sample(output, add_to_rows(sample, self._kept_delta(step)))
        plain, delta, ridden = sample[slice(*cond)], None, dict(main.riders)
        for entry in guides:
            if entry.number in ridden:
                rows = ridden[entry.number]
                perturbed = everything[slice(*rows)]
                bare = replace(
                    main,
                    arguments=_copied(spare),
                    acting=in_place,
                    alias=f"unperturbed:{entry.number}",
                )
                unperturbed = functools.partial(self._unperturbed, forward, bare, step, rows)
            else:
                perturbed, unperturbed = self._perturbed(
                    entry, forward, spare, in_place, cond, step
                )
            self._prove(entry, plain, perturbed, unperturbed, step)
            part = self._combine(entry, plain, perturbed)
            delta = part if delta is None else delta + part
        assert delta is not None
        if step.index is not None:
            self._kept.pop(step.run_id, None)
            self._kept[step.run_id] = step.index, delta
            if len(self._kept) > MAX_RUNS:
                self._kept.pop(next(iter(self._kept)))
        return with_sample(output, add_to_rows(sample, delta))

    def _kept_delta(self, step: Step) -> Tensor:
        index, delta = self._kept.get(step.run_id, (None, None))
        if delta is None or index != step.index:
            raise AttnControlError(
                f"guidance: the {step.branch[0]} call of step {step.index} came before its cond"
                " call; this order of split guidance is not supported"
            )
        return delta

    def _perturbed(
        self,
        entry: Entry,
        forward: Callable[..., Any],
        spare: dict[str, Any],
        in_place: list[Entry],
        cond: tuple[int, int],
        step: Step,
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        """One extra forward with the entry's perturbation: the cond rows' prediction, and how to
        have it unperturbed where that has other rows, and so other rounding, than the pipeline's.
        """
        in_place = [other for other in in_place if other.control.branch != "uncond"]
        alone, count = slice_rows(self.family, spare, cond), cond[1] - cond[0]
        own = f"perturbed:{entry.number}"
        if alone is not None:
            run = Pass(_copied(alone), [*in_place, entry], (0, count), branch=(own,) * count)
        else:
            run = replace(
                Pass(_copied(spare), [*in_place, entry], cond, perturbed=cond),
                branch=step.branch,
                alias=own,
            )
        with self.caches.branch(f"perturbed:{entry.number}"):
            perturbed = sample_of(self._forward(forward, run, step, [self.guided, entry.watch]))
        if alone is None:
            return perturbed[slice(*cond)], None
        if count == rows_in(spare[self.family.sample]):
            return perturbed, None
        name = f"unperturbed:{entry.number}"
        again = Pass(_copied(alone), in_place, run.cond, branch=(name,) * count)
        return perturbed, functools.partial(self._unperturbed, forward, again, step, None, name)

    def _unperturbed(
        self,
        forward: Callable[..., Any],
        run: Pass,
        step: Step,
        rows: tuple[int, int] | None,
        branch: str = "unperturbed",
    ) -> Tensor:
        """A perturbed pass, or some of its rows, once more without the perturbation."""
        with self.caches.branch(branch):
            found = sample_of(self._forward(forward, run, step, []))
        return found if rows is None else found[slice(*rows)]

    def _prove(
        self,
        entry: Entry,
        plain: Tensor,
        perturbed: Tensor,
        unperturbed: Callable[[], Tensor] | None,
        step: Step,
    ) -> None:
        """Once: a perturbation that ran and changed nothing is an error."""
        if entry.moved or entry.control.may_vanish or not entry.acted:
            return
        same = torch.equal(plain, perturbed)
        if not same and unperturbed is not None and _within_rounding(plain, perturbed):
            same = torch.equal(unperturbed(), perturbed)
        if same:
            raise AttnControlError(
                f"{entry.control}: its perturbation ran but the prediction did not change at"
                f" step {step.index}; expected other heads, tokens or a larger u"
            )
        entry.moved = True

    def _combine(self, entry: Entry, plain: Tensor, perturbed: Tensor) -> Tensor:
        guide = entry.control
        assert isinstance(guide, Guide) and guide.guidance_scale is not None
        return difference(
            plain,
            perturbed,
            guide.guidance_scale,
            parallel=guide.parallel,
            limit=guide.limit,
            rescale=guide.rescale,
            learned=learns_variance(self._tracker().pipe),
        )

    def _forward(
        self, forward: Callable[..., Any], run: Pass, step: Step, watches: list[Stopwatch]
    ) -> Any:
        """Run a pass with its plans, and let its controls see what fired."""
        rows = rows_in(run.arguments[self.family.sample])
        run, kwargs = append(run, self.phases.entries, self.family)
        plans = self.phases.plans(run)
        step = replace(step, branch=run.branches)
        self.phases.apply(plans, step)
        device = tensor_in(run.arguments[self.family.sample]).device
        for watch in watches:
            watch.start(device)
        with contextlib.ExitStack() as beside:
            if run.appended:
                beside.enter_context(self.caches.branch("appended", appended=True))
            if plans and torch.is_grad_enabled():
                moment = functools.partial(self._again, plans, step)
                beside.enter_context(remembered(unwrap(self.model), moment))
            output = forward(**kwargs)
        for watch in watches:
            watch.stop(device)
        if plans:
            counts = torch.stack([port.fired for port in plans])
            for entry in run.acting:
                kind = Port if entry.control.bypass is None else Bypass
                mine = [(n, port) for n, port in enumerate(plans) if isinstance(port, kind)]
                fired = counts[[n for n, _ in mine], entry.number]
                ran = [port.entered for _, port in mine]
                entry.saw(step, [port.site for _, port in mine], fired, ran, self.caches)
        if run.appended and not run.riders:
            return with_sample(output, sample_of(output)[:rows])
        return output

    @contextlib.contextmanager
    def _again(self, plans: dict[Any, Any], step: Step) -> Iterator[None]:
        """A moment of a forward once more, for blocks that run again in backward."""
        with self._lock, self.interception.again(), self.phases.again(plans, step):
            yield


def _within_rounding(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 8 * torch.finfo(a.dtype).eps * a.abs().max())


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with their nested dicts copied, one level deep."""
    return {n: dict(v) if isinstance(v, dict) else v for n, v in arguments.items()}
