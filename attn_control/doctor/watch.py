"""What attention was asked and what it answered, seen from outside the package.

The observer finds out which module asks with forward hooks, and stands between a processor and
whatever it calls, ours included: it sees the q, k and v that the processor hands in and the output
that it gets back. It shares no code with ``intercept`` or the kernels.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Softmax:
    """One call. Tensors are (batch, heads, tokens, head_dim), on "meta" where they were not kept.

    out: what the processor got back; plain: what the untouched function answers to the same
    arguments, None where nothing was kept; mask: as it was given; scale: None for the usual one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    plain: Tensor | None
    mask: Any
    scale: float | None
    causal: bool


@contextmanager
def softmaxes(model: nn.Module, keep: tuple[str, ...] = ()) -> Iterator[dict[str, list[Softmax]]]:
    """Every softmax by the name of the attention module that asked for it, in order of execution.

    Enter after ``attach``: what is entered last stands nearest to the processor. Tensors are kept,
    and the plain answer is computed, for the modules in ``keep`` only: all sites of a large model
    would fill the memory.
    """
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    sdpa = torch.nn.functional.scaled_dot_product_attention
    seen: dict[str, list[Softmax]] = {}
    asking: list[str] = []
    undo: list[Callable[[], None]] = []

    def note(untouched: Any, swap: bool, inner: Any, *args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        if asking:
            given = _named(args, kwargs)
            plain = untouched(*args, **kwargs) if asking[-1] in keep else None
            tensors = [given["query"], given["key"], given["value"], out, plain]
            if swap:
                tensors = [None if t is None else t.transpose(1, 2) for t in tensors]
            if plain is None:
                tensors = [None if t is None else t.to("meta") for t in tensors]
            q, k, v, answer, answer_plain = tensors
            seen.setdefault(asking[-1], []).append(
                Softmax(
                    q,
                    k,
                    v,
                    answer.clone() if plain is not None else answer,
                    answer_plain,
                    given.get("attn_mask") if plain is not None else None,
                    given.get("scale"),
                    bool(given.get("is_causal", False)),
                )
            )
        return out

    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if not callable(processor):
            continue
        enter = module.register_forward_pre_hook(lambda m, a, name=name: asking.append(name))
        leave = module.register_forward_hook(
            lambda m, a, o: asking.pop() and None, always_call=True
        )
        undo += [enter.remove, leave.remove]
        for home in _homes(type(processor)):
            undo += _stand_between(home, note, dispatch_attention_fn, sdpa)
    try:
        yield seen
    finally:
        for put_back in reversed(undo):
            put_back()


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _homes(cls: type) -> list[Any]:
    """The modules that a processor's class and its bases come from."""
    found = (sys.modules.get(base.__module__) for base in cls.__mro__)
    return [module for module in dict.fromkeys(found) if module is not None]


def _stand_between(home: Any, note: Any, dispatch: Any, sdpa: Any) -> list[Callable[[], None]]:
    """Put the observer before the functions through which a module's processors reach the softmax,
    once; returns how to take it away.
    """
    names, undo = vars(home), []

    def put(name: str, value: Any) -> None:
        before = names[name]
        value._doctor = True
        setattr(home, name, value)
        undo.append(lambda: setattr(home, name, before))

    def between(untouched: Any, inner: Any, swap: bool) -> Any:
        return lambda *args, **kwargs: note(untouched, swap, inner, *args, **kwargs)

    if "dispatch_attention_fn" in names and not hasattr(names["dispatch_attention_fn"], "_doctor"):
        put("dispatch_attention_fn", between(dispatch, names["dispatch_attention_fn"], True))
    functional = names.get("F")
    if hasattr(functional, "scaled_dot_product_attention") and not hasattr(functional, "_doctor"):
        copy: Any = types.ModuleType("torch.nn.functional")
        copy.__dict__.update(vars(functional))
        inner = functional.scaled_dot_product_attention
        copy.scaled_dot_product_attention = between(sdpa, inner, False)
        put("F", copy)
    return undo


def fingerprint(models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Identities of all that attaching may touch: classes, attributes and hooks of every module and
    processor, and the names through which processors reach the softmax.
    """
    found: dict[str, Any] = {}
    for component, model in models.items():
        for name, module in model.named_modules():
            place = f"{component}.{name}" if name else component
            found[f"the class of {place}"] = id(type(module))
            found[f"the attributes of {place}"] = tuple(sorted(vars(module)))
            found[f"the hooks of {place}"] = (
                tuple(map(id, module._forward_hooks.values())),
                tuple(map(id, module._forward_pre_hooks.values())),
            )
            processor = getattr(module, "processor", None)
            if not callable(processor):
                continue
            found[f"the processor of {place}"] = id(processor)
            found[f"the processor's class of {place}"] = id(type(processor))
            attributes = tuple(sorted(getattr(processor, "__dict__", ())))
            found[f"the processor's attributes of {place}"] = attributes
            for home in _homes(type(processor)):
                for word in ("dispatch_attention_fn", "F"):
                    found[f"{home.__name__}.{word}"] = id(vars(home).get(word))
    return found
