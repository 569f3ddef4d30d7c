"""Skipping modules: a block, its attention or its feed-forward, in part or whole.

Kept apart from ``intercept``: it swaps the classes of blocks, and does so only while a control asks
    for it, since
diffusers' caches look blocks up by class.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_control.call import Site, Step
from attn_control.errors import AttnControlError
from attn_control.families import Family, parameters


@dataclass(frozen=True, eq=False)
class BypassPlan:
    """What the module's output is replaced by: ``(1 - u) f(x) + u x`` for a block, ``(1 - u) f(x)``
    else.

    Attributes:
        u: float32 (), and touch: int64 (controls,); both change in place where sets are drawn.
        whole: the module need not run at all.
        rows: half-open range of the batch that is replaced, None for all of it.
        drawn: whether the module is left out at a step; None: at each.
    """

    kind: str
    u: Tensor
    whole: bool
    touch: Tensor
    strength: float
    rows: tuple[int, int] | None = None
    drawn: Callable[[Step], bool] | None = None
    number: int = 0

    def prepare(self, step: Step) -> None:
        """Before each forward, outside the graph: whether this step leaves the module out."""
        if self.drawn is not None:
            due = self.drawn(step)
            self.u.fill_(self.strength if due else 0.0)
            self.touch[self.number] = int(due)

    def mix(self, output: Tensor, skipped: Tensor | None) -> Tensor:
        """The output with its rows led to ``skipped``, or to zero."""
        part = output if self.rows is None else output[slice(*self.rows)]
        u = self.u.to(output.dtype)
        if skipped is None:
            part = part * (1 - u)
        else:
            part = torch.lerp(part, skipped if self.rows is None else skipped[slice(*self.rows)], u)
        if self.rows is None:
            return part
        first, last = self.rows
        return torch.cat([output[:first], part, output[last:]])


class Bypass:
    """The mutable end of a module that may be skipped; a stand-in for a port."""

    def __init__(self, site: Site, module: nn.Module, returns: tuple[str, ...]) -> None:
        self.site, self.module, self.returns = site, module, returns
        self.names = parameters(type(module))  # read once: traced code must not inspect
        self.plan: BypassPlan | None = None
        self.fired: Tensor | None = None
        self.entered = False
        self._outer: Bypass | None = None  # of another session, which recomputes meanwhile

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())  # a copied or pickled model is detached

    def install(self) -> None:
        self._outer = self.module.__dict__.get("_attn_control_bypass")
        self.module.__dict__["_attn_control_bypass"] = self
        if self._outer is None:
            cls: Any = type(self.module)
            self.module.__class__ = _bypassed_class(cls)

    def restore(self) -> None:
        if self._outer is not None:
            self.module.__dict__["_attn_control_bypass"] = self._outer
            return
        del self.module.__dict__["_attn_control_bypass"]
        self.module.__class__ = type(self.module)._attn_control_class

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """In place for the time being, if it is not."""
        if self.module.__dict__.get("_attn_control_bypass") is self:
            yield
            return
        self.install()
        try:
            yield
        finally:
            self.restore()

    def refuse_cached(self) -> None:
        """Raises AttnControlError where a step cache answers for whole blocks: what it adds at one
        block belongs to the others.
        """
        registry = self.module.__dict__.get("_diffusers_hook")
        names = [] if registry is None or self.site.module is self.module else list(registry.hooks)
        cached = [name for name in names if hasattr(registry.hooks[name], "state_manager")]
        if self.returns and cached:
            raise AttnControlError(
                f"SkipLayers: block {self.site.label} cannot be skipped while the step cache"
                f" {cached[0]!r} answers for blocks; expected what='attention', or no such cache"
            )

    def run(
        self, inner: Any, plan: BypassPlan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Execute and count."""
        if self.fired is not None:
            self.fired.add_(plan.touch)
        if plan.kind != "block":
            output = inner(self.module, *args, **kwargs)
            return _each(lambda value: plan.mix(value, None), output)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        skipped = tuple(given[name] for name in self.returns)
        if not plan.whole:
            output = inner(self.module, *args, **kwargs)
            output = output if isinstance(output, tuple) else (output,)
            skipped = tuple(
                None if y is None else plan.mix(y, x) for x, y in zip(skipped, output, strict=True)
            )
        return skipped if len(skipped) > 1 else skipped[0]


def _each(change: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(None if value is None else change(value) for value in output)
    return change(output)


def find_bypasses(model: nn.Module, family: Family, site: Site, kind: str) -> list[Bypass]:
    """The modules of the site's block that a kind of skip replaces."""
    path = site.name.rsplit(".", 1)[0]
    block = model.get_submodule(path)
    if kind == "block":
        returns = family.returned_by(path)
        if not returns:
            raise AttnControlError(
                f"attach: the block {path} of {family.name} cannot be skipped: it hands on what it"
                " was not given; expected what='attention'"
            )
        return [Bypass(site, block, returns)]
    if kind == "attention" and not family.attention_ends:
        return [Bypass(site, site.module, ())]
    if kind == "attention":
        ends = (getattr(block, name, None) for name in family.attention_ends)
        return [Bypass(site, end, ()) for end in ends if end is not None]
    found = [getattr(block, name, None) for name in family.feed_forward]
    modules = [module for module in found if isinstance(module, nn.Module)]
    if not modules:
        raise AttnControlError(f"attach: no feed-forward is known in {path} of {family.name}")
    return [Bypass(site, module, ()) for module in modules]


def skip_plan(
    control: Any,
    number: int,
    controls: int,
    device: torch.device,
    rows: tuple[int, int] | None = None,
    drawn: Callable[[Step], bool] | None = None,
) -> BypassPlan:
    """The plan of a skipping control, the ``number``-th of ``controls``.

    A module that is drawn anew at each step always runs: which ones are left out is then a tensor's
    value and no part of the graph.
    """
    touch = torch.zeros(controls, dtype=torch.int64, device=device)
    touch[number] = 1
    strength = float(control.u)
    whole = strength == 1 and rows is None and drawn is None
    u = torch.tensor(strength, device=device)
    return BypassPlan(control.bypass, u, whole, touch, strength, rows, drawn, number)


@functools.lru_cache(None)
def _bypassed_class(cls: Any) -> Any:
    inner = cls.__call__  # as a function: dynamo takes classes marked allow_in_graph for operators

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        # getattr: a checkpoint may call this again after the class is back to its own.
        bypass = getattr(self, "_attn_control_bypass", None)
        plan = None if bypass is None else bypass.plan
        if plan is None:
            return inner(self, *args, **kwargs)
        bypass.entered = True
        return bypass.run(inner, plan, args, kwargs)

    body = {
        "__call__": __call__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_attn_control_bypass": None,
        "_attn_control_class": cls,
    }
    return type(cls)(cls.__name__, (cls,), body)
