"""One step of a sampler under several controls, composed by hand from dense float64 maps.

Written from the papers and from docs/guidance.md, without the package: attention is found by module
hooks and answered through the global ``torch.nn.functional``, blocks are replaced on the instance.

A pass of the denoiser has named rows: "n" negative, "c" conditional, "x" the conditional row once
more with NAG's negative text. An operation changes attention outputs, or a module's output, on some
of them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import dense
import torch
from torch import Tensor

_SDPA = torch.nn.functional.scaled_dot_product_attention
_EYE = torch.eye(64, dtype=torch.float64)


@dataclass(frozen=True)
class Facts:
    """Block 1 of a tiny model, written down by hand."""

    block: str
    attention: str
    reads_text: str
    feed_forward: tuple[str, ...]
    returns: tuple[str, ...]
    image: slice
    text: slice
    grid: tuple[int, int, int]
    split: bool


_PAIR = ("encoder_hidden_states", "hidden_states")
_UNET = "down_blocks.1.attentions.0.transformer_blocks.0"
FACTS = {
    "sd15": Facts(_UNET, "attn1", "attn2", ("ff",), ("hidden_states",), slice(0, 16), slice(0, 0),
                  (1, 4, 4), False),
    "sd3": Facts("transformer_blocks.1", "attn", "attn", ("ff", "ff_context"), _PAIR,
                 slice(0, 16), slice(16, 21), (1, 4, 4), False),
    "flux": Facts("transformer_blocks.1", "attn", "attn", ("ff", "ff_context"), _PAIR,
                  slice(5, 21), slice(0, 5), (1, 4, 4), True),
    "wan": Facts("blocks.1", "attn1", "attn2", ("ffn",), ("hidden_states",), slice(0, 12),
                 slice(0, 0), (3, 2, 2), True),
}  # fmt: skip


@dataclass
class Softmax:
    """A softmax in float64, and its output as it stands after the operations so far."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    out: Tensor
    rows: tuple[str, ...]
    facts: Facts


@dataclass(frozen=True)
class Operation:
    """A change at block 1. module: a softmax, "attention" or "reads_text"; or an output, "block",
    "attention branch" or "feed_forward".
    """

    module: str
    change: Callable[..., Any]


def _where(s: Softmax, rows: str, heads: tuple[int, ...], tokens: slice) -> Tensor:
    """True at (row, head, token) where an operation applies."""
    at = torch.zeros(s.out.shape[:3], dtype=torch.bool)
    for row, name in enumerate(s.rows):
        for head in heads if name in rows else ():
            at[row, head, tokens] = True
    return at[..., None]


def toward(
    op: str, u: float, heads: tuple[int, ...], where: str, *, rows: str, seed: int = 0,
    sigma: float = 0.0, cap: float | None = None,
) -> Operation:  # fmt: skip
    """SoftPAG and SEG: outputs led to those of a perturbed map."""

    def change(s: Softmax) -> Tensor:
        tokens = slice(None) if where == "all" else s.facts.image
        n = s.a.shape[-1]
        if op in ("slerp", "chord"):
            path = (dense.slerp_rows if op == "slerp" else dense.chord_rows)(s.a, u)
            off = 1 - _EYE[:n, :n]
            kept = ((path * off).sum(-1) / (s.a * off).sum(-1))[..., None]
            new = kept * s.out + (1 - kept) * s.v
        else:
            new = (1 - u) * s.out + u * _perturbed(s, op, tokens, seed, sigma)
        if cap is not None:
            over = new.norm(dim=-1, keepdim=True) / (cap * s.out.norm(dim=-1, keepdim=True))
            new = new / over.clamp(min=1)
        return torch.where(_where(s, rows, heads, tokens), new, s.out)

    return Operation("attention", change)


def _perturbed(s: Softmax, op: str, tokens: slice, seed: int, sigma: float) -> Tensor:
    scale = s.q.shape[-1] ** -0.5
    if op == "permute":  # layer 1, step 0
        picture = torch.arange(s.v.shape[2])[tokens]
        generator = torch.Generator().manual_seed((seed * 1_000_003 + 1) * 1_000_003)
        order = picture[torch.randperm(len(picture), generator=generator)]
        v = s.v.clone()
        v[:, :, picture] = s.v[:, :, order]
        return s.a @ v
    if op in ("mean_query", "blur"):
        q = s.q.clone()
        picture = q[:, :, tokens]
        if op == "mean_query":
            q[:, :, tokens] = picture.mean(2, keepdim=True)
        else:
            q[:, :, tokens] = dense.blurred(picture, s.facts.grid, sigma)
        return dense.attention_map(q, s.k, scale) @ s.v
    image, text = s.facts.image, s.facts.text
    return dense.perturbed_map(op, s.a, s.q, s.k, scale, image, text) @ s.v


def gain(factor: float, heads: tuple[int, ...]) -> Operation:
    return Operation(
        "attention",
        lambda s: torch.where(_where(s, "ncx", heads, slice(None)), factor * s.out, s.out),
    )


def nag(scale: float, tau: float, alpha: float) -> Operation:
    """Element by element from arXiv 2505.21179, on every head; both rows get the result."""

    def change(s: Softmax) -> Tensor:
        out = s.out.clone()
        if "x" not in s.rows:
            return out
        c, x = s.rows.index("c"), s.rows.index("x")
        image = slice(None) if s.facts.attention != s.facts.reads_text else s.facts.image
        good, bad = s.out[c][:, image], s.out[x][:, image]
        far = scale * good - (scale - 1) * bad
        over = far.abs().sum(-1, keepdim=True) / good.abs().sum(-1, keepdim=True)
        far = torch.where(over > tau, far * tau / over, far)
        out[c][:, image] = out[x][:, image] = alpha * far + (1 - alpha) * good
        return out

    return Operation("reads_text", change)


def leave_out(what: str, u: float, rows: str) -> Operation:
    """A block led to its input, or a branch of it to zero."""

    def change(inputs: tuple[Tensor, ...], outputs: tuple[Any, ...], names: tuple[str, ...]) -> Any:
        made = []
        for before, after in zip(inputs or outputs, outputs, strict=True):
            after = None if after is None else after.clone()
            for row, name in enumerate(names):
                if name in rows and after is not None:
                    target = before[row] if inputs else 0
                    after[row] = (1 - u) * after[row] + u * target
            made.append(after)
        return made

    return Operation(what, change)


@dataclass
class Step:
    """One step on a tiny model: text and latents of both branches, and what was computed."""

    name: str
    model: Any
    latents: Tensor
    texts: dict[str, Tensor]
    pooled: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    timestep: Any = None

    @property
    def facts(self) -> Facts:
        return FACTS[self.name]

    def arguments(self, rows: tuple[str, ...]) -> dict[str, Any]:
        """The denoiser's keyword arguments for these rows."""
        given = {
            "sample" if self.name == "sd15" else "hidden_states": self.latents.repeat(
                len(rows), *[1] * (self.latents.ndim - 1)
            ),
            "encoder_hidden_states": torch.cat([self.texts[row] for row in rows]),
            "timestep": self.timestep if self.name == "sd15" else self.timestep.expand(len(rows)),
        }
        if self.pooled:
            given["pooled_projections"] = torch.cat([self.pooled[r] for r in rows])
        return {**given, **self.fixed}

    def run(self, rows: tuple[str, ...], operations: list[Operation]) -> dict[str, Tensor]:
        """The denoiser's prediction for each row, but for "x", under the operations in order."""
        with torch.no_grad(), _composed(self.model, self.facts, rows, operations):
            out = self.model(**self.arguments(rows), return_dict=False)[0]
        return {name: out[row : row + 1] for row, name in enumerate(rows) if name != "x"}


@contextlib.contextmanager
def _composed(
    model: Any, facts: Facts, rows: tuple[str, ...], operations: list[Operation]
) -> Iterator[None]:
    inside: list[str] = []
    by_module: dict[str, list[Operation]] = {}
    with contextlib.ExitStack() as stack:
        for operation in operations:
            if operation.module in ("attention", "reads_text"):
                name = f"{facts.block}.{getattr(facts, operation.module)}"
                by_module.setdefault(name, []).append(operation)
        for name in by_module:
            module = model.get_submodule(name)
            pre = module.register_forward_pre_hook(lambda m, a, name=name: inside.append(name))
            post = module.register_forward_hook(lambda m, a, o: inside.pop() and None)
            stack.callback(pre.remove)
            stack.callback(post.remove)

        def sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not inside:
                return _SDPA(query, key, value, *args, **kwargs)
            assert not args and kwargs.get("attn_mask") is None and not kwargs.get("is_causal")
            q, k, v = query.double(), key.double(), value.double()
            a = dense.attention_map(q, k, q.shape[-1] ** -0.5)
            s = Softmax(q, k, v, a, a @ v, rows, facts)
            for operation in by_module[inside[-1]]:
                s.out = operation.change(s)
            return s.out.to(query.dtype)

        torch.nn.functional.scaled_dot_product_attention = sdpa
        stack.callback(setattr, torch.nn.functional, "scaled_dot_product_attention", _SDPA)
        for operation in operations:
            _leave_out(stack, model, facts, rows, operation)
        yield


def _leave_out(
    stack: contextlib.ExitStack, model: Any, facts: Facts, rows: tuple[str, ...], one: Operation
) -> None:
    kind = one.module
    if kind == "block":
        paths = [facts.block]
    elif kind == "feed_forward":
        paths = [f"{facts.block}.{name}" for name in facts.feed_forward]
    elif kind == "attention branch":
        paths = [f"{facts.block}.{facts.attention}"]
    else:
        return
    for path in paths:
        module = model.get_submodule(path)
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        original = module.forward

        def forward(
            *args: Any, _original: Any = original, _names: list[str] = names, **kw: Any
        ) -> Any:
            given = {**dict(zip(_names, args, strict=False)), **kw}
            before = tuple(given[n] for n in facts.returns) if kind == "block" else ()
            after = _original(*args, **kw)
            many = isinstance(after, tuple)
            made = one.change(before, after if many else (after,), rows)
            return tuple(made) if many else made[0]

        module.forward = forward
        stack.callback(_put_back, module, original)


def _put_back(module: Any, original: Any) -> None:
    if getattr(original, "__func__", None) is type(module).forward:
        module.__dict__.pop("forward", None)
    else:
        module.forward = original
