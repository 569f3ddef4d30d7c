"""A quick world for every test of this folder: no model is loaded and no attention is run."""

from __future__ import annotations

import pytest
from render import fakes


@pytest.fixture
def world(monkeypatch, tmp_path):
    """The fake pipeline; `.log` tells what was attached and closed, `.job` writes a job file."""
    pipe = fakes.install_zoo(monkeypatch, tmp_path / "zoo")
    pipe.log = []
    monkeypatch.setattr("attn_control.attach", fakes.fake_attach(pipe.log), raising=False)

    def write(text=fakes.JOB, name="job.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    pipe.job = write
    return pipe


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder with toy versions of shapes-flux and shapes-wan."""
    from tiny_zoo import export_tiny

    return export_tiny(tmp_path_factory.mktemp("toys"), "shapes-flux", "shapes-wan")


@pytest.fixture
def toy_zoo(toys, monkeypatch):
    """The zoo has these."""
    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(toys))
    return toys
