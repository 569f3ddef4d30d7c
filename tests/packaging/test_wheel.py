"""What the wheel carries: everything the package needs at run time, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def build(kind: str, out: Path) -> Path:
    command = [sys.executable, "-m", "build", kind, "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    with zipfile.ZipFile(build("--wheel", tmp_path_factory.mktemp("dist"))) as archive:
        yield archive


def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(wheel.read(name).decode())


def test_its_only_top_level_name_is_ours(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"attn_control"}


def test_carries_the_licence_and_the_type_marker(wheel):
    names = wheel.namelist()
    assert "attn_control/py.typed" in names
    (licence,) = (name for name in names if name.endswith("licenses/LICENSE"))
    assert b"Apache License" in wheel.read(licence)


def test_carries_every_committed_file_of_the_package(wheel):
    """Weights, model cards, jobs, prompts: hatchling leaves out what .gitignore names."""
    tracked = subprocess.run(
        ["git", "ls-files", "attn_control"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    missing = sorted(set(tracked.stdout.splitlines()) - set(wheel.namelist()))
    assert not [name for name in missing if (ROOT / name).exists()]


def test_carries_the_quickstart(wheel):
    names = wheel.namelist()
    assert [name for name in names if name.endswith("/quickstart.yaml")]
    assert "attn_control/zoo/models/shapes-sd3/model_index.json" in names
    weights = [name for name in names if name.endswith(".safetensors")]
    assert weights
    shipped = sum(wheel.getinfo(name).file_size for name in weights if "/shapes-sd3/" in name)
    assert shipped <= 12e6, f"{shipped=}"


def test_leaves_caches_and_checkpoints_out(wheel):
    for name in wheel.namelist():
        assert not name.endswith((".pyc", ".pt", ".ckpt", ".pkl", ".bin")), name
        assert "/runs/" not in name and "__pycache__" not in name, name


def test_names_the_extras_and_the_command(wheel):
    data = metadata(wheel)
    assert {"demo", "ray", "nlp", "dev"} <= set(data.get_all("Provides-Extra"))
    assert data["License-Expression"] == "Apache-2.0"
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "attn-control = attn_control.cli:app" in wheel.read(name).decode()


def test_caps_no_dependency_and_asks_triton_for_no_version(wheel):
    needs = [need for need in metadata(wheel).get_all("Requires-Dist") if "extra ==" not in need]
    for need in needs:
        wanted = need.split(";")[0]
        assert "<" not in wanted and "==" not in wanted and "~=" not in wanted, need
    (triton,) = (need for need in needs if need.startswith("triton"))
    assert triton.replace('"', "'") == "triton; sys_platform == 'linux'"
    assert not [need for need in needs if need.startswith("torchvision")]


def test_the_source_distribution_is_small_and_whole(tmp_path):
    with tarfile.open(build("--sdist", tmp_path)) as archive:
        sizes = {member.name.split("/", 1)[1]: member.size for member in archive.getmembers()}
    assert {"LICENSE", "Makefile", "constraints.txt", "attn_control/py.typed"} <= set(sizes)
    tops = {name.split("/")[0] for name in sizes}
    assert not tops & {".venv", ".git", "out", "renders", "dist"}, tops
    assert sum(sizes.values()) < 40e6, sorted(sizes, key=sizes.get)[-5:]
