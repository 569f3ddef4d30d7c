"""The only file that knows how diffusers runs attention.

Every processor's class is swapped for a subclass of itself (same name, same signature,
``isinstance`` kept) that publishes the port of the ``attn`` it was called with in a
``threading.local``. The names through which processors reach the softmax, ``dispatch_attention_fn``
and ``F`` in their own module, are replaced by versions that look for that port and pass straight
through when there is none. Class swaps, not hooks: dynamo does not guard hooks, so a hook would be
lost after compile.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attn_control.call import Call, Site
from attn_control.errors import AttnControlError
from attn_control.families import EVERY, family_of, find_sites, unwrap
from attn_control.parallel import refuse_spread_heads
from attn_control.plan import Plan, PlanBuilder
from attn_control.processors.control import Control

_lock = threading.RLock()


class _Local(threading.local):
    def __init__(self) -> None:
        self.port: Port | None = None
        self.index = 0  # number of the softmax within the running processor call


_local = _Local()


class Port:
    """The mutable end of a site: the plan in force, and the counter that proves it ran."""

    def __init__(self, site: Site, parts: tuple[str, ...]) -> None:
        self.site = site
        self.main = None if parts == EVERY else parts.index("main")
        self.plan: Plan | None = None
        self.fired: Tensor | None = None
        self.entered = (
            False  # its processor ran in this forward; written in traced code, never read
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())  # a copied or pickled model is detached


def _active() -> tuple[Port, Plan] | None:
    """The port whose plan governs the softmax about to run, or None to pass through."""
    port = _local.port
    if port is None:
        return None
    index = _local.index
    _local.index = index + 1
    plan = port.plan
    if plan is None or port.main not in (None, index):
        return None
    return port, plan


def _watched_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    def original() -> Tensor:
        # Looked up now: others (SageAttention, say) may have put theirs there.
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    active = _active()
    if active is None:
        return original()
    port, plan = active
    call = Call(port.site, "main", query, key, value, attn_mask, scale, original)
    return plan.run(call, port.fired)


def _watched_dispatch(dispatch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(dispatch)
    def dispatch_attention_fn(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        active = _active()
        if active is None:
            return dispatch(query, key, value, *args, **kwargs)

        def original() -> Tensor:
            return dispatch(query, key, value, *args, **kwargs).transpose(1, 2)

        port, plan = active
        mask = args[0] if args else kwargs.get("attn_mask")
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        call = Call(port.site, "main", q, k, v, mask, kwargs.get("scale"), original)
        return plan.run(call, port.fired).transpose(1, 2)

    return dispatch_attention_fn


def _functional() -> types.ModuleType:
    """``torch.nn.functional`` with one name replaced. A copy, so that names cost nothing more."""
    module = types.ModuleType("torch.nn.functional")
    module.__dict__.update(vars(torch.nn.functional))
    module.scaled_dot_product_attention = _watched_sdpa  # type: ignore[attr-defined]
    return module


_F = _functional()
_patched: dict[str, tuple[dict[str, Any], int]] = {}  # module name -> (names to put back, users)


def _patch(cls: type) -> list[str]:
    """Redirect the softmax names in the modules the class comes from; returns those modules."""
    names = {base.__module__ for base in cls.__mro__} - {"builtins", "torch.nn.modules.module"}
    done = []
    with _lock:
        for name in names:
            module: Any = sys.modules.get(name)
            if module is None:
                continue
            saved, users = _patched.get(name, ({}, 0))
            if not users:
                if "dispatch_attention_fn" in vars(module):
                    saved["dispatch_attention_fn"] = module.dispatch_attention_fn
                    module.dispatch_attention_fn = _watched_dispatch(module.dispatch_attention_fn)
                if vars(module).get("F") is torch.nn.functional:
                    saved["F"] = module.F
                    module.F = _F
            if saved:
                _patched[name] = (saved, users + 1)
                done.append(name)
    return done


def _unpatch(names: list[str]) -> None:
    with _lock:
        for name in names:
            saved, users = _patched[name]
            if users > 1:
                _patched[name] = (saved, users - 1)
                continue
            del _patched[name]
            for attribute, value in saved.items():
                setattr(sys.modules[name], attribute, value)


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
        port, index = _local.port, _local.index
        _local.port = self._attn_control_port or getattr(attn, "_attn_control_port", None)
        _local.index = 0
        if _local.port is not None:
            _local.port.entered = True
        try:
            return cls.__call__(self, attn, *args, **kwargs)
        finally:
            _local.port, _local.index = port, index

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
            self._modules += _patch(cls)
            try:
                processor.__class__ = _watched_class(cls)
            except TypeError as error:
                raise AttnControlError(
                    f"attach: the processor {cls.__name__} of {port.site.name} cannot be watched:"
                    f" {error}"
                ) from None
        else:
            self._modules += _patch(type(processor)._attn_control_class)
        self._held[id(processor)] = processor
        with _lock:
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
        with _lock:
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
        _unpatch(self._modules)
        self._modules = []
        for port in self.ports:
            port.plan = None
            if port.site.module.__dict__.get("_attn_control_port") is port:
                del port.site.module.__dict__["_attn_control_port"]


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
        modules = _patch(cls)
        fresh.__class__ = _watched_class(cls)
        port = Port(site, family.parts(site))
        port.plan = builder.build()
        fresh._attn_control_port = port
        weakref.finalize(fresh, _unpatch, modules)
        result[key] = fresh
    return result
