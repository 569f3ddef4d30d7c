"""Gradient checkpointing: what runs again in backward runs under the plans of its forward.

By then the step is another one, other plans may be in force, or the session may be over. Blocks
are checkpointed through ``_gradient_checkpointing_func``, which is replaced for the time of a
forward by one that remembers the moment with each block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from attn_control.errors import AttnControlError

Moment = Callable[[], contextlib.AbstractContextManager[None]]
"""Puts plans in force again, for as long as its context lasts."""


@contextlib.contextmanager
def remembered(model: nn.Module, moment: Moment) -> Iterator[None]:
    """While it lasts, blocks that ``model`` checkpoints will run again inside ``moment()``."""
    changed: list[tuple[Any, Any]] = []
    made: dict[int, Any] = {}
    for module in model.modules():
        original = module.__dict__.get("_gradient_checkpointing_func")
        if original is None or not getattr(module, "gradient_checkpointing", False):
            continue
        changed.append((module, original))
        wrapped = made.setdefault(id(original), _remembering(original, moment))
        module.__dict__["_gradient_checkpointing_func"] = wrapped
    try:
        yield
    finally:
        for module, original in changed:
            module.__dict__["_gradient_checkpointing_func"] = original


def _remembering(checkpoint: Callable[..., Any], moment: Moment) -> Callable[..., Any]:
    def gradient_checkpointing_func(function: Callable[..., Any], *args: Any) -> Any:
        first = True

        def run(*inner: Any) -> Any:
            nonlocal first
            if first:  # the forward itself: everything is in place
                first = False
                return function(*inner)
            with moment():
                return function(*inner)

        return checkpoint(run, *args)

    return gradient_checkpointing_func


def refuse_in_backward(name: str) -> None:
    """Raises AttnControlError inside a backward pass: the sampler has moved on since the forward,
    and nothing tells at which step that was.
    """
    if torch._C._current_graph_task_id() != -1:
        raise AttnControlError(
            f"attach: {name} was called again in backward, as a whole; checkpoint its blocks"
            " instead, with enable_gradient_checkpointing()"
        )


def refuse_traced(model: nn.Module, compiling: bool) -> None:
    """Raises AttnControlError for checkpoints inside a graph: dynamo lets nothing in them publish
    what the processors do.
    """
    if not torch.is_grad_enabled():
        return
    inner: Any = getattr(model, "_orig_mod", model)
    whole = compiling or inner is not model or inner._compiled_call_impl is not None
    if whole and getattr(inner, "is_gradient_checkpointing", False):
        raise AttnControlError(
            f"attach: gradient checkpointing inside a compiled {type(inner).__name__} cannot be"
            " traced; compile its blocks alone, with compile_repeated_blocks()"
        )
