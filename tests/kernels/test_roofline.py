"""Datasheet rows that agree with themselves, and the model by hand."""

from __future__ import annotations

import math

import pytest

from attn_control.kernels.chips import CHIPS, OTHERS, chip_of
from attn_control.kernels.roofline import Loop, cycles, seconds

# Products of 16-bit floats summed in float32, in a cycle of one multiprocessor: vendors' documents
# on the architectures. Consumer chips have half of their siblings in data centres.
A_CYCLE = {
    "A100 SXM 80 GB": 2048,
    "A10": 1024,
    "L4": 1024,
    "H100 SXM": 4096,
    "H200": 4096,
    "B200": 8192,
    "RTX 5090": 512,
    "RTX 3090": 512,
    "RTX 4090": 512,
    "MI300X": 2048,
}


@pytest.mark.parametrize("chip", [*CHIPS.values(), *OTHERS], ids=lambda chip: chip.name)
def test_peaks_are_what_multiprocessors_and_clock_make(chip):
    assert chip.a_cycle("half") == pytest.approx(A_CYCLE[chip.name], rel=0.01)
    # On AMD's and NVIDIA's chips alike, float32 is twice as wide.
    assert chip.tf32 / chip.half == pytest.approx(0.5, rel=0.03)
    assert chip.single <= chip.tf32
    assert chip.source and chip.shared <= chip.shared_all


def test_a_device_finds_its_row():
    names = {
        "NVIDIA A100-SXM4-80GB": "A100 SXM 80 GB",
        "NVIDIA H200": "H200",
        "NVIDIA H100 80GB HBM3": "H100 SXM",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "AMD Instinct MI300X": "MI300X",
    }
    for name, row in names.items():
        assert chip_of(name, "none").name == row
    assert chip_of("NVIDIA L40S", "sm_89").name == "L4"  # the same code, another chip
    assert chip_of("NVIDIA A100X of none", "sm_75") is None


def test_the_model_by_hand():
    chip = CHIPS["sm_80"]
    loop = Loop("forward", 128, 64, 128, 8, 400)
    found = cycles(chip, loop, "half")
    # Two products of 128 x 64 x 128, 2048 operations a cycle; 8 warps of 400 instructions, four
    # begun a cycle; 8192 exponentials, 16 a cycle.
    assert found["matrix"] == pytest.approx(4 * 128 * 64 * 128 / 2048, rel=0.01)
    assert found["issue"] == 800 and found["exp"] == 512
    taken, bound = seconds(chip, loop, "half", heads=2, tokens=4096, dim=128)
    passes = 2 * 32 * 64
    assert bound == "matrix"
    assert taken == pytest.approx(passes * found["matrix"] / (108 * 1.41e9))
    quarter, _ = seconds(chip, loop, "half", heads=2, tokens=4096, dim=128, density=0.25)
    assert quarter == pytest.approx(taken / 4)
    # Where almost nothing is computed, what remains is reading and writing four tensors once.
    least, bound = seconds(chip, loop, "half", heads=2, tokens=4096, dim=128, density=1e-4)
    assert bound == "memory"
    assert math.isclose(least, 4 * 2 * 4096 * 128 * 2 / 2039e9)


def test_more_instructions_bound_a_loop_by_issue():
    loop = Loop("forward", 128, 64, 128, 8, 1200)
    _, bound = seconds(CHIPS["sm_80"], loop, "half", heads=1, tokens=4096, dim=128)
    assert bound == "issue"
