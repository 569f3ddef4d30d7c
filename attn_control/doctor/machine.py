"""What this machine has: versions, devices by name, and which implementation runs what, and why."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from attn_control.doctor.finding import Finding, attempt

_NEEDED = ("torch", "diffusers", "transformers", "numpy", "safetensors", "huggingface_hub")


def examine() -> list[Finding]:
    """Look at everything; a check that itself breaks is a FAIL."""
    checks = (
        *(_python, _packages, _device, _softmax, _ops, _triton, _opencv, _kernels),
        *(_environment, _models),
    )
    return [found for check in checks for found in attempt(check.__name__.strip("_"), check)]


def version_of(name: str) -> str | None:
    """The installed version of a distribution, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _python() -> list[Finding]:
    from attn_control import __version__

    status = "PASS" if sys.version_info >= (3, 10) else "FAIL"
    return [
        Finding("PASS", "attn-control", __version__),
        Finding(status, "python", f"{platform.python_version()}, {sys.executable}"),
        Finding("PASS", "platform", platform.platform()),
    ]


def _packages() -> list[Finding]:
    """What must be there, held against the versions that our own metadata asks for."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(text) for text in metadata.requires("attn-control") or ()]
    except metadata.PackageNotFoundError:  # a checkout on the path, never installed
        asked = []
    floors = {
        each.name.replace("-", "_"): each.specifier
        for each in asked
        if each.marker is None or each.marker.evaluate({"extra": ""})  # of extras: not asked for
    }
    found = []
    for name in _NEEDED:
        version, floor = version_of(name), floors.get(name)
        if version is None:
            found.append(Finding("FAIL", name, "not installed"))
        elif floor is not None and not floor.contains(version, prereleases=True):
            found.append(Finding("FAIL", name, f"{version}, but attn-control needs {floor}"))
        else:
            found.append(Finding("PASS", name, version))
    if version_of("peft") is None:
        found.append(Finding("WARN", "peft", "not installed: diffusers cannot load LoRA weights"))
    return found


def backend() -> tuple[str, str]:
    """The best backend of this machine, as torch and as people call it: ("cuda", "ROCm 6.2")."""
    import torch

    if torch.cuda.is_available():
        hip = torch.version.hip
        return "cuda", f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        return "mps", "MPS"
    return "cpu", "CPU"


def _device() -> Finding:
    import torch

    kind, name = backend()
    figures: dict[str, Any] = {"backend": name, "torch_device": kind}
    if kind == "cuda":
        count = torch.cuda.device_count()
        free, total = torch.cuda.mem_get_info(0)
        gpu = torch.cuda.get_device_name(0)
        figures |= {"gpu": gpu, "count": count, "free_bytes": free, "total_bytes": total}
        called = ", which torch calls cuda" if name.startswith("ROCm") else ""
        detail = f"{name}{called}: {count} x {gpu}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        return Finding("PASS", "device", detail, figures)
    if kind == "mps":
        return Finding("PASS", "device", "MPS (Apple); has no float64, and none is made", figures)
    threads = torch.get_num_threads()
    built = next(
        (
            f"torch built for {kind} {version}"
            for kind, version in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip))
            if version
        ),
        "a CPU build of torch",
    )
    # A build for a GPU that sees none is probably not what was meant.
    status = "PASS" if built == "a CPU build of torch" else "WARN"
    detail = f"CPU with {threads} threads, no GPU ({built}); built-in models run well"
    return Finding(status, "device", detail, {**figures, "threads": threads})


def _softmax() -> Finding:
    """Attention itself stays the user's: what diffusers runs here."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    active = _AttentionBackendRegistry.get_active_backend()[0].value
    figures = {
        "backend": active,
        "DIFFUSERS_ATTN_BACKEND": os.environ.get("DIFFUSERS_ATTN_BACKEND"),
    }
    if active == "native":
        detail = (
            "diffusers' native backend, torch's scaled_dot_product_attention; nothing replaces it"
        )
        return Finding("PASS", "softmax", detail, figures)
    detail = (
        f"diffusers' backend {active!r}, set for the whole process; models that call torch directly"
        " (SD 1.5, SDXL, SD3) do not use it, and some backends drop attention masks"
    )
    return Finding("WARN", "softmax", detail, figures)


def ops() -> tuple[str, ...]:
    """What controls compute beside the softmax."""
    from attn_control.kernels import TARGETS

    return (*TARGETS, "permute", "blur", "gain", "extrapolate")


def _ops() -> Finding:
    kind, name = backend()
    runs = {op: "torch" for op in ops()}
    detail = (
        f"torch on {name}, in float32 at least and never float64: {', '.join(runs)}; no other"
        " implementation of them exists"
    )
    return Finding("PASS", "ops", detail, {"device": kind, "implementation": runs})


def _triton() -> Finding:
    if find_spec("triton") is None:
        why = "has none for this system" if sys.platform in ("win32", "darwin") else "not installed"
        return Finding("PASS", "triton", f"{why}; nothing needs it, every op above runs on torch")
    version = version_of("triton") or "importable, version unknown"
    return Finding(
        "PASS", "triton", f"{version}; for attend(impl='triton'), every op above runs on torch"
    )


def _opencv() -> Finding:
    if find_spec("cv2") is None:
        return Finding("FAIL", "cv2", "not importable: pip install opencv-python-headless")
    owners = sorted(set(metadata.packages_distributions().get("cv2", [])))
    named = ", ".join(f"{owner} {version_of(owner)}" for owner in owners)
    if len(owners) > 1:
        # They unpack into the same folder; whichever came last wins, and removing one breaks both.
        detail = f"provided by {len(owners)} distributions ({named}): keep one"
        return Finding("WARN", "cv2", detail)
    return Finding("PASS", "cv2", f"from {named or 'an unknown distribution'}")


def _kernels() -> list[Finding]:
    """A folder called kernels on the path hides Hugging Face's package, which diffusers imports."""
    spec, version = find_spec("kernels"), version_of("kernels")
    if spec is None:
        return []
    place = spec.origin or next(iter(spec.submodule_search_locations or []), "?")
    if version is None:
        detail = f"{place} will be taken for Hugging Face's kernels; rename it, or start elsewhere"
        return [Finding("WARN", "kernels", detail)]
    own = Path(str(metadata.distribution("kernels").locate_file("kernels"))).resolve()
    if not Path(place).resolve().is_relative_to(own):
        detail = f"{place} hides Hugging Face's kernels {version}; diffusers may fail to import"
        return [Finding("FAIL", "kernels", detail)]
    return [Finding("PASS", "kernels", f"{version}, for backends from the hub")]


_VARIABLES = (
    "ATTN_CONTROL_ZOO_DIR",
    "CUDA_VISIBLE_DEVICES",
    "DIFFUSERS_ATTN_BACKEND",
    "HF_HUB_OFFLINE",
    "PYTORCH_ENABLE_MPS_FALLBACK",
)


def _environment() -> list[Finding]:
    """Variables that change what is found, loaded or run, as an offline hub does."""
    found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if not found:
        return []
    detail = ", ".join(f"{name}={value}" for name, value in found.items())
    return [Finding("PASS", "environment", detail, dict(found))]


def _models() -> list[Finding]:
    from attn_control import zoo

    found = []
    for name in zoo.NAMES:
        try:
            folder = Path(zoo.path(name))
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            if not (folder / "model_index.json").is_file():
                raise FileNotFoundError(f"no model_index.json in {folder}")
            found.append(Finding("PASS", f"model {name}", f"{size / 1e6:.1f} MB in {folder}"))
        except (OSError, ValueError) as error:
            found.append(Finding("FAIL", f"model {name}", str(error)))
    return found
