"""Attention of the zoo's trainings, forward and backward: fused against written out and compiled.

`python benchmarks/train_attention.py` prints ratios of one thread's time; bfloat16, batch 16, four
heads of 32 channels. `--forget` leaves glibc's memory settings alone.
"""

from __future__ import annotations

import statistics
import sys

import torch
import torch.nn.functional as F
from timing import side_by_side

from attn_control.zoo.train import quick


def main() -> None:
    """One line a length."""
    torch.set_num_threads(1)
    if "--forget" not in sys.argv:
        quick.keep_memory()
    written = torch.compile(quick.attention, dynamic=False)
    for length in (192, 280, 536, 1024):
        shape = (16, 4, length, 32)
        q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

        def both_ways(function, q=q, k=k, v=v):
            return torch.autograd.grad(function(q, k, v).sum(), (q, k, v))

        taken = side_by_side(
            {
                "fused": lambda run=both_ways: run(F.scaled_dot_product_attention),
                "written": lambda run=both_ways: run(written),
            },
            torch.device("cpu"),
            rounds=7,
        )
        ratio = statistics.median(taken["written"]) / statistics.median(taken["fused"])
        print(f"{length:5d} tokens: written out takes {ratio:.2f} of the fused time")


if __name__ == "__main__":
    main()
