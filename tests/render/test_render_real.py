"""The renderer on real pipeline classes: real attach, real matching, real reports."""

from __future__ import annotations

import json
import os
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from render.fakes import JOB

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.render.command import quickstart_job, render

JOB_16 = JOB.replace("height: 32, width: 32", "height: 16, width: 16")


@pytest.fixture
def tiny_sd3(monkeypatch, tmp_path):
    """A stock SD3 pipeline of random weights, whose prompts become noise instead of features."""
    import tiny_pipelines

    pipe, _ = tiny_pipelines.sd3()

    def encode_prompt(prompt, do_classifier_free_guidance=True, **_):
        seed = torch.Generator().manual_seed(zlib.crc32(str(prompt).encode()))
        tokens, pooled = (
            torch.randn(2, 1, 5, 32, generator=seed),
            torch.randn(2, 1, 16, generator=seed),
        )
        return tokens[0], tokens[1], pooled[0], pooled[1]

    pipe.encode_prompt = encode_prompt
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(zoo, "path", lambda name: folder)
    monkeypatch.setattr(zoo, "load", lambda name, **_: pipe)
    monkeypatch.setattr(zoo, "defaults", lambda name: {"max_sequence_length": 5})
    return pipe


def write(tmp_path, text):
    (tmp_path / "job.yaml").write_text(text)
    return tmp_path / "job.yaml"


def test_a_job_on_a_stock_pipeline(tiny_sd3, tmp_path):
    classes = {name: type(each) for name, each in tiny_sd3.transformer.attn_processors.items()}
    text = JOB_16.replace("  soft:", "  soft:\n    sampler: {guidance_scale: 1.0}")
    outcome = render(write(tmp_path, text), tmp_path / "out")
    assert (outcome.made, outcome.notes) == (12, [])
    pictures = {
        (row["variant"], row["prompt"], row["seed"]): np.asarray(
            Image.open(tmp_path / "out" / "images" / row["file"])
        )
        for row in outcome.rows
    }
    plain, cfg, soft = (pictures[name, "a red circle", 0] for name in ("plain", "cfg", "soft"))
    assert not np.array_equal(plain, soft), "SoftPAG acted"
    assert not np.array_equal(plain, cfg)
    report = json.loads((tmp_path / "out" / "reports" / "soft.json").read_text())
    assert report["controls"][0]["fired"] and report["guided"]["calls"] == 12
    after = {name: type(each) for name, each in tiny_sd3.transformer.attn_processors.items()}
    assert after == classes, "the pipeline is its old self"


def test_an_idle_control_changes_no_bit(tiny_sd3, tmp_path):
    text = JOB_16.replace("u: 0.5", "u: 0.0")
    outcome = render(write(tmp_path, text), tmp_path / "out")
    assert outcome.notes == [], "asking for nothing is no failure"
    by_variant = {}
    for row in outcome.rows:
        pixels = np.asarray(Image.open(tmp_path / "out" / "images" / row["file"])).tobytes()
        by_variant.setdefault(row["variant"], []).append(pixels)
    assert by_variant["soft"] == by_variant["cfg"]


@pytest.mark.parametrize(
    "old,new,words",
    [
        ("heads: L1H0", "heads: L99H0", ["soft.controls[0]", "L99"]),
        ("heads: L1H0", "heads: L1H77", ["soft.controls[0]", "77"]),
        ("heads: L1H0", "heads: L1.cross", ["soft.controls[0]", "cross"]),
        ("heads: L1H0", "heads: L1H0, window: 0.4-0.5", ["soft.controls[0]", "0.4-0.5"]),
        ("height: 16", "height: 18", ["sampler.height", "18"]),
        ("width: 16", "extra: {true_cfg_scale: 2}", ["true_cfg_scale", "StableDiffusion3Pipeline"]),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_rendering(
    tiny_sd3, tmp_path, old, new, words
):
    with pytest.raises(AttnControlError) as caught:
        render(write(tmp_path, JOB_16.replace(old, new)), tmp_path / "out")
    for word in [*words, "job.yaml:"]:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_what_the_run_then_does(tiny_sd3, tmp_path):
    from rich.console import Console

    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    path = write(tmp_path, JOB_16)
    render(path, tmp_path / "out", dry_run=True, console=console)
    # plain 1 x 3, cfg 2 x 3, soft 2 x 3 and 3 of the cond row alone; four pictures each.
    assert "about 72 row-forwards" in console.export_text()
    render(path, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "reports" / "soft.json").read_text())
    # Four pictures of three steps: the pipeline's own passes, and one perturbed beside each.
    assert (report["plain"]["calls"], report["guided"]["calls"]) == (12, 12)


@pytest.mark.slow
def test_the_quickstart_passes_every_check_on_the_built_in_model(tmp_path):
    try:
        zoo.path("shapes-sd3")
    except AttnControlError:
        pytest.skip("the built-in model is not in the checkout yet")
    assert render(quickstart_job(), tmp_path / "out", dry_run=True) is None


def test_every_control_renders_with_its_defaults(tiny_sd3, tmp_path):
    """Its settings go into the picture as JSON, which knows no infinity (SEG's sigma)."""
    from attn_control.processors import CONTROLS

    start = JOB_16[: JOB_16.index("variants:")] + "variants:\n"
    # Sparse ones refuse sixteen tokens: tests/sparse runs them on tokens enough.
    names = [name for name, cls in CONTROLS.items() if not getattr(cls, "sparse", False)]
    needs = {name: "" if name == "NAG" else ": {heads: L1}" for name in names}
    lines = [
        f"  {n}: {{controls: [{{{n}{o}}}]}}" if o else f"  {n}: {{controls: [{n}]}}"
        for n, o in needs.items()
    ]
    outcome = render(write(tmp_path, start + "\n".join(lines) + "\n"), tmp_path / "out")
    assert outcome.made == 4 * len(names)
    sigma = {row["settings"]["controls"][0].get("sigma") for row in outcome.rows}
    assert sigma == {None, "inf"}
