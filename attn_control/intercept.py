"""Which processors are under watch, from ``install`` to ``restore``.

Every processor's class is swapped for a subclass of itself (same name, same signature,
``isinstance`` kept) that publishes the port of the ``attn`` it was called with in a
``threading.local``; ``softmax`` looks for it there. Class swaps, not hooks: dynamo does not guard
hooks, so a hook would be lost after compile.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from attn_control.errors import AttnControlError
from attn_control.families import family_of, find_sites, unwrap
from attn_control.parallel import refuse_spread_heads
from attn_control.plan import PlanBuilder
from attn_control.processors.control import Control
from attn_control.softmax import Port, local, lock, patch, release, unpatch


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)  # pickle refuses copyreg's own for another class than ours


def copied_as(cls: type) -> Callable[[Any, Any], Any]:
    """A ``__reduce_ex__`` for a swapped class: copies and pickles are of the original class."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        make, args, *rest = cls.__reduce_ex__(self, protocol)
        own = type(self)
        args = tuple(cls if value is own else value for value in args)
        make = _new if make is copyreg.__newobj__ else make  # type: ignore[attr-defined]
        return (cls if make is own else make, args, *rest)

    return __reduce_ex__


@functools.lru_cache(None)
def _watched_class(cls: Any) -> Any:
    """The subclass that publishes the port. It looks, and constructs, like ``cls``."""

    @functools.wraps(cls.__call__)
    def __call__(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        port, index = local.port, local.index
        local.port = self._attn_control_port or getattr(attn, "_attn_control_port", None)
        local.index = 0
        if local.port is not None:
            local.port.entered = True
        try:
            return cls.__call__(self, attn, *args, **kwargs)
        finally:
            local.port, local.index = port, index

    body = {
        "__call__": __call__,
        "__reduce_ex__": copied_as(cls),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_attn_control_port": None,
        "_attn_control_class": cls,
    }
    return type(cls)(cls.__name__, (cls,), body)


def _is_watched(processor: Any) -> bool:
    return "_attn_control_class" in type(processor).__dict__


def _refuse_made(port: Port) -> None:
    processor = port.site.module.processor
    if _is_watched(processor) and processor._attn_control_port is not None:
        raise AttnControlError(
            f"attach: {port.site.name} runs a processor made by .processors(); put the model's own"
            " processors back first, and pass all controls to attach"
        )


class Interception:
    """Ports on every site of one model, from ``install`` to ``restore``."""

    def __init__(self, model: nn.Module, component: str) -> None:
        family = family_of(model)
        refuse_spread_heads(unwrap(model))
        self.ports = [Port(site, family.parts(site)) for site in find_sites(model, component)]
        self.notes: list[str] = []
        self._held: dict[int, Any] = {}
        self._modules: list[str] = []

    def install(self) -> None:
        for port in self.ports:
            _refuse_made(port)
            if port.site.module.__dict__.get("_attn_control_port") is not None:
                raise AttnControlError(
                    f"attach: {port.site.name} is attached already, as a part of another object (a"
                    " compiled model and the model inside it); attach to the same object"
                )
        for port in self.ports:
            port.site.module.__dict__["_attn_control_port"] = port
            self._hold(port)

    def _hold(self, port: Port) -> None:
        processor = port.site.module.processor
        if id(processor) in self._held:
            return
        _refuse_made(port)
        if not _is_watched(processor):
            cls: Any = type(processor)
            self._modules += patch(cls)
            try:
                processor.__class__ = _watched_class(cls)
            except TypeError as error:
                raise AttnControlError(
                    f"attach: the processor {cls.__name__} of {port.site.name} cannot be watched:"
                    f" {error}"
                ) from None
        else:
            self._modules += patch(type(processor)._attn_control_class)
        self._held[id(processor)] = processor
        with lock:
            _users[id(processor)] = _users.get(id(processor), 0) + 1

    def heal(self) -> bool:
        """Take in processors that replaced ours since the last call (adapters, user code).

        Returns whether there were any.
        """
        healed = False
        for port in self.ports:
            processor = port.site.module.processor
            if id(processor) not in self._held:
                healed = True
                self.notes.append(
                    f"{port.site.name}: its processor was replaced by {type(processor).__name__};"
                    " healed"
                )
                self._hold(port)
        return healed

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Installed for the time being, beside whatever else is, if it is not."""
        if self._held:
            yield
            return
        spaces = [port.site.module.__dict__ for port in self.ports]
        before = [space.get("_attn_control_port") for space in spaces]
        try:
            for space, port in zip(spaces, self.ports, strict=True):
                space["_attn_control_port"] = port
                self._hold(port)
            yield
        finally:
            self.restore()
            for space, port in zip(spaces, before, strict=True):
                if port is not None:
                    space["_attn_control_port"] = port

    def restore(self) -> None:
        """Give every processor its own class back, and every module its names."""
        with lock:
            for key, processor in self._held.items():
                _users[key] -= 1
                if not _users[key]:
                    del _users[key]
                    processor.__class__ = type(processor)._attn_control_class
            for port in self.ports:  # loaders make new ones of the class they find, ours
                processor = port.site.module.processor
                if _is_watched(processor) and id(processor) not in _users:
                    if processor._attn_control_port is None:
                        processor.__class__ = type(processor)._attn_control_class
        self._held.clear()
        unpatch(self._modules)
        self._modules = []
        release(self.ports)


_users: dict[
    int, int
] = {}  # id of a watched processor -> interceptions that hold it (and keep it alive)


def processors_for(model: Any, control: Control) -> dict[str, Any]:
    """What ``Control.processors`` returns: the selected sites' processors run the control."""
    if not hasattr(model, "attn_processors"):
        raise AttnControlError(
            f"{control}: {type(model).__name__} has no attn_processors; use: with attach(pipe,"
            f" {control}): pipe(...)"
        )
    family, sites = family_of(model), find_sites(model, "transformer")
    if control.made_for is not None:
        control.made_for.check(control, family.name, sites)
    chosen = {site.name: (site, heads) for site, heads in control.select(sites).items()}
    result = dict(model.attn_processors)
    for key, processor in result.items():
        site, heads = chosen.get(key.removesuffix(".processor"), (None, ()))
        if site is None or control.idle:
            continue
        if _is_watched(processor):
            raise AttnControlError(
                f"{control}: {site.name} is under attach() or .processors() already; undo that"
                " first"
            )
        builder = PlanBuilder(1, site, torch.device("cpu"))
        control.contribute(builder, 0, None, heads, None)
        fresh = copy.copy(processor)
        cls: Any = type(processor)
        modules = patch(cls)
        fresh.__class__ = _watched_class(cls)
        port = Port(site, family.parts(site))
        port.plan = builder.build()
        fresh._attn_control_port = port
        weakref.finalize(fresh, unpatch, modules)
        result[key] = fresh
    return result
