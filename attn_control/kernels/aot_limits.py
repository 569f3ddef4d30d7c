"""What a compiled kernel is held to, and how many of its programs a multiprocessor holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_control.kernels.chips import CHIPS

if TYPE_CHECKING:
    from attn_control.kernels.aot_binary import Binary

RESERVED = 1024
"""Bytes of shared memory that each NVIDIA program takes besides its own."""
SHARE = 0.95
"""Of the dense yardstick's share of matrix instructions in the loop: walking lists may cost that
little.
"""


def occupancy(target: str, warps: int, binary: Binary) -> float:
    """Warps that a multiprocessor holds at once, of those that it could: an estimate."""
    chip = CHIPS[target]
    a_lane = -(-max(binary.registers, 1) // chip.step) * chip.step
    by_registers = chip.registers // (a_lane * chip.lanes * warps)
    reserved = 0 if target.startswith("gfx") else RESERVED
    by_shared = chip.shared_all * 1024 // max(1, binary.shared + reserved)
    return min(by_registers, by_shared, chip.warps // warps) * warps / chip.warps


def faults(
    target: str, warps: int, binary: Binary, *, matrix: bool = True, loop: bool = True
) -> list[str]:
    """What is wrong with a kernel, if anything. matrix: whether it multiplies matrices, in a
    precision that the chip has a unit for; loop: whether it does so in a loop.
    """
    found = []
    if binary.spilled:
        found.append(f"spills {binary.spilled} bytes a thread")
    if binary.shared > CHIPS[target].shared * 1024:
        found.append(f"needs {binary.shared} bytes of shared memory")
    elif not occupancy(target, warps, binary):
        found.append(f"{warps} warps of {binary.registers} registers fit no multiprocessor")
    if matrix and not binary.matrix:
        found.append("has no matrix instruction")
    elif matrix and loop and not binary.share:
        found.append("has no matrix instruction in a loop")
    return found


def behind(target: str, warps: int, binary: Binary, dense: Binary) -> tuple[float, float]:
    """Share of the loop, and occupancy, over those of the yardstick at the same tile."""
    mine, its = (occupancy(target, warps, each) for each in (binary, dense))
    return binary.share / dense.share, mine / its


def short(kept: tuple[float, float], whose: str) -> list[str]:
    """In words, what of a kernel falls short of a yardstick, which is ``whose``."""
    parts = zip(("share of the loop", "occupancy"), kept, (SHARE, 1.0), strict=True)
    return [f"{what} {ratio:.2f} of {whose}" for what, ratio, bar in parts if ratio < bar]
