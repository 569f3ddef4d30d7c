"""`auto` under masks of small blocks, scattered at random and different in each head: the hardest
to skip. Beside dense attention without a mask, mask building included, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/auto_small_blocks.py

The grid of sparse_cpu.py has blocks of 128 alone; these are what it leaves out.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product

import torch
import torch.nn.functional as F
from timing import Row, report, side_by_side

from attn_control.kernels import attend
from attn_control.masks import BlockMask

BAR = 1.05  # of dense's time


def setup(block: int, density: float, dtype: torch.dtype, tokens: int) -> tuple:
    """q, k, v (1, 4, tokens, 64) and which blocks are on, bool (4, blocks, blocks)."""
    g = torch.Generator().manual_seed(1)
    qkv = [torch.randn(1, 4, tokens, 64, generator=g).to(dtype) for _ in range(3)]
    blocks = tokens // block
    table = torch.rand(4, blocks, blocks, generator=g) < density
    return (*qkv, table | torch.eye(blocks, dtype=torch.bool))


def masked(q, k, v, table: torch.Tensor, block: int) -> torch.Tensor:
    """What is timed: the mask is built anew each time."""
    length = q.shape[2]
    mask = BlockMask.from_table(table, block_size=block, q_len=length, k_len=length)
    return attend(q, k, v, mask, impl="auto", need_lse=False)[0]


def added(table: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask as dense attention takes it: 0 or -inf for every pair, (1, 4, tokens, tokens)."""
    on = table.repeat_interleave(block, -1).repeat_interleave(block, -2)[None]
    return torch.zeros(on.shape, dtype=dtype).masked_fill(~on, float("-inf"))


def verify(out: torch.Tensor, q, k, v, table: torch.Tensor, block: int) -> None:
    """A few whole rows against a float64 softmax over the table itself."""
    at = torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(2))[:16]
    allowed = table[:, at // block].repeat_interleave(block, -1)
    scores = q[0, :, at].double() @ k[0].double().mT * q.shape[-1] ** -0.5
    expected = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v[0].double()
    off = (out[0][:, at].double() - expected).abs().max().item()
    assert off < (2e-6 if q.dtype == torch.float32 else 2e-2), f"off by {off:.2g}"


def main() -> None:
    """One line a case."""
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--tokens", type=int, default=8192)
    cli.add_argument("--rounds", type=int, default=5)
    args = cli.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype, block, density in product((torch.float32, torch.bfloat16), (32, 64), (0.9, 0.97)):
        q, k, v, table = setup(block, density, dtype, args.tokens)
        verify(masked(q, k, v, table, block), q, k, v, table, block)
        bias = added(table, block, dtype)
        calls = {
            "dense": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
            "with mask": lambda q=q, k=k, v=v, m=bias: F.scaled_dot_product_attention(
                q, k, v, attn_mask=m
            ),
            "auto": lambda q=q, k=k, v=v, t=table, b=block: masked(q, k, v, t, b),
        }
        taken = side_by_side(calls, torch.device("cpu"), args.rounds, warmup=1)
        median = {name: statistics.median(times) for name, times in taken.items()}
        ratio, dense = (median[name] / median["dense"] for name in ("auto", "with mask"))
        what = f"blocks of {block}, density {density:g}, {str(dtype).removeprefix('torch.')}"
        note = (
            f"{args.tokens} tokens, 4 heads of 64; dense with that mask, made before: {dense:.2f}"
        )
        rows.append(Row(what, ratio, "of dense", BAR, note))
    report("auto_small_blocks", rows, torch.device("cpu"))


if __name__ == "__main__":
    main()
