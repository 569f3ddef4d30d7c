"""Triton's own tutorial of fused attention, as compiled: figures that ours are held to.

It is `python/tutorials/06-fused-attention.py` of triton-lang/triton, revision 003da478 (MIT). Its
source is not part of this project: typed anew in a scratch file it was compiled by triton 3.9.0, in
float16, not causal, for the shape that ours are compiled for, at our tiles. docs/gpu/README.md has
what was made a constant for that, and how its one backward kernel was taken apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from attn_control.kernels.aot_variants import Variant


class Figure(NamedTuple):
    """tile: rows, columns, warps, stages; a thread's registers, and bytes that it spills; bytes of
    shared memory; matrix instructions in its loop, of so many in all.
    """

    tile: tuple[int, int, int, int]
    registers: int
    spilled: int
    shared: int
    matrix: int
    loop: int

    @property
    def share(self) -> float:
        return self.matrix / self.loop


def known(variant: Variant) -> Figure | None:
    """Of head dims 64 and 128, for kernels of whole tiles. bfloat16 takes the same instructions as
    float16 on NVIDIA's chips; gfx942 has to convert it, and is compared in float16 alone.
    """
    alike = ("fp16",) if variant.target == "gfx942" else ("fp16", "bf16")
    if variant.extra or variant.dtype not in alike:
        return None
    return FIGURES.get((variant.target, variant.kernel, variant.dim))


FIGURES: dict[tuple[str, str, int], Figure] = {
    ("sm_80", "forward", 64): Figure((128, 64, 8, 3), 128, 0, 49152, 64, 386),
    ("sm_80", "of_queries", 64): Figure((64, 32, 4, 2), 176, 0, 26624, 48, 197),
    ("sm_80", "of_keys", 64): Figure((64, 32, 4, 2), 238, 0, 26880, 64, 247),
    ("sm_80", "forward", 128): Figure((128, 32, 8, 2), 194, 0, 49152, 64, 318),
    ("sm_80", "of_queries", 128): Figure((64, 32, 8, 2), 155, 0, 53248, 80, 295),
    ("sm_80", "of_keys", 128): Figure((64, 32, 8, 2), 169, 0, 53504, 96, 360),
    ("sm_86", "forward", 64): Figure((128, 64, 8, 3), 128, 0, 49152, 64, 386),
    ("sm_86", "of_queries", 64): Figure((64, 32, 4, 2), 178, 0, 26624, 48, 195),
    ("sm_86", "of_keys", 64): Figure((64, 32, 8, 2), 230, 0, 28928, 64, 227),
    ("sm_86", "forward", 128): Figure((128, 32, 8, 2), 196, 0, 49152, 64, 318),
    ("sm_86", "of_queries", 128): Figure((64, 32, 8, 2), 158, 0, 53248, 80, 291),
    ("sm_86", "of_keys", 128): Figure((64, 32, 8, 2), 168, 0, 53504, 96, 353),
    ("sm_89", "forward", 64): Figure((128, 64, 8, 3), 128, 0, 49152, 64, 386),
    ("sm_89", "of_queries", 64): Figure((64, 32, 4, 2), 178, 0, 26624, 48, 195),
    ("sm_89", "of_keys", 64): Figure((64, 32, 8, 2), 230, 0, 28928, 64, 227),
    ("sm_89", "forward", 128): Figure((128, 32, 8, 2), 196, 0, 49152, 64, 318),
    ("sm_89", "of_queries", 128): Figure((64, 32, 8, 2), 158, 0, 53248, 80, 291),
    ("sm_89", "of_keys", 128): Figure((64, 32, 8, 2), 168, 0, 53504, 96, 353),
    ("sm_90", "forward", 64): Figure((128, 64, 8, 2), 107, 0, 49184, 8, 314),
    ("sm_90", "of_queries", 64): Figure((64, 64, 4, 2), 136, 0, 49152, 12, 272),
    ("sm_90", "of_keys", 64): Figure((64, 64, 4, 2), 198, 0, 49664, 16, 341),
    ("sm_90", "forward", 128): Figure((128, 64, 8, 2), 138, 0, 98336, 12, 363),
    ("sm_90", "of_queries", 128): Figure((128, 64, 8, 2), 171, 0, 131072, 20, 338),
    ("sm_90", "of_keys", 128): Figure((64, 32, 8, 2), 152, 0, 65792, 36, 324),
    ("sm_100", "forward", 64): Figure((128, 64, 8, 2), 98, 0, 49728, 8, 302),
    ("sm_100", "of_queries", 64): Figure((128, 64, 8, 2), 101, 0, 73776, 12, 273),
    ("sm_100", "of_keys", 64): Figure((64, 64, 4, 2), 138, 0, 66112, 16, 387),
    ("sm_100", "forward", 128): Figure((128, 64, 8, 2), 128, 8, 98880, 12, 346),
    ("sm_100", "of_queries", 128): Figure((128, 64, 8, 2), 112, 0, 147504, 20, 333),
    ("sm_100", "of_keys", 128): Figure((128, 64, 8, 2), 150, 0, 164416, 24, 408),
    ("sm_120", "forward", 64): Figure((128, 32, 8, 2), 106, 0, 24600, 32, 234),
    ("sm_120", "of_queries", 64): Figure((64, 64, 8, 2), 255, 72, 36864, 96, 345),
    ("sm_120", "of_keys", 64): Figure((64, 32, 8, 2), 224, 0, 28928, 64, 221),
    ("sm_120", "forward", 128): Figure((64, 32, 4, 1), 144, 0, 28672, 64, 495),
    ("sm_120", "of_queries", 128): Figure((128, 32, 8, 2), 255, 32, 86016, 96, 292),
    ("sm_120", "of_keys", 128): Figure((64, 32, 8, 2), 168, 0, 53504, 96, 324),
    ("gfx942", "forward", 64): Figure((128, 64, 8, 1), 122, 0, 16384, 24, 313),
    ("gfx942", "of_queries", 64): Figure((64, 64, 4, 1), 218, 0, 8192, 40, 311),
    ("gfx942", "of_keys", 64): Figure((128, 32, 8, 1), 173, 0, 16384, 24, 258),
    ("gfx942", "forward", 128): Figure((128, 64, 8, 1), 200, 0, 32768, 48, 362),
    ("gfx942", "of_queries", 128): Figure((64, 32, 8, 1), 180, 0, 16384, 36, 184),
    ("gfx942", "of_keys", 128): Figure((64, 32, 8, 1), 226, 0, 16384, 40, 290),
}
