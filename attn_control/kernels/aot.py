"""``python -m attn_control.kernels.aot``: the Triton kernels, compiled for GPUs that are not here.

Prints what their binaries say, and fails where a kernel spills registers, does not fit shared
memory, or lost its matrix instructions. Nothing runs, and no time is estimated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_control.kernels.aot_binary import Binary


@dataclass(frozen=True)
class Chip:
    """Of vendors' tables. shared: KiB a program may have; of a whole multiprocessor (AMD: compute
    unit) each: shared KiB, warps, registers of 32 bits.
    """

    name: str
    shared: int
    shared_all: int
    warps: int
    registers: int
    lanes: int = 32
    step: int = 8  # registers are handed out in such steps


CHIPS = {
    "sm_80": Chip("A100", 163, 164, 64, 1 << 16),
    "sm_86": Chip("A10, RTX 30", 99, 100, 48, 1 << 16),
    "sm_89": Chip("L4, RTX 40", 99, 100, 48, 1 << 16),
    "sm_90": Chip("H100", 227, 228, 64, 1 << 16),
    "sm_100": Chip("B200", 227, 228, 64, 1 << 16),
    "sm_120": Chip("RTX 50", 99, 100, 48, 1 << 16),
    "gfx942": Chip("MI300X", 64, 64, 32, 1 << 17, lanes=64),
}
RESERVED = 1024
"""Bytes of shared memory that each NVIDIA program takes besides its own."""


def occupancy(target: str, warps: int, binary: Binary) -> float:
    """Warps that a multiprocessor holds at once, of those that it could: an estimate."""
    chip = CHIPS[target]
    a_lane = -(-max(binary.registers, 1) // chip.step) * chip.step
    by_registers = chip.registers // (a_lane * chip.lanes * warps)
    reserved = 0 if target.startswith("gfx") else RESERVED
    by_shared = chip.shared_all * 1024 // max(1, binary.shared + reserved)
    return min(by_registers, by_shared, chip.warps // warps) * warps / chip.warps


def faults(target: str, binary: Binary) -> list[str]:
    """What is wrong with a kernel, if anything."""
    found = []
    if binary.spilled:
        found.append(f"spills {binary.spilled} bytes a thread")
    if binary.shared > CHIPS[target].shared * 1024:
        found.append(f"needs {binary.shared} bytes of shared memory")
    if not binary.matrix:
        found.append("has no matrix instruction")
    elif not binary.share:
        found.append("has no matrix instruction in a loop")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The table; 1 if a kernel has a fault."""
    from attn_control.kernels.aot_binary import read
    from attn_control.kernels.aot_compile import KERNELS, Shape, compile_for, launch

    parser = argparse.ArgumentParser(prog="python -m attn_control.kernels.aot", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=[*CHIPS])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=[*KERNELS])
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128])
    asked = parser.parse_args(argv)
    print(
        f"{'target':8} {'kernel':10} {'dim':>4} {'tile':>14} {'registers':>9} {'spilled':>8}",
        end="",
    )
    print(f" {'shared':>7} {'matrix':>6} {'of loop':>7} {'occupancy':>9}")
    wrong = 0
    for target in asked.targets:
        for dim in asked.dims:
            for kernel in asked.kernels:
                given = launch(kernel, Shape(dim=dim), target)
                binary = read(compile_for(target, KERNELS[kernel], *given))
                c = given[1]
                tile = f"{c['M']}x{c['N']} w{c['num_warps']} s{c['num_stages']}"
                held = occupancy(target, c["num_warps"], binary)
                found = faults(target, binary)
                wrong += bool(found)
                print(
                    f"{target:8} {kernel:10} {dim:4} {tile:>14} {binary.registers:9}"
                    f" {binary.spilled:8} {binary.shared:7} {binary.matrix:6} {binary.share:7.1%}"
                    f" {held:9.0%}  {'; '.join(found)}".rstrip(),
                    flush=True,
                )
    print(f"{wrong} kernels with faults" if wrong else "no faults")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
