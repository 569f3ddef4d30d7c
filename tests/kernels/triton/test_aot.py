"""The check of compiled kernels passes ours, and fails kernels made worse on purpose."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from attn_control.kernels import aot

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler"),
    pytest.mark.slow,
]


def binary(kernel, target, tile=None, **shape):
    from attn_control.kernels.aot_binary import read
    from attn_control.kernels.aot_compile import KERNELS, Shape, compile_for, launch

    given = launch(kernel, Shape(**shape), target, tile)
    return read(compile_for(target, KERNELS[kernel], *given))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_for_machines_that_are_not_here(target, capsys):
    assert aot.main(["--targets", target, "--kernels", "forward", "--dims", "128"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[:3] == [target, "forward", "128"] and shown[-1] == "no faults"


def test_a_kernel_made_to_spill_fails(monkeypatch, capsys):
    """Four warps for a tile that takes eight."""
    from attn_control.kernels import aot_compile
    from attn_control.kernels.triton.tune import Tile, Tiles

    crowded = Tiles(*[Tile(128, 64, 4, 2)] * 3)
    monkeypatch.setattr(aot_compile, "tiles", lambda *_: crowded)
    assert aot.main(["--targets", "sm_80", "--kernels", "forward", "--dims", "128"]) == 1
    assert "bytes a thread" in capsys.readouterr().out


def test_a_kernel_without_matrix_instructions_fails():
    """Exact products of float32, which no matrix unit of an A100 has."""
    found = binary("forward", "sm_80", dim=32, block=32, dtype=torch.float32)
    assert found.registers > 0 and found.matrix == 0
    assert "has no matrix instruction" in aot.faults("sm_80", found)


def test_what_does_not_fit_shared_memory_fails():
    from attn_control.kernels.aot_binary import Binary

    fits = Binary(128, 0, 99 * 1024, 8, 0.2)
    assert aot.faults("sm_86", fits) == []
    assert aot.faults("sm_86", Binary(128, 0, 99 * 1024 + 1, 8, 0.2)) == [
        "needs 101377 bytes of shared memory"
    ]
    assert aot.faults("sm_80", Binary(128, 0, 99 * 1024, 8, 0.0)) == [
        "has no matrix instruction in a loop"
    ]


def test_occupancy_by_hand():
    from attn_control.kernels.aot_binary import Binary

    # 201 registers are 208 as they are handed out: 208 * 32 * 8 of 65536 once, 8 of 64 warps.
    assert aot.occupancy("sm_80", 8, Binary(201, 0, 49664, 1, 1.0)) == 8 / 64
    # 64 registers: four by them, and three by 48 of 164 KiB.
    assert aot.occupancy("sm_80", 8, Binary(64, 0, 47 * 1024, 1, 1.0)) == 24 / 64
