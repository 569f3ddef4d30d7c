"""What a compiled kernel's binary says: registers, spills, shared memory, matrix instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

MATRIX = re.compile(r"\b(?:HMMA|QMMA|IMMA|HGMMA|QGMMA|IGMMA|UTC\w*MMA|v_mfma_\w+)")
"""Of NVIDIA's disassembly (Ampere, Hopper, Blackwell), and AMD's."""


@dataclass(frozen=True)
class Binary:
    """registers: a thread's (AMD: vector and accumulation registers); spilled: bytes a thread keeps
    in memory instead; shared: bytes a program; matrix: matrix instructions in all; share: of the
    instructions in the innermost loop that has most of them; loop: how many that loop has.
    """

    registers: int
    spilled: int
    shared: int
    matrix: int
    share: float
    loop: int = 0


def read(compiled: Any) -> Binary:
    """Of triton's CompiledKernel, by the disassembler that comes with triton, or AMD's assembly."""
    shared = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        return _nvidia(compiled.asm["cubin"], shared)
    return _amd(compiled.asm["amdgcn"], shared)


def _nvidia(cubin: bytes, shared: int) -> Binary:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _say(tools / "cuobjdump", "-res-usage", file)
        code = _say(tools / "nvdisasm", "-c", file)
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found)
    # 16-byte lines of code; labels stand alone: ".L_x_3:".
    lines = [
        label or text
        for label, text in re.findall(r"^(\.L_\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", code, re.M)
    ]
    return Binary(registers, stack + local, shared, *_matrix(lines, r"\bBRA\b.*\((\.L_\w+)\)"))


def _amd(assembly: str, shared: int) -> Binary:
    def field(name: str) -> int:
        (value,) = re.findall(rf"^\s+\.{name}:\s+(\d+)", assembly, re.M)
        return int(value)

    body = assembly[: assembly.index(".end_amdgpu_metadata")].partition("s_endpgm")
    code = re.sub(r"\s*;.*", "", body[0])
    lines = [
        label or text.strip()
        for label, text in re.findall(r"^(\.LBB\w+):|^\t([a-z]\w+_.*)$", code, re.M)
    ]
    registers = field("vgpr_count")  # with the accumulation registers, which share its file
    scratch = field("private_segment_fixed_size")
    return Binary(registers, scratch, shared, *_matrix(lines, r"^s_c?branch\w* (\.LBB\w+)"))


def _matrix(lines: list[str], jump: str) -> tuple[int, float, int]:
    """Matrix instructions, their share of the innermost loop with most of them, and its size.

    A loop is what lies between a label and a jump back to it.
    """
    place = {line: number for number, line in enumerate(lines) if line.startswith(".L")}
    is_matrix = [bool(MATRIX.search(line)) for line in lines]
    loops = []
    for end, line in enumerate(lines):
        found = re.search(jump, line)
        if found and place.get(found[1], end) < end:
            loops.append((place[found[1]], end + 1))
    inner = [
        (a, b)
        for a, b in loops
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)
    ]
    most, share, length = 0, 0.0, 0
    for a, b in inner:
        count = sum(is_matrix[a:b])
        size = sum(not line.startswith(".L") for line in lines[a:b])
        if count and (count, count / size) > (most, share):
            most, share, length = count, count / size, size
    return sum(is_matrix), share, length


def _say(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done.stdout
