"""Every kernel, forward and backward, against a softmax in float64 over dense masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_control.kernels import attend
from attn_control.masks import BlockMask, band_mask
from attn_control.masks.group import GroupMask

NONE = float("-inf")
BAR = 2.0
"""Times the error of plain attention in the same precision."""
FLOOR = 32
"""Roundings of float32, where plain attention is almost as exact as the oracle."""
TF32 = 5e-3
"""Ten roundings of tf32: torch's own attention need not use it."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Check:
    """Largest errors of one executor. bar: what ``error`` may be."""

    impl: str
    case: str
    dtype: str
    dim: int
    what: str
    error: float
    bar: float

    @property
    def held(self) -> bool:
        return self.error <= self.bar  # nan is not


@dataclass
class Case:
    """One call and its truth. allowed: bool, added: additive, both broadcastable to pairs; more:
    further arguments of `attend_triton`, none of which the other executors have.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockMask | GroupMask | None
    allowed: Tensor
    mask: Tensor | None = None
    added: Tensor | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def softmax(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Output and lse, in the inputs' dtype; 0 and -inf where a query has no key."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.mT * q.shape[3] ** -0.5
    if case.added is not None:
        scores = scores + case.added.to(scores.dtype)
    allowed = case.allowed.expand(scores.shape)
    scores = scores.masked_fill(~allowed, NONE)
    some = allowed.any(-1, keepdim=True)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.where(allowed, (scores - lse.masked_fill(~some, 0.0)).exp(), 0.0)
    return weights @ v, lse[..., 0]


def plain(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, None]:
    """torch's own attention, where its errors are those to beat."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    shape = (*q.shape[:3], k.shape[2])
    bias = torch.zeros((), dtype=q.dtype, device=q.device).expand(shape)
    if case.added is not None:
        bias = bias + case.added.to(q.dtype)
    # A query without keys reads all of them here, and is left out below: torch gives it nan.
    some = case.allowed.expand(shape).any(-1, keepdim=True)
    bias = bias.masked_fill(~case.allowed & some, NONE)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
    return out.masked_fill(~some, 0.0), None


def triton(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    from attn_control.kernels.triton.run import attend_triton

    return attend_triton(q, k, v, case.plan, case.mask, q.shape[3] ** -0.5, **case.more)


def flex(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor | None]:
    return attend(q, k, v, case.plan, mask=case.mask, impl="flex")


EXECUTORS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {"triton": triton, "flex": flex}


def cases(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    tokens: int,
    block: int,
    names: Sequence[str],
) -> Iterator[tuple[str, Case]]:
    """Ragged, with grouped heads, and with queries that have no key."""
    g = torch.Generator().manual_seed(tokens + dim)
    batch, heads, kv_heads = 2, 4, 2
    tensors = [torch.randn(batch, n, tokens, dim, generator=g) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (x.to(device, dtype) for x in tensors)
    side = -(-tokens // block)
    table = torch.rand(heads, side, side, generator=g) < 0.4
    table[:, 1] = False
    blocks = BlockMask.from_table(table, block_size=block, q_len=tokens, k_len=tokens)
    band = band_mask((tokens,), reach=block + block // 2)
    row = torch.arange(tokens)
    near = ((row[:, None] - row).abs() <= block + block // 2)[None, None]
    whole = table.repeat_interleave(block, 1).repeat_interleave(block, 2)[None, :, :tokens, :tokens]
    for name in names:
        plan: BlockMask | GroupMask = band if name != "blocks" else blocks
        allowed = near if name != "blocks" else whole
        mask = added = None
        more: dict[str, Any] = {}
        if name == "own mask":
            mask = torch.rand(batch, 1, 1, tokens, generator=g) < 0.7
            allowed = allowed & mask
        elif name == "added":
            mask = added = torch.randn(1, heads, tokens, tokens, generator=g)
        elif name == "orders":
            order = torch.stack([torch.randperm(tokens, generator=g) for _ in range(kv_heads)])
            more = {"q_order": order.repeat_interleave(2, 0)[None], "k_order": order[None]}
            place = order.argsort(1).repeat_interleave(2, 0)
            allowed = near[0, 0][place[:, :, None], place[:, None, :]][None]
        elif name == "groups":
            atoms = torch.randint(0, 5, (tokens,), generator=g)
            words = torch.tensor([0b00001, 0b01011, 0b10100, 0b11111, 0])
            plan = GroupMask(atoms.to(torch.int8), atoms.to(torch.int8), words)
            allowed = ((words[atoms][:, None] >> atoms) & 1).bool()[None, None]
        moved = {key: order.int().to(device) for key, order in more.items()}
        mask, added = (None if x is None else x.to(device) for x in (mask, added))
        yield name, Case(q, k, v, plan.to(device), allowed.to(device), mask, added, moved)


def check(impl: str, name: str, case: Case, dtype: str) -> list[Check]:
    """Output, lse and gradients of one executor."""
    inputs = tuple(x.detach().requires_grad_() for x in case.inputs)
    twins = tuple(x.detach().double().requires_grad_() for x in case.inputs)
    g = torch.Generator().manual_seed(5)
    grad = torch.randn(case.q.shape, generator=g).to(case.q.device, case.q.dtype)
    found: dict[str, dict[str, Tensor]] = {}
    for which, (run, given) in {
        "mine": (EXECUTORS[impl], inputs),
        "plain": (plain, inputs),
        "truth": (softmax, twins),
    }.items():
        out, lse = run(*given, case)
        found[which] = {"out": out.detach()}
        if lse is not None:
            found[which]["lse"] = lse.detach()
        gradients = torch.autograd.grad(out, given, grad.to(out.dtype))
        found[which].update(zip(("dq", "dk", "dv"), gradients, strict=True))
    return [
        Check(impl, name, dtype, case.q.shape[3], what, error, bar)
        for what, error, bar in _errors(found, dtype)
    ]


def _errors(found: dict[str, dict[str, Tensor]], dtype: str) -> Iterator[tuple[str, float, float]]:
    rounding = TF32 if dtype == "tf32" else FLOOR * torch.finfo(torch.float32).eps
    for what, mine in found["mine"].items():
        right, its = found["truth"][what].double(), found["plain"].get(what)
        least = rounding * max(1.0, _largest(right))
        bar = 0.0 if its is None else BAR * _worst(its, right)  # the lse is float32 everywhere
        yield what, _worst(mine, right), max(bar, least)


def _largest(x: Tensor) -> float:
    return float(x.masked_fill(x.isinf(), 0.0).abs().max())


def _worst(a: Tensor, b: Tensor) -> float:
    """The largest difference; equal infinities differ by nothing, nan by nan."""
    a, b = a.double(), b.double()
    return float(torch.where(a == b, 0.0, (a - b).abs()).max())
