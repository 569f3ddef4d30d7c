"""Corrections: what is added to sparse attention so that it stands for the dense one.

All need outputs and log-sum-exps only, so that they go with any mask and any executor. At a refresh
dense attention runs, and the mask beside it: O, L are output and log-sum-exp of the one, S, M of
the other. Later, with fresh s, m, the output is

    none       s
    share      O                                  (DiTFastAttn, arXiv 2406.08552: output share)
    residual   s + (O - S)                        (the same: window attention with residual)
    rho        r s + (O - r S),  r = exp(M - L)   (Re-ttention, arXiv 2505.22918)
    lse        what the mask left out, as one more set of keys: its output C and its log-sum-exp
               N are kept, exp(L) O = exp(M) S + exp(N) C, and s and C are put together by m and N

With s = S and m = M each but the first gives O: at the refresh itself dense is what is returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Correction:
    """One way to correct.

    begin: (O, L, S, M) -> what is kept; apply: (s, m, kept, levels since the refresh, gain) -> the
        output.
    sparse: whether the mask runs at a refresh and after it; lse: whether log-sum-exps are needed.
    """

    begin: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensors]
    apply: Callable[[Tensor, Tensor | None, Tensors, int, float], Tensor]
    keeps: bool = True
    sparse: bool = True
    lse: bool = False


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _residual_begin(
    dense: Tensor, _: Tensor | None, masked: Tensor | None, __: Tensor | None
) -> Tensors:
    assert masked is not None
    return {"rest": (_wide(dense) - _wide(masked)).to(dense.dtype)}


def _residual(masked: Tensor, _: Tensor | None, kept: Tensors, __: int, ___: float) -> Tensor:
    return (_wide(masked) + _wide(kept["rest"])).to(masked.dtype)


def _rho_begin(
    dense: Tensor, lse: Tensor | None, masked: Tensor | None, masked_lse: Tensor | None
) -> Tensors:
    assert lse is not None and masked is not None and masked_lse is not None
    rho = torch.exp(masked_lse - lse).clamp(max=1.0)
    rest = _wide(dense) - rho[..., None].to(_wide(masked).dtype) * _wide(masked)
    return {"rest": rest.to(dense.dtype), "rho": rho}


def _rho(masked: Tensor, _: Tensor | None, kept: Tensors, levels: int, gain: float) -> Tensor:
    # Re-ttention adds its lambda after each sparse step, so that the first has none. It lets the
    # ratio pass 1; a share of attention cannot.
    rho = (kept["rho"] + gain * (levels - 1)).clamp(max=1.0)[..., None]
    wide = _wide(masked)
    return (rho.to(wide.dtype) * wide + _wide(kept["rest"])).to(masked.dtype)


def _lse_begin(
    dense: Tensor, lse: Tensor | None, masked: Tensor | None, masked_lse: Tensor | None
) -> Tensors:
    assert lse is not None and masked is not None and masked_lse is not None
    share = torch.exp(masked_lse - lse).clamp(max=1.0)
    left = 1 - share
    # Where (nearly) nothing is left out there is nothing to add; 1 - share is rounding there.
    some = left > 1e-6
    wide = _wide(dense) - share[..., None].to(_wide(masked).dtype) * _wide(masked)
    rest = wide / left.clamp(min=1e-6)[..., None].to(wide.dtype)
    return {
        "rest": rest.where(some[..., None], torch.zeros_like(rest)).to(dense.dtype),
        "rest_lse": (lse + left.clamp(min=1e-6).log()).masked_fill(~some, float("-inf")),
    }


def _lse(masked: Tensor, masked_lse: Tensor | None, kept: Tensors, _: int, __: float) -> Tensor:
    assert masked_lse is not None
    weight = torch.sigmoid(masked_lse - kept["rest_lse"])[..., None]
    # Queries that read nothing, then or now, have no log-sum-exp to weigh by.
    weight = torch.nan_to_num(weight, nan=1.0)
    wide = _wide(masked)
    weight = weight.to(wide.dtype)
    return (weight * wide + (1 - weight) * _wide(kept["rest"])).to(masked.dtype)


CORRECTIONS: dict[str, Correction] = {
    "none": Correction(lambda *_: {}, lambda masked, *_: masked, keeps=False),
    "share": Correction(
        lambda dense, *_: {"dense": dense},
        lambda masked, _, kept, *__: kept["dense"],
        sparse=False,
    ),
    "residual": Correction(_residual_begin, _residual),
    "rho": Correction(_rho_begin, _rho, lse=True),
    "lse": Correction(_lse_begin, _lse, lse=True),
}
