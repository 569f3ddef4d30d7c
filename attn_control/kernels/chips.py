"""GPUs by their datasheets: what a program may take of them, and what they could do at best.

Peaks are the vendors' own, without structured sparsity, and no chip reaches them: what is computed
from them is a model, and is called one wherever it is shown. What one multiprocessor (AMD: compute
unit) does in a cycle is the peak over multiprocessors and clock, so that the three agree.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """shared: KiB a program may have; of a whole multiprocessor each: shared_all KiB, warps,
    registers of 32 bits, handed out in steps of ``step`` a lane.

    multiprocessors, clock: GHz, the one that the matrix peaks are stated for. half: TFLOP/s of
    products of float16 or bfloat16 summed in float32; tf32 likewise; single: of float32 without a
    matrix unit. bandwidth: GB/s of the memory. issue: warp instructions a multiprocessor begins in
    a cycle; exponents: exp2 it finishes in one (both of the CUDA programming guide's and the CDNA 3
    documents' throughput tables). source: of the peaks.
    """

    name: str
    shared: int
    shared_all: int
    warps: int
    multiprocessors: int
    clock: float
    half: float
    tf32: float
    single: float
    bandwidth: float
    source: str
    registers: int = 1 << 16
    lanes: int = 32
    step: int = 8
    issue: float = 4.0
    exponents: float = 16.0

    def a_cycle(self, precision: str) -> float:
        """Floating-point operations a multiprocessor does in one: "half", "tf32" or "single"."""
        peak = float(getattr(self, precision))
        return peak * 1e3 / (self.multiprocessors * self.clock)


# fmt: off
CHIPS = {
    #            name             shared all warps  mps  clock   half    tf32  single  GB/s  source
    "sm_80": Chip("A100 SXM 80 GB", 163, 164, 64, 108, 1.41,   312.0, 156.0,  19.5, 2039,
                  "NVIDIA A100 Tensor Core GPU datasheet"),
    "sm_86": Chip("A10",             99, 100, 48,  72, 1.695,  125.0,  62.5,  31.2,  600,
                  "NVIDIA A10 Tensor Core GPU datasheet"),
    "sm_89": Chip("L4",              99, 100, 48,  58, 2.04,   121.0,  60.0,  30.3,  300,
                  "NVIDIA L4 Tensor Core GPU datasheet, halved: it counts sparsity"),
    "sm_90": Chip("H100 SXM",       227, 228, 64, 132, 1.83,   989.4, 494.7,  66.9, 3350,
                  "NVIDIA H100 Tensor Core GPU architecture whitepaper"),
    "sm_100": Chip("B200",          227, 228, 64, 148, 1.86,  2250.0, 1100.0, 80.0, 8000,
                   "NVIDIA Blackwell architecture technical brief, HGX B200"),
    "sm_120": Chip("RTX 5090",       99, 100, 48, 170, 2.407,  209.5, 104.8, 104.8, 1792,
                   "NVIDIA RTX Blackwell GPU architecture whitepaper"),
    "gfx942": Chip("MI300X",         64,  64, 32, 304, 2.1,   1307.4, 653.7, 163.4, 5300,
                   "AMD Instinct MI300X accelerator data sheet",
                   registers=1 << 17, lanes=64, issue=1.0),
}
"""By what code is compiled for; where several chips run the same code, one of them."""

OTHERS = (
    Chip("H200",     227, 228, 64, 132, 1.83,  989.4, 494.7, 66.9, 4800,
         "NVIDIA H200 Tensor Core GPU datasheet"),
    Chip("RTX 3090",  99, 100, 48,  82, 1.695,  71.0,  35.6, 35.6,  936,
         "NVIDIA Ampere GA102 GPU architecture whitepaper"),
    Chip("RTX 4090",  99, 100, 48, 128, 2.52,  165.2,  82.6, 82.6, 1008,
         "NVIDIA Ada GPU architecture whitepaper"),
)
# fmt: on


def chip_of(name: str, target: str) -> Chip | None:
    """The row of the device ``name``, as its driver spells it, or that of the chip that stands for
    all with the same code, or None where there is neither.
    """
    words = set(name.replace("-", " ").split())
    for chip in (*CHIPS.values(), *OTHERS):
        model = chip.name.removesuffix(" SXM").removesuffix(" SXM 80 GB")
        if set(model.split()) <= words:
            return chip
    return CHIPS.get(target)
