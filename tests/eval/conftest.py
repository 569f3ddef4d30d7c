"""A pipeline that paints by the scenes' own brush, right or wrong by the seed: quick and exact."""

from __future__ import annotations

import types

import numpy as np
import pytest
from eval.sparse_suite import SUITE as SPARSE_SUITE
from PIL import Image
from render import fakes
from tiny_zoo import export_tiny

from attn_control import zoo
from attn_control.zoo.scenes import draw, parse_caption, place

SUITE = """\
question: Does guidance help the painter?
measurements:
  paint:
    baseline: plain
    groups: [{objects: 1}, {objects: 2}, {}]
    planted: {variant: plain, share: 0.5}
    job:
      model: shapes-sd3
      prompts: {zoo: shapes-sd3, split: seen, spread: 40}
      seeds: own
      sampler: {num_inference_steps: 2, guidance_scale: 1.0}
      variants:
        plain: {}
        guided: {sampler: {guidance_scale: 3.0}}
bars:
  - {job: paint, variant: guided, where: {objects: 1}, target: 0.6, floor: 0.4}
  - {job: paint, variant: guided, against: plain, target: 0.9}
"""


def is_right(seed: int, guidance: float) -> bool:
    """Which pictures the painter gets right: a quarter plain, three quarters guided."""
    return seed * 2654435761 % 2**32 % 97 % 4 < (3 if guidance > 1 else 1)


class Painter:
    """Draws the caption, or the same scene without its objects."""

    vae_scale_factor = 8
    scheduler = types.SimpleNamespace()

    def __init__(self):
        self.calls = 0
        self.stop_at = None

    def set_progress_bar_config(self, **_):
        pass

    def __call__(
        self, prompt=None, height=128, width=128, num_inference_steps=2, guidance_scale=1.0,
        negative_prompt=None, generator=None, output_type="pil", max_sequence_length=1,
    ):  # fmt: skip
        self.calls += 1
        if self.stop_at == self.calls:
            raise KeyboardInterrupt
        seed = generator.initial_seed()
        scene = place(parse_caption(prompt), np.random.default_rng(seed))
        if not is_right(seed, guidance_scale):
            scene = types.SimpleNamespace(objects=(), background_rgb=scene.background_rgb)
        pixels = draw(scene)
        pixels[0, 0] ^= 8  # a speck: a picture of one colour would be reported as blank
        return types.SimpleNamespace(images=[Image.fromarray(pixels)])


@pytest.fixture
def painter(monkeypatch):
    pipe = Painter()
    monkeypatch.setattr(zoo, "load", lambda name, *, device="cpu", dtype=None: pipe)
    monkeypatch.setattr("attn_control.attach", fakes.fake_attach([]), raising=False)
    return pipe


@pytest.fixture
def suite(tmp_path):
    """Writes a suite file; `old` and `new` change its text."""
    from attn_control.eval.suite import load_suite

    def write(old="", new="", load=True):
        path = tmp_path / "suite.yaml"
        assert old in SUITE
        path.write_text(SUITE.replace(old, new, 1) if old else SUITE)
        return load_suite(str(path)) if load else path

    return write


@pytest.fixture(scope="session")
def wan_toy(tmp_path_factory):
    """A folder with a toy of shapes-wan."""
    return export_tiny(tmp_path_factory.mktemp("wan"), "shapes-wan")


@pytest.fixture
def sparse_suite(tmp_path, wan_toy, monkeypatch):
    """Writes a suite of sparse attention, on a toy; pairs of old and new change its text."""
    from attn_control.eval.suite import load_suite

    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(wan_toy))

    def write(*changes, text=SPARSE_SUITE):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "sparse.yaml").write_text(text)
        return load_suite(str(tmp_path / "sparse.yaml"))

    return write
