"""What this machine has and lacks for attn-control, one line a finding."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec

_NEEDED = ("torch", "diffusers", "transformers", "numpy", "safetensors", "huggingface_hub")


@dataclass(frozen=True)
class Finding:
    """PASS: as it should be. WARN: works, with a limit. FAIL: something will not work."""

    status: str
    name: str
    detail: str


def examine() -> list[Finding]:
    """Look at everything; a check that itself breaks is a FAIL, never a traceback."""
    checks: list[Callable[[], list[Finding]]] = [
        _python, _packages, _device, _triton, _opencv, _models,
    ]  # fmt: skip
    found = []
    for check in checks:
        try:
            found += check()
        except Exception as error:  # a broken installation may raise anything
            name = check.__name__.strip("_")
            found.append(Finding("FAIL", name, f"{type(error).__name__}: {error}"))
    return found


def print_findings(findings: list[Finding], *, as_json: bool = False) -> None:
    """One line a finding, or a JSON list."""
    if as_json:
        print(json.dumps([asdict(each) for each in findings], indent=2))
        return
    width = max(len(each.name) for each in findings)
    for each in findings:
        print(f"{each.status:4}  {each.name:{width}}  {each.detail}")


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
    return [
        Finding("PASS" if version else "FAIL", name, version or "not installed")
        for name, version in ((name, version_of(name)) for name in _NEEDED)
    ]


def _device() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        free, total = torch.cuda.mem_get_info(0)
        name = torch.cuda.get_device_name(0)
        return [
            Finding(
                "PASS",
                "device",
                f"cuda, {count} x {name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free",
            )
        ]
    if torch.backends.mps.is_available():
        return [Finding("PASS", "device", "mps (Apple)")]
    built = (
        f"torch built for CUDA {torch.version.cuda}"
        if torch.version.cuda
        else "a CPU build of torch"
    )
    detail = (
        f"cpu with {torch.get_num_threads()} threads, no GPU ({built}); built-in models run well"
    )
    return [Finding("WARN" if torch.version.cuda else "PASS", "device", detail)]


def _triton() -> list[Finding]:
    if find_spec("triton") is None:
        return [Finding("WARN", "triton", "not installed: attention runs on torch alone")]
    return [Finding("PASS", "triton", version_of("triton") or "importable, version unknown")]


def _opencv() -> list[Finding]:
    if find_spec("cv2") is None:
        return [Finding("FAIL", "cv2", "not importable: pip install opencv-python-headless")]
    owners = sorted(set(metadata.packages_distributions().get("cv2", [])))
    named = ", ".join(f"{owner} {version_of(owner)}" for owner in owners)
    if len(owners) > 1:
        # They unpack into the same folder; whichever came last wins, and removing one breaks both.
        return [
            Finding("WARN", "cv2", f"provided by {len(owners)} distributions ({named}): keep one")
        ]
    return [Finding("PASS", "cv2", f"from {named or 'an unknown distribution'}")]


def _models() -> list[Finding]:
    from pathlib import Path

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
