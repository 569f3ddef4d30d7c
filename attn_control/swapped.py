"""The class that a denoiser's is swapped for: at each call it asks what is attached to the model.

That happens in ``__call__``, outside any compiled graph and outside the hooks of diffusers and
accelerate, which live in ``forward``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._dynamo.eval_frame import set_eval_frame

from attn_control.families import unwrap
from attn_control.intercept import copied_as
from attn_control.recompute import refuse_traced


class _Context(threading.local):
    def __init__(self) -> None:
        self.name: str | None = None  # of diffusers' cache_context around the running call


context = _Context()


@torch.compiler.disable(recursive=False)  # skips this frame only, not what it calls
def _eagerly(
    model: Any,
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
        refuse_traced(model, compiler is not None)
        return call(compiled if compiler is not None else forward, args, kwargs)
    finally:
        set_eval_frame(compiler)


@functools.lru_cache(None)
def swapped_class(cls: Any) -> Any:
    """A subclass of the denoiser's class, by its name, that asks its Denoiser at each call."""

    @torch.compiler.disable(recursive=False)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        control = self.__dict__.get("_attn_control")
        forward = functools.partial(cls.__call__, self)
        return (
            forward(*args, **kwargs)
            if control is None
            else _eagerly(self, control.call, forward, args, kwargs)
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
            before = context.name
            context.name = name
            enter = (
                cls.cache_context
                if hasattr(cls, "cache_context")
                else type(self._orig_mod).cache_context
            )
            try:
                with enter(unwrap(self), name, **options):
                    yield
            finally:
                context.name = before

        body["cache_context"] = cache_context
    return type(cls)(cls.__name__, (cls,), body)
