"""Attention of transformers' models under watch, from ``install`` to ``restore``.

Their attention modules have no processor: each asks ``ALL_ATTENTION_FUNCTIONS``, a name of its own
module, for the function that its config names. That name is replaced by an interface that hands out
the same functions, each looking first for the port of the module that it is called with. The config
stays as it is: masks, which transformers builds by the name in it, are the model's own, as is
whatever implementation the user chose or will choose.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from attn_control.call import Call, heads_of
from attn_control.errors import AttnControlError
from attn_control.families import family_of, find_sites
from attn_control.softmax import Port, patch, release, unpatch

INTERFACE, EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"
"""The names in a model's module. The second is what some take without asking the interface."""
_WINDOWED_BY_MASK = ("eager_attention_forward", "sdpa_attention_forward")
_BESIDES = ("softcap", "s_aux", "position_bias", "cache")


class Watched:
    """An attention function of transformers that looks for a port, and without a plan passes on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """query: (batch, heads, queries, head_dim), key and value of as many heads or fewer;
        returns the output (batch, queries, heads, head_dim) and the weights, or None.
        """
        port = module.__dict__.get("_attn_control_port")
        if port is not None:
            port.entered = True
        if port is None or port.plan is None:
            return self.function(module, query, key, value, attention_mask, *args, **kwargs)
        each = query.shape[1] // key.shape[1]

        def original(heads: tuple[int, ...] | None = None) -> Tensor:
            q, k, v, mask = query, key, value, attention_mask
            shared = sorted({head // each for head in heads or ()})
            whole = tuple(head for kv in shared for head in range(kv * each, (kv + 1) * each))
            if heads is not None and whole == heads and not besides:
                q, mask = (heads_of(x, heads, query.shape[1], 1) for x in (q, mask))
                k, v = k[:, shared], v[:, shared]
                heads = None
            out = self.function(module, q, k, v, mask, *args, **kwargs)[0].transpose(1, 2)
            return out if heads is None else out[:, list(heads)]

        besides = _besides(self.function, attention_mask, args, kwargs)
        mask = attention_mask if isinstance(attention_mask, Tensor) else None
        call = Call(
            port.site,
            "main",
            query,
            key,
            value,
            mask,
            kwargs.get("scaling"),
            original,
            attention_mask is None and self._causal(module, kwargs, query.shape[2]),
            besides,
        )
        return port.plan.run(call, port.fired).transpose(1, 2).contiguous(), None

    def _causal(self, module: Any, kwargs: dict[str, Any], queries: int) -> bool:
        """Whether no mask means a causal one: never to the models' own eager functions."""
        if _name(self.function) == EAGER or queries == 1:
            return False
        said = kwargs.get("is_causal")
        return bool(getattr(module, "is_causal", True) if said is None else said)


def _besides(
    function: Callable[..., Any], mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """What a call does to its scores or weights that a mask of pairs does not say, if anything."""
    if args:
        return f"arguments without a name ({len(args)})"
    if mask is not None and not isinstance(mask, Tensor):
        return f"a mask that is a {type(mask).__name__}"
    if kwargs.get("dropout"):
        return f"dropout {kwargs['dropout']}"
    if kwargs.get("sliding_window") is not None and _name(function) not in _WINDOWED_BY_MASK:
        return "a sliding window of its implementation's own"
    return next((name for name in _BESIDES if kwargs.get(name) is not None), "")


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "")


def _watched(function: Callable[..., Any]) -> Watched:
    return function if isinstance(function, Watched) else Watched(function)


def _interface(own: Any) -> Any:
    """An interface that shares all that ``own`` knows, and hands it out under watch."""
    cls: Any = type(own)

    class WatchedInterface(cls):  # type: ignore[misc]
        def __getitem__(self, name: str) -> Watched:
            return _watched(super().__getitem__(name))

        def get_interface(self, name: str, default: Callable[..., Any]) -> Watched:
            return _watched(super().get_interface(name, default))

    made = object.__new__(WatchedInterface)
    made.__dict__ = own.__dict__
    return made


def _replaced(names: dict[str, Any]) -> dict[str, Any]:
    """What stands in place of a module's names while it is watched."""
    if INTERFACE not in names:
        return {}
    found = {INTERFACE: _interface(names[INTERFACE])}
    if EAGER in names:
        found[EAGER] = _watched(names[EAGER])
    return found


class InterfaceInterception:
    """As `Interception`, of a model whose attention runs through transformers' interface."""

    def __init__(self, model: nn.Module, component: str) -> None:
        family = family_of(model)
        self.ports = [Port(site, family.parts(site)) for site in find_sites(model, component)]
        self.notes: list[str] = []
        self._modules: list[str] = []

    def install(self) -> None:
        """Raises AttnControlError for attention that does not ask the interface."""
        for port in self.ports:
            if port.site.module.__dict__.get("_attn_control_port") is not None:
                raise AttnControlError(
                    f"attach: {port.site.name} is attached already, as a part of another object;"
                    " attach to the same object"
                )
        self._patch()
        for port in self.ports:
            port.site.module.__dict__["_attn_control_port"] = port

    def _patch(self) -> None:
        for cls in dict.fromkeys(type(port.site.module) for port in self.ports):
            done = patch(cls, _replaced)
            self._modules += done
            if not done:
                raise AttnControlError(
                    f"attach: {cls.__module__}.{cls.__name__} does not run its attention through"
                    f" transformers' attention interface: expected the name {INTERFACE} in its"
                    " module"
                )

    def heal(self) -> bool:
        """As `Interception.heal`: there is nothing that others replace."""
        return False

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """As `Interception.again`."""
        spaces = [port.site.module.__dict__ for port in self.ports]
        before = [space.get("_attn_control_port") for space in spaces]
        installed = bool(self._modules)
        try:
            if not installed:
                self._patch()
                for space, port in zip(spaces, self.ports, strict=True):
                    space["_attn_control_port"] = port
            yield
        finally:
            if not installed:
                self.restore()
                for space, mine in zip(spaces, before, strict=True):
                    if mine is not None:
                        space["_attn_control_port"] = mine

    def restore(self) -> None:
        """Give every module its names back."""
        unpatch(self._modules)
        self._modules = []
        release(self.ports)
