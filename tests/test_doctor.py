"""What the doctor finds, on this machine and on machines that are worse off."""

from __future__ import annotations

from importlib import metadata

import pytest
from render import fakes

from attn_control import doctor


def find(findings, name):
    (found,) = [each for each in findings if each.name == name]
    return found


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    fakes.install_zoo(monkeypatch, tmp_path / "zoo")
    return tmp_path / "zoo"


def test_a_healthy_machine(healthy):
    findings = doctor.examine()
    assert not [each for each in findings if each.status == "FAIL"]
    for name in ("attn-control", "python", "platform", "torch", "diffusers", "numpy", "device"):
        assert find(findings, name).detail
    assert find(findings, "torch").detail == metadata.version("torch")
    assert str(healthy) in find(findings, "model shapes-sd3").detail


def test_two_distributions_of_opencv_are_a_warning(monkeypatch):
    both = {"cv2": ["opencv-python", "opencv-python-headless", "opencv-python"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: both)
    (found,) = doctor._opencv()
    assert found.status == "WARN" and "2 distributions" in found.detail
    assert "opencv-python-headless" in found.detail


def test_one_distribution_of_opencv_is_named():
    (found,) = doctor._opencv()
    assert found.status in ("PASS", "WARN") and "opencv" in found.detail


def test_no_opencv_and_no_triton(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor._opencv()[0].status == "FAIL"
    assert doctor._triton()[0].status == "WARN"


def test_a_missing_package(monkeypatch):
    monkeypatch.setattr(doctor, "_NEEDED", ("torch", "no-such-package"))
    assert [each.status for each in doctor._packages()] == ["PASS", "FAIL"]


def test_a_missing_model(healthy):
    (healthy / "model_index.json").unlink()
    found = find(doctor.examine(), "model shapes-sd3")
    assert found.status == "FAIL" and "model_index.json" in found.detail


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def broken():
        raise RuntimeError("libcuda is haunted")

    monkeypatch.setattr(doctor, "_device", broken)
    assert "libcuda is haunted" in find(doctor.examine(), "broken").detail


def test_lines_are_aligned(capsys):
    doctor.print_findings([doctor.Finding("PASS", "a", "x"), doctor.Finding("WARN", "long", "y")])
    assert capsys.readouterr().out == "PASS  a     x\nWARN  long  y\n"
