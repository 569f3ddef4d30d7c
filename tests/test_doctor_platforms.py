"""Platforms that this machine is not: Apple GPUs have no float64, Windows has no triton."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_pipelines
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attn_control
from attn_control import attach
from attn_control.kernels import PATHS
from attn_control.processors import CONTROLS, NAG, SEG, HeadGate, SkipLayers, SoftPAG
from attn_control.processors.soft_pag import OPS

PACKAGE = str(Path(attn_control.__file__).parent)
WIDE = (torch.float64, torch.complex128)


class _Asker(TorchDispatchMode):
    """Keeps the places in our package that make a tensor of 64-bit floats.

    diffusers makes some of its own, for rotary embedding, and knows to leave them out on MPS: the
    innermost frame that is not torch's decides whose a tensor is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.dtype in WIDE for t in tree_leaves(out)):
            frame = sys._getframe(1)
            torchs = str(Path(torch.__file__).parent)
            while frame is not None and frame.f_code.co_filename.startswith(torchs):
                frame = frame.f_back
            if frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
                self.places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}: {func}")
        return out


@contextmanager
def no_float64() -> Iterator[None]:
    with _Asker() as asker:
        yield
    assert not asker.places, "\n".join(dict.fromkeys(asker.places))


def everything() -> dict[str, Any]:
    """Every control, with every option that computes otherwise."""
    text_ops = ("ii_softmax", "ii_mass")
    soft = {
        op: SoftPAG("L1H0-1", u=0.5, op=op, tokens="image" if op in text_ops else "all")
        for op in OPS
    }
    soft |= {path: SoftPAG("L1", u=0.3, path=path) for path in PATHS if path != "linear"}
    soft["in place"] = SoftPAG("L1H0", u=-0.5)
    soft["by head"] = SoftPAG("L0-1", u={"L0": 0.2, "L1": 0.7})
    soft["gates"] = SoftPAG.from_gates(torch.rand(3, 4))
    soft["combined"] = SoftPAG("L1", u=0.5, parallel=0.2, limit=0.1, rescale=0.5)
    skips = {what: SkipLayers("L1", u=0.5, what=what) for what in ("block", "attention")}
    skips |= {"feed-forward": SkipLayers("L1", what="feed_forward"), "whole": SkipLayers("L1")}
    return (
        soft
        | skips
        | {
            "seg": SEG("L1", sigma=0.8),
            "seg, infinite": SEG("L1"),
            "nag": NAG(),
            "nag, order 2": NAG(order=2),
            "gate": HeadGate("L1H2", gain=0.5),
        }
    )


def test_every_control_is_among_them():
    """All but sparse attention, which refuses as few tokens as there are here."""
    dense = {cls for cls in CONTROLS.values() if not getattr(cls, "sparse", False)}
    assert {type(each) for each in everything().values()} == dense


@pytest.mark.parametrize("name", everything())
@torch.no_grad()
def test_no_float64_in_a_controlled_call(name):
    model, call, control = tiny.sd3(), tiny.inputs("sd3"), everything()[name]
    with no_float64(), attach(model, control, strict=True) as session:
        model(**call)
        session.report()


@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
@torch.no_grad()
def test_no_float64_on_other_families(family):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    controls = [SoftPAG("L1H0", u=0.5), SEG("L0", sigma=0.8), NAG(), HeadGate("L1")]
    for control in controls:
        with no_float64(), attach(model, control, strict=True):
            model(**call)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_no_float64_in_a_pipeline_with_windows(name):
    pipe, call = tiny_pipelines.PIPELINES[name]()
    controls = [SoftPAG("L1H0", u=0.5, window="0-0.5"), HeadGate("L0H0", window="sigma 20-0.2")]
    with no_float64(), attach(pipe, *controls) as session:
        session.preview(4)
        tiny_pipelines.render(pipe, call)


@torch.no_grad()
def test_the_watcher_sees_a_float64_of_ours(monkeypatch):
    from attn_control.kernels import Gain

    real = Gain.__call__
    monkeypatch.setattr(Gain, "__call__", lambda s, out, c: real(s, out.double(), c).to(out.dtype))
    with pytest.raises(AssertionError, match="epilogues.py"):
        with no_float64(), attach(tiny.sd3(), HeadGate("L1H2")) as session:
            session._denoisers[0].model(**tiny.inputs("sd3"))


NO_TRITON = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] != "triton":
            return super().find_spec(name, path, target)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import pkgutil, importlib, warnings
import tiny, torch
import attn_control
from attn_control import attach
from test_doctor_platforms import everything
for module in pkgutil.walk_packages(attn_control.__path__, "attn_control."):
    if module.name != "attn_control.__main__" and ".zoo.train" not in module.name:
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            kernels = ("attn_control.kernels.triton.", "attn_control.kernels.aot_")
            if error.name != "triton" or not module.name.startswith(kernels):
                raise
model, call = tiny.sd3(), tiny.inputs("sd3")
with torch.no_grad():
    for control in everything().values():
        with attach(model, control, strict=True):
            model(**call)
from attn_control.doctor import machine
sys.platform = "win32"
found = machine._triton()
assert found.status == "PASS" and "none for this system" in found.detail, found
assert "triton" not in sys.modules
print("ran", len(everything()))
"""


@pytest.mark.slow
def test_everything_imports_and_every_control_runs_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", NO_TRITON],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        timeout=200,
    )
    assert done.stdout.strip() == f"ran {len(everything())}", done.stderr[-2000:]
