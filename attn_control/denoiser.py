"""The denoiser under control: healing, step tracking, the main forward and the extra ones.

The denoiser's class is swapped for a subclass whose ``__call__`` does all this outside any compiled
graph and outside the hooks of diffusers and accelerate, which live in ``forward``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import set_eval_frame

from attn_control.call import Layout, Site, Step, sample_of, with_sample
from attn_control.entry import Entry
from attn_control.errors import AttnControlError
from attn_control.families import bind, family_of, slice_rows, unwrap
from attn_control.guidance import add_to_rows, difference
from attn_control.intercept import Interception, Port, copied_as
from attn_control.plan import Plan, PlanBuilder
from attn_control.report import Stopwatch
from attn_control.steps import StepTracker, calling_pipeline

MAX_STRUCTURES = 8
"""Plan structures kept at once: older phases and shapes are compiled again when they return."""

MAX_RUNS = 16
"""Runs whose last difference is kept: as many threads may share one model under split guidance."""


class _Context(threading.local):
    def __init__(self) -> None:
        self.name: str | None = None  # of diffusers' cache_context around the running call
        self.options: dict[str, Any] = {}


_context = _Context()


class Denoiser:
    """Everything that is attached to one denoiser module, shared by nested sessions."""

    def __init__(self, model: Any, component: str) -> None:
        self.model, self.component = model, component
        self._alone = StepTracker()
        self.family = family_of(model)
        self.interception = Interception(model, component)
        self.entries: list[Entry] = []
        self.step: Step | None = None
        self.plain, self.guided = Stopwatch(), Stopwatch()
        self._plans: dict[Any, tuple[dict[Port, Plan], Any]] = {}
        # By run: the difference of a split cond call, for the uncond call of the same step.
        self._kept: dict[int, tuple[int, Tensor]] = {}
        self._lock = threading.RLock()
        self.sessions: list[tuple[Any, list[Entry]]] = []

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
        self.model.__class__ = _controlled_class(cls)

    def restore(self) -> None:
        self.interception.restore()
        self.model.__dict__.pop("_attn_control", None)
        self.model.__class__ = type(self.model)._attn_control_class

    def set_entries(self, entries: list[Entry]) -> None:
        """The controls in force changed: forget what was compiled for the old ones."""
        self.entries = entries
        for number, entry in enumerate(entries):
            entry.number = number
        self.forget()
        for port in self.interception.ports:
            port.fired = None

    def forget(self) -> None:
        """Drop compiled plans and kept differences."""
        self._plans.clear()
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
                for entry in self.entries:
                    entry.proven = False
            active = [entry for entry in self.entries if not entry.control.idle]
            if not active:
                return forward(*args, **kwargs)
            try:
                return self._controlled(active, forward, args, kwargs)
            except BaseException:
                self.forget()
                raise
            finally:
                self._set({})

    def _controlled(
        self,
        active: list[Entry],
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        arguments = bind(self.model, args, kwargs)
        # Models pop from nested dicts while they run: keep what the extra forwards will need.
        spare = {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in arguments.items()
        }
        tracker = self._tracker()
        step = self.step = tracker.locate(self.family, arguments, _context.name)
        for entry in active:
            entry.begin(step, tracker.run)
        due = [entry for entry in active if entry.control.when.holds(step, str(entry.control))]
        in_place = [entry for entry in due if entry.control.guidance_scale is None]
        guides = [entry for entry in due if entry.control.guidance_scale is not None]
        if (
            due
            and torch.is_grad_enabled()
            and getattr(self.model, "is_gradient_checkpointing", False)
        ):
            raise AttnControlError(
                f"{due[0].control}: gradient checkpointing runs attention again in backward, when"
                " the control is no longer in force; call model.disable_gradient_checkpointing()"
            )

        output = self._forward(forward, args, kwargs, in_place, arguments, step, [self.plain])
        if not guides:
            return output
        sample = sample_of(output)
        rows = step.rows("cond")
        if rows is None:
            return with_sample(output, add_to_rows(sample, self._kept_delta(step)))
        delta = None
        for entry in guides:
            part = self._difference(entry, forward, spare, in_place, sample, rows, step)
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
                " call;"
                " this order of split guidance is not supported"
            )
        return delta

    def _difference(
        self,
        entry: Entry,
        forward: Callable[..., Any],
        spare: dict[str, Any],
        in_place: list[Entry],
        sample: Tensor,
        rows: tuple[int, int],
        step: Step,
    ) -> Tensor:
        """One extra forward with the entry's perturbation; its difference for the cond rows."""
        extra = slice_rows(self.family, spare, rows)
        sliced = extra is not None
        extra = extra or spare
        extra = {n: dict(v) if isinstance(v, dict) else v for n, v in extra.items()}
        with self._branch_context(f"perturbed:{entry.number}"):
            output = self._forward(
                forward, (), extra, [*in_place, entry], extra, step, [self.guided, entry.watch]
            )
        perturbed = sample_of(output)
        if not sliced:
            perturbed = perturbed[rows[0] : rows[1]]
        cond = sample[rows[0] : rows[1]]
        if not entry.moved:
            same = torch.equal(cond, perturbed)
            fewer = sliced and len(cond) < len(sample)
            if not same and fewer and _within_rounding(cond, perturbed):
                # Fewer rows round differently: compare with the same rows, unperturbed.
                again = {n: dict(v) if isinstance(v, dict) else v for n, v in extra.items()}
                with self._branch_context(f"perturbed:{entry.number}"):
                    unperturbed = self._forward(forward, (), again, in_place, again, step, [])
                same = torch.equal(sample_of(unperturbed), perturbed)
            if same:
                raise AttnControlError(
                    f"{entry.control}: its perturbation ran but the prediction did not change at"
                    f" step {step.index};"
                    " expected other heads, tokens or a larger u"
                )
            entry.moved = True
        assert entry.control.guidance_scale is not None
        return difference(cond, perturbed, entry.control.guidance_scale)

    def _forward(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        acting: list[Entry],
        arguments: dict[str, Any],
        step: Step,
        watches: list[Stopwatch],
    ) -> Any:
        plans = self._compile(acting, arguments) if acting else {}
        self._set(plans)
        device = arguments[self.family.sample].device
        for watch in watches:
            watch.start(device)
        output = forward(*args, **kwargs)
        for watch in watches:
            watch.stop(device)
        if plans:
            counts = torch.stack([port.fired for port in plans if port.fired is not None])
            for entry in acting:
                entry.saw(step, [port.site for port in plans], counts[:, entry.number])
        return output

    def _set(self, plans: dict[Port, Plan]) -> None:
        for port in self.interception.ports:
            port.plan = plans.get(port)
            if port.plan is not None and port.fired is not None:
                port.fired.zero_()

    def _compile(self, acting: list[Entry], arguments: dict[str, Any]) -> dict[Port, Plan]:
        """The plans of one phase and shape; compiled once, then looked up."""
        sample: Tensor = arguments[self.family.sample]
        shapes = tuple((n, tuple(v.shape)) for n, v in arguments.items() if isinstance(v, Tensor))
        # FLUX tells image from reference by the values of its position ids. Their identity stands
        # for the values: kept beside the plans, it cannot be given to another tensor.
        ids = arguments.get("img_ids")
        numbers = tuple(entry.number for entry in acting)
        key = (numbers, shapes, sample.device, sample.dtype, id(ids))
        if key not in self._plans:
            if len(self._plans) == MAX_STRUCTURES:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = self._build(acting, arguments, sample.device), ids
        return self._plans[key][0]

    def _build(
        self, acting: list[Entry], arguments: dict[str, Any], device: torch.device
    ) -> dict[Port, Plan]:
        model = unwrap(self.model)
        plans = {}
        for port in self.interception.ports:
            selecting = [entry for entry in acting if port.site in entry.heads]
            if not selecting:
                continue
            layout: Layout = self.family.layout(port.site, arguments, model)
            builder = PlanBuilder(len(self.entries), device)
            for entry in selecting:
                entry.control.check(port.site, layout)
                entry.control.contribute(
                    builder, entry.number, layout, entry.heads[port.site], None
                )
            plan = builder.build()
            if plan is not None:
                plans[port] = plan
                if port.fired is None or port.fired.device != device:
                    port.fired = torch.zeros(len(self.entries), dtype=torch.int64, device=device)
        return plans

    @contextlib.contextmanager
    def _branch_context(self, name: str) -> Iterator[None]:
        """A cache context of our own: step caches must not mix branches. The outer is put back."""
        outer, options = _context.name, _context.options
        enter = getattr(unwrap(self.model), "cache_context", None)
        if outer is None or enter is None:
            yield
            return
        with enter(name, **options):
            yield
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        # cache_context does not nest: leaving ours has cleared the pipeline's.
        _set_cache_context(unwrap(self.model), CacheContext(outer, **options))
        _context.name, _context.options = outer, options


def _within_rounding(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 8 * torch.finfo(a.dtype).eps * a.abs().max())


@torch.compiler.disable(recursive=False)  # skips this frame only, not what it calls
def _eagerly(
    call: Callable[..., Any],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run our own Python outside dynamo, and the denoiser's forward inside it, whoever compiled
    what and when.

    ``torch.compile(attached_model)`` makes our ``__call__`` the root of its trace; the pair of
    switches keeps steps, windows and locks out of the graph without hiding the forward from the
    compiler.
    """
    compiler = set_eval_frame(None)

    def compiled(*inner: Any, **named: Any) -> Any:
        set_eval_frame(compiler)
        try:
            return forward(*inner, **named)
        finally:
            set_eval_frame(None)

    try:
        return call(compiled if compiler is not None else forward, args, kwargs)
    finally:
        set_eval_frame(compiler)


@functools.lru_cache(None)
def _controlled_class(cls: Any) -> Any:
    """A subclass of the denoiser's class, by its name, that asks its Denoiser at each call."""

    @torch.compiler.disable(recursive=False)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        control: Denoiser | None = self.__dict__.get("_attn_control")
        forward = functools.partial(cls.__call__, self)
        return (
            forward(*args, **kwargs)
            if control is None
            else _eagerly(control.call, forward, args, kwargs)
        )

    body: dict[str, Any] = {
        "__call__": __call__,
        "__reduce_ex__": copied_as(cls),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_attn_control_class": cls,
    }
    if hasattr(cls, "cache_context") or issubclass(cls, torch._dynamo.OptimizedModule):

        @contextlib.contextmanager
        def cache_context(self: Any, name: str, **options: Any) -> Iterator[None]:
            before = _context.name, _context.options
            _context.name, _context.options = name, options
            enter = (
                cls.cache_context
                if hasattr(cls, "cache_context")
                else type(self._orig_mod).cache_context
            )
            try:
                with enter(unwrap(self), name, **options):
                    yield
            finally:
                _context.name, _context.options = before

        body["cache_context"] = cache_context
    return type(cls)(cls.__name__, (cls,), body)


_trackers: weakref.WeakKeyDictionary[Any, StepTracker] = weakref.WeakKeyDictionary()


def tracker_of(pipe: Any) -> StepTracker:
    """One tracker a pipeline: its two denoisers (Wan 2.2) walk through the same steps."""
    return _trackers.setdefault(pipe, StepTracker(pipe))
