"""The softmax under watch: the two names through which processors reach it, and what stands there.

``dispatch_attention_fn`` and ``F``, in the processors' own modules, are replaced by versions that
look for the port of the running processor and pass straight through when there is none.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from attn_control.call import Call, Site, heads_of
from attn_control.families import EVERY
from attn_control.plan import Plan, PlanSeries

lock = threading.RLock()


class _Local(threading.local):
    def __init__(self) -> None:
        self.port: Port | None = None
        self.index = 0  # number of the softmax within the running processor call


local = _Local()


class Port:
    """The mutable end of a site: the plan in force, and the counter that proves it ran."""

    def __init__(self, site: Site, parts: tuple[str, ...]) -> None:
        self.site = site
        self.main = None if parts == EVERY else parts.index("main")
        self.plan: Plan | PlanSeries | None = None
        self.fired: Tensor | None = None
        self.entered = (
            False  # its processor ran in this forward; written in traced code, never read
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())  # a copied or pickled model is detached


def _active() -> tuple[Port, Plan] | None:
    """The port whose plan governs the softmax about to run, or None to pass through."""
    port = local.port
    if port is None:
        return None
    index = local.index
    local.index = index + 1
    if port.plan is None or port.main not in (None, index):
        return None
    plan = port.plan.at(index)
    return None if plan is None else (port, plan)


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
    def original(heads: tuple[int, ...] | None = None) -> Tensor:
        q, k, v, mask = query, key, value, attn_mask
        if heads is not None:
            q, k, v, mask = (heads_of(x, heads, query.shape[1], 1) for x in (q, k, v, mask))
        # Looked up now: others (SageAttention, say) may have put theirs there.
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    active = _active()
    if active is None:
        return original()
    port, plan = active
    call = Call(port.site, "main", query, key, value, attn_mask, scale, original, is_causal)
    return plan.run(call, port.fired)


def _watched_dispatch(dispatch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(dispatch)
    def dispatch_attention_fn(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        active = _active()
        if active is None:
            return dispatch(query, key, value, *args, **kwargs)

        mask = args[0] if args else kwargs.get("attn_mask")

        def original(heads: tuple[int, ...] | None = None) -> Tensor:
            if heads is None:
                return dispatch(query, key, value, *args, **kwargs).transpose(1, 2)
            total = query.shape[2]
            some = [heads_of(x, heads, total, 2) for x in (query, key, value)]
            cut = heads_of(mask, heads, total, 1)
            if args:
                return dispatch(*some, cut, *args[1:], **kwargs).transpose(1, 2)
            return dispatch(*some, **{**kwargs, "attn_mask": cut}).transpose(1, 2)

        port, plan = active
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        causal = bool(args[2] if len(args) > 2 else kwargs.get("is_causal"))
        call = Call(port.site, "main", q, k, v, mask, kwargs.get("scale"), original, causal)
        return plan.run(call, port.fired).transpose(1, 2)

    return dispatch_attention_fn


def _functional() -> types.ModuleType:
    """``torch.nn.functional`` with one name replaced. A copy, so that names cost nothing more."""
    module = types.ModuleType("torch.nn.functional")
    module.__dict__.update(vars(torch.nn.functional))
    module.scaled_dot_product_attention = _watched_sdpa  # type: ignore[attr-defined]
    return module


_F = _functional()
patched: dict[str, tuple[dict[str, Any], int]] = {}  # module name -> (names to put back, users)


def _replaced(names: dict[str, Any]) -> dict[str, Any]:
    """What stands in place of a processors' module's names while it is watched."""
    found: dict[str, Any] = {}
    if "dispatch_attention_fn" in names:
        found["dispatch_attention_fn"] = _watched_dispatch(names["dispatch_attention_fn"])
    if names.get("F") is torch.nn.functional:
        found["F"] = _F
    return found


def patch(cls: type, replaced: Callable[[dict[str, Any]], dict[str, Any]] = _replaced) -> list[str]:
    """Redirect the softmax names in the modules the class comes from; returns those modules.

    replaced: from a module's names to those that change.
    """
    names = {base.__module__ for base in cls.__mro__} - {"builtins", "torch.nn.modules.module"}
    done = []
    with lock:
        for name in names:
            module: Any = sys.modules.get(name)
            if module is None:
                continue
            saved, users = patched.get(name, ({}, 0))
            if not users:
                for attribute, value in replaced(vars(module)).items():
                    saved[attribute] = getattr(module, attribute)
                    setattr(module, attribute, value)
            if saved:
                patched[name] = (saved, users + 1)
                done.append(name)
    return done


def unpatch(names: list[str]) -> None:
    with lock:
        for name in names:
            saved, users = patched[name]
            if users > 1:
                patched[name] = (saved, users - 1)
                continue
            del patched[name]
            for attribute, value in saved.items():
                setattr(sys.modules[name], attribute, value)


def release(ports: Iterable[Port]) -> None:
    """Take the plans off ports, and the ports off their modules where they are still there."""
    for port in ports:
        port.plan = None
        if port.site.module.__dict__.get("_attn_control_port") is port:
            del port.site.module.__dict__["_attn_control_port"]
