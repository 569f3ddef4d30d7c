"""Peak memory of a call: from the allocator on CUDA, else from the tensors that are alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attn_control.doctor.finding import Finding
from attn_control.doctor.patient import Patient
from attn_control.processors import Control, HeadGate, SoftPAG

LIMIT = 1.6  # of the plain call: what a guided step may take
SLACK = 1 << 16  # bytes: counters and gates


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made while it is active, at their peak; weights are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # What is a view of an argument is not new, and may be a weight.
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (key := _key(leaf)) not in given:
                storage = leaf.untyped_storage()
                self._live[key] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: pair for key, pair in self._live.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(run: Callable[[], Any], device: torch.device) -> tuple[int, str]:
    """Bytes beyond what was there before, and what they count."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before, "allocated on the GPU"
    mode = LiveBytes()
    with mode:
        run()
    return mode.peak, "of living tensors"


def memory(p: Patient) -> Finding:
    """A call alone, attached with no control, and guided by one head."""
    device = next(p.model.parameters()).device
    plain, kind = peak_bytes(p.predict, device)
    idle, _ = peak_bytes(lambda: p.under(), device)
    control = _control(p)
    guided, _ = peak_bytes(lambda: p.under(control), device)
    ratio = guided / max(plain, 1)
    figures = {"plain": plain, "empty": idle, "controlled": guided, "counts": kind}
    detail = (
        f"{plain / 2**20:.2f} MiB {kind} beside the weights; {idle / 2**20:.2f} attached with no"
        f" control, {guided / 2**20:.2f} with {type(control).__name__} ({ratio:.2f} x)"
    )
    if idle > plain + SLACK:
        return Finding("FAIL", "peak memory", f"{detail}: attaching alone takes memory", figures)
    if guided > LIMIT * plain + SLACK:
        return Finding("FAIL", "peak memory", f"{detail}: expected at most {LIMIT} x", figures)
    return Finding("PASS", "peak memory", detail, figures)


def _control(p: Patient) -> Control:
    own = [site for site in p.sites if p.guides(site)]
    if own:
        return SoftPAG(f"{own[-1].label}H0", u=0.5, scale=1.0)
    return HeadGate(f"{p.sites[-1].label}H0", gain=0.5)
