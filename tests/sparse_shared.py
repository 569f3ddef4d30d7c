"""What the tests of sparse controls share: dense maps by definition, and a video to sample."""

from __future__ import annotations

from itertools import product
from typing import Any

import tiny_pipelines
import torch
from torch import Tensor

from attn_control.call import Call, Site, Step
from attn_control.kernels.corrections import CORRECTIONS
from attn_control.kernels.pieces import Piece
from attn_control.kernels.sparse import Fixed, SparseSoftmax
from attn_control.ledger import Ledger
from attn_control.masks import BlockMask
from attn_control.policy import StepPolicy
from attn_control.state import Memory

SITE = Site("blocks.0.attn1", "transformer", 0, "self", 2, 2, 8, None)


def tensors(tokens: int = 96, rows: int = 1, heads: int = 2, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, tokens, 8, generator=g, dtype=torch.float64) for _ in "qkv"]


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the pairs that are on, as textbooks have it."""
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp() * on
    total = weights.sum(-1, keepdim=True)
    return weights @ v / total, total.log()[..., 0]


def random_mask(tokens: int = 96, block: int = 16, seed: int = 0, heads: int = 2) -> BlockMask:
    g = torch.Generator().manual_seed(seed)
    count = -(-tokens // block)
    table = torch.rand(heads, count, count, generator=g) < 0.4
    table |= torch.eye(count, dtype=torch.bool)
    return BlockMask.from_table(table, block_size=block, q_len=tokens)


def call_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, site: Site = SITE) -> Call:
    def original(heads: Any = None) -> Tensor:
        some = slice(None) if heads is None else list(heads)
        return torch.nn.functional.scaled_dot_product_attention(q[:, some], k[:, some], v[:, some])

    return Call(site, "main", q, k, v, mask, None, original)


def softmax_of(
    mask: BlockMask,
    correction: str = "residual",
    policy: Any = None,
    gain: float = 0.0,
    **more: Any,
) -> SparseSoftmax:
    policy = policy or StepPolicy(first=0, refresh=3)
    given = {"heads": (0, 1), "memory": Memory(), "ledger": Ledger()} | more
    return SparseSoftmax(
        control=0,
        who="Test",
        site=SITE,
        pattern=Fixed((Piece(mask),)),
        correction=CORRECTIONS[correction],
        policy=policy,
        gain=gain,
        **given,
    )


def at(level: int, branch: tuple[str, ...] = ("cond",), levels: int = 12, run: int = 1) -> Step:
    return Step(run, level, levels, None, branch, level, levels)


def attend(softmax: SparseSoftmax, step: Step, call: Call) -> Tensor:
    """The output of one call, the stock one where the softmax leaves it alone."""
    softmax.prepare(step)
    out = softmax.run(call, call.original)
    return call.original() if out is None else out


def window_by_hand(shape: tuple[int, ...], kernel: int) -> Tensor:
    """bool (tokens, tokens): the window of ``kernel`` keys an axis, read off its definition."""
    places = list(product(*map(range, shape)))
    on = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            inside = True
            for x, y, size in zip(query, key, shape, strict=True):
                k = min(kernel, size)
                start = min(max(x - k // 2, 0), size - k)
                inside &= start <= y < start + k
            on[i, j] = inside
    return on


def video(steps: int = 8, scheduler: Any = None, size: int = 96) -> tuple[Any, dict[str, Any]]:
    """A tiny Wan pipeline whose video has 3 x 6 x 6 tokens."""
    pipe, call = tiny_pipelines.wan(scheduler=scheduler)
    call |= {"height": size, "width": size, "num_frames": 9, "num_inference_steps": steps}
    return pipe, call
