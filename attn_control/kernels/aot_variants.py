"""Which kernels `kernels.aot` compiles: for which chips, head dims, precisions and extras."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from attn_control.kernels.chips import CHIPS

KERNELS = ("forward", "of_queries", "of_keys", "row_sums", "probe")
WALKS = KERNELS[:3]
"""Those that walk lists, and so have a dense twin and a matrix product in a loop."""
DIMS = (64, 128)
EXTRAS = ("cut", "bool", "added", "orders", "groups", "after")
"""As `aot_compile.Shape` has them; the last is forward's alone."""


@dataclass(frozen=True)
class Variant:
    """dtype: "bf16", "fp16", "tf32" (float32 on the matrix unit) or "fp32" (exact products, which
    no matrix unit has). extra: one of `EXTRAS`, or nothing.
    """

    target: str
    kernel: str
    dim: int
    dtype: str = "bf16"
    extra: str = ""

    @property
    def precision(self) -> str:
        """As `chips` names peaks."""
        return {"tf32": "tf32", "fp32": "single"}.get(self.dtype, "half")

    @property
    def plain(self) -> bool:
        """Whether it is held to the dense kernel: on whole tiles that does the same work, and in
        its loop over those a kernel for cut tiles as well does, too.
        """
        return self.kernel in WALKS and self.extra in ("", "cut") and self.precision == "half"

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.extra}".strip()


# One of each kind, where a second chip or kernel would say the same again. All of them together
# with `DIMS` on every chip are what CI has time for. gfx942 is beside the tutorial in float16.
FEW = [
    *(Variant("sm_80", kernel, 128, "tf32") for kernel in WALKS),
    Variant("sm_80", "forward", 128, "fp16"),
    Variant("sm_80", "forward", 32, "fp32"),
    Variant("sm_80", "forward", 128, "fp32"),
    Variant("sm_80", "of_queries", 128, "fp32"),
    Variant("sm_80", "forward", 128, extra="bool"),
    Variant("sm_80", "forward", 32, extra="bool"),
    Variant("gfx942", "forward", 128, extra="added"),
    Variant("sm_90", "forward", 64, extra="cut"),
    Variant("sm_80", "of_queries", 64, extra="cut"),
    Variant("sm_80", "of_queries", 128, extra="cut"),
    Variant("sm_90", "of_queries", 128, extra="cut"),
    Variant("sm_100", "of_keys", 128, extra="cut"),
    Variant("gfx942", "of_keys", 64, extra="cut"),
    Variant("gfx942", "of_queries", 64, extra="cut"),
    Variant("sm_100", "forward", 64, extra="cut"),
    Variant("sm_120", "forward", 32, extra="cut"),
    Variant("sm_100", "of_keys", 32, extra="cut"),
    *(Variant("gfx942", kernel, dim, "fp16") for kernel in WALKS for dim in (64, 128)),
    Variant("sm_100", "of_keys", 64, extra="cut"),
    Variant("sm_80", "forward", 256, "fp32", "cut"),  # 16 columns, half a word of a mask's bits
    Variant("gfx942", "of_queries", 256, extra="added"),  # the same
    Variant("sm_90", "of_queries", 256, extra="cut"),
    Variant("sm_120", "of_keys", 64, extra="added"),
    Variant("sm_80", "of_queries", 128, extra="orders"),
    Variant("sm_80", "row_sums", 128),
    Variant("sm_90", "forward", 32),
    Variant("sm_90", "of_keys", 256),
    Variant("sm_90", "forward", 128, extra="orders"),
    Variant("sm_90", "of_keys", 128, extra="groups"),
    Variant("sm_90", "forward", 128, extra="after"),
    Variant("sm_90", "of_queries", 128, extra="added"),
    Variant("gfx942", "row_sums", 128),
    Variant("sm_90", "probe", 128),
    Variant("gfx942", "probe", 64),
]


def plain(targets: Sequence[str], kernels: Sequence[str], dims: Sequence[int]) -> list[Variant]:
    """bfloat16 without extras: every chip, head dim and kernel that is asked for."""
    return [Variant(target, kernel, dim) for target, dim, kernel in product(targets, dims, kernels)]


def every(targets: Sequence[str], kernels: Sequence[str], dims: Sequence[int]) -> list[Variant]:
    """Beside `plain`, every precision, and every extra in bfloat16."""
    found = []
    for base in plain(targets, [kernel for kernel in kernels if kernel in WALKS], dims):
        found += [replace(base, dtype=dtype) for dtype in ("fp16", "tf32", "fp32")]
        found += [replace(base, extra=extra) for extra in EXTRAS if extra != "after"]
        if base.kernel == "forward":
            found.append(replace(base, extra="after"))
    return found


def chosen(
    targets: Sequence[str] | None,
    kernels: Sequence[str] | None,
    dims: Sequence[int] | None,
    extras: str,
) -> list[Variant]:
    """What the command line asks for; extras: "none", "few" or "all"."""
    targets, names = targets or [*CHIPS], kernels or WALKS
    found = plain(targets, names, dims or DIMS)
    if extras == "few":
        found += [
            each for each in FEW if each.target in targets and each.kernel in (kernels or KERNELS)
        ]
    if extras == "all":
        found += every(targets, names, dims or DIMS)
        if not kernels:
            found += plain(targets, KERNELS[len(WALKS) :], dims or DIMS)
    return list(dict.fromkeys(found))
