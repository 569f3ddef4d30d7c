"""What the doctor finds, on this machine and on machines that are worse off, or richer."""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from render import fakes
from typer.testing import CliRunner

import attn_control
from attn_control import doctor, kernels
from attn_control.cli import app
from attn_control.doctor import machine


def find(findings, name):
    (found,) = [each for each in findings if each.name == name]
    return found


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    fakes.install_zoo(monkeypatch, tmp_path / "zoo")
    return tmp_path / "zoo"


def test_a_healthy_machine(healthy):
    findings = doctor.examine()
    assert not doctor.failed(findings), [each for each in findings if each.status == "FAIL"]
    for name in ("attn-control", "python", "platform", "torch", "diffusers", "numpy", "device"):
        assert find(findings, name).detail
    assert find(findings, "torch").detail == metadata.version("torch")
    assert str(healthy) in find(findings, "model shapes-sd3").detail


def test_two_distributions_of_opencv_are_a_warning(monkeypatch):
    both = {"cv2": ["opencv-python", "opencv-python-headless", "opencv-python"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: both)
    found = machine._opencv()
    assert found.status == "WARN" and "2 distributions" in found.detail
    assert "opencv-python-headless" in found.detail


def test_one_distribution_of_opencv_is_named():
    found = machine._opencv()
    assert found.status in ("PASS", "WARN") and "opencv" in found.detail


def test_no_opencv(monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert machine._opencv().status == "FAIL"


@pytest.mark.parametrize(
    ("system", "words"), [("win32", "none for this system"), ("linux", "not installed")]
)
def test_triton_is_missed_by_nothing(monkeypatch, system, words):
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    monkeypatch.setattr(machine.sys, "platform", system)
    found = machine._triton()
    assert found.status == "PASS" and words in found.detail and "torch" in found.detail


def test_missing_and_old_packages(monkeypatch):
    monkeypatch.setattr(machine, "_NEEDED", ("torch", "no-such-package", "diffusers"))
    versions = {"torch": "2.13.0+cpu", "diffusers": "0.30.0", "peft": "0.17"}
    monkeypatch.setattr(machine, "version_of", versions.get)
    found = machine._packages()
    assert [each.status for each in found] == ["PASS", "FAIL", "FAIL"]
    assert found[2].detail == "0.30.0, but attn-control needs >=0.36"


def test_a_missing_model(healthy):
    (healthy / "model_index.json").unlink()
    found = find(doctor.examine(), "model shapes-sd3")
    assert found.status == "FAIL" and "model_index.json" in found.detail


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def haunted():
        raise RuntimeError("libcuda is haunted")

    monkeypatch.setattr(machine, "_device", haunted)
    found = find(doctor.examine(), "haunted")
    assert found.status == "FAIL" and found.detail == "RuntimeError: libcuda is haunted"


# ---- devices by name


def gpu(monkeypatch, hip=None, cuda=None):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (30_000_000_000, 48_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", cuda)


def test_cuda(monkeypatch):
    gpu(monkeypatch, cuda="13.0")
    assert machine._device().detail == "CUDA 13.0: 2 x Some GPU, 30 of 48 GB free"
    assert "torch on CUDA 13.0" in machine._ops().detail


def test_rocm_goes_by_its_own_name(monkeypatch):
    gpu(monkeypatch, hip="6.4.2")
    found = machine._device()
    assert found.detail.startswith("ROCm 6.4.2, which torch calls cuda: 2 x Some GPU")
    assert found.figures["backend"] == "ROCm 6.4.2" and found.figures["torch_device"] == "cuda"


def test_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no float64" in machine._device().detail
    assert machine._ops().detail.startswith("torch on MPS, in float32 at least and never float64")


def test_a_build_for_a_gpu_that_sees_none_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = machine._device()
    assert found.status == "WARN" and "torch built for CUDA 13.0" in found.detail


# ---- what runs, and why


def test_every_op_of_the_kernels_is_told_and_none_has_a_triton_kernel():
    """The line would be a lie as soon as one had: then it has to say which runs. `attend` and
    `probe` have, but there the caller chooses.
    """
    folder = Path(kernels.__file__).parent
    for file in folder.rglob("*.py"):
        if file.parent.name in ("triton", "report") or file.name.startswith("aot"):
            continue
        assert not re.search(r"import triton|from triton", file.read_text()), file
    told = set(machine.ops())
    assert set(kernels.TARGETS) <= told
    structure = {
        "attend",
        "probe",
        "explain",
        "Choice",
        "Blend",
        "Gates",
        "Region",
        "TARGETS",
        "PATHS",
        "Target",
        "gaussian",
    }
    ops = {name.lower() for name in set(kernels.__all__) - structure}
    assert ops <= told, "a new op: add it to doctor.machine.ops()"


def test_another_attention_backend_is_told(monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    assert machine._softmax().status == "PASS"
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.FLEX)
    found = machine._softmax()
    assert found.status == "WARN" and "'flex'" in found.detail and "masks" in found.detail


def test_a_folder_called_kernels_is_told(monkeypatch, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    # transformers tries to import kernels, and then tests/kernels answers to that name.
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.setattr(machine, "version_of", lambda name: None)
    (found,) = machine._kernels()
    assert found.status == "WARN" and str(tmp_path) in found.detail

    class Installed:
        def locate_file(self, name):
            return tmp_path / "elsewhere" / name

    monkeypatch.setattr(machine, "version_of", lambda name: "0.14")
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed())
    (found,) = machine._kernels()
    assert found.status == "FAIL" and "hides" in found.detail


# ---- printing


def test_lines_are_aligned_and_told_as_they_come(capsys):
    def slowly():
        yield doctor.Finding("PASS", "a", "x")
        assert capsys.readouterr().out == "PASS  a     x\n"
        yield doctor.Finding("WARN", "long", "y")

    told = doctor.print_findings(slowly(), width=4)
    assert capsys.readouterr().out == "WARN  long  y\n" and [each.name for each in told] == [
        "a",
        "long",
    ]


def test_variables_that_change_what_happens_are_told(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", "/tmp/zoo")
    (found,) = machine._environment()
    assert found.figures == {"ATTN_CONTROL_ZOO_DIR": "/tmp/zoo", "HF_HUB_OFFLINE": "1"}
    for name in machine._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert machine._environment() == []


def test_the_json_of_the_command_holds_everything(healthy, tmp_path):
    file = tmp_path / "report.json"
    done = CliRunner().invoke(app, ["doctor", "--json", str(file)])
    assert done.exit_code == 0, done.output
    content = json.loads(file.read_text())
    assert content["failed"] is False and content["model"] is None and content["checks"] == []
    lines = {each["name"]: each for each in content["machine"]}
    assert lines["attn-control"]["detail"] == attn_control.__version__
    assert lines["ops"]["figures"]["implementation"]["identity"] == "torch"
    for name in lines:
        assert name in done.output


def test_a_json_that_cannot_be_written_is_one_error(healthy, tmp_path):
    done = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path / "no" / "x.json")])
    assert done.exit_code == 2 and "error: --json" in done.output


def test_a_failing_machine_ends_with_1(healthy, monkeypatch):
    monkeypatch.setattr(machine, "_NEEDED", ("no-such-package",))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1
