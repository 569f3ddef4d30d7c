"""Every job that we show is a job: built in, in the examples, and in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attn_control.catalog import preset
from attn_control.processors import build_control
from attn_control.render import job_from_text, load_job
from attn_control.render.command import quickstart_job
from attn_control.render.prompts import read_prompts

ROOT = Path(__file__).parents[2]
FILES = [quickstart_job(), *sorted((ROOT / "examples" / "jobs").glob("*.yaml"))]
DOCS = ROOT / "docs" / "render.md"
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_job_file_is_valid(path):
    job, source = load_job(path)
    assert read_prompts(job, source, path.parent)
    for variant in job.variants.values():
        for control in variant.controls:
            build_control(control.name, dict(control.options))


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_job_in_the_documentation_is_valid(number):
    job, source = job_from_text(BLOCKS[number], f"docs/render.md, block {number + 1}")
    assert read_prompts(job, source, DOCS.parent)
    for variant in job.variants.values():
        for control in variant.controls:
            build_control(control.name, dict(control.options))


def test_the_documentation_has_its_examples():
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("name", ["flux.yaml", "sd3.yaml"])
def test_jobs_that_we_could_not_run_say_so(name):
    text = (ROOT / "examples" / "jobs" / name).read_text(encoding="utf-8")
    assert text.startswith("# NOT RUN by us")


@pytest.mark.parametrize(
    "name,pipeline",
    [("flux.yaml", "FluxPipeline"), ("sd3.yaml", "StableDiffusion3Pipeline")],
)
def test_the_hub_examples_fit_the_signatures_of_their_pipelines(name, pipeline):
    import diffusers

    from attn_control.render.signature import check_pipeline, check_samplers

    job, source = load_job(ROOT / "examples" / "jobs" / name)
    pipe = object.__new__(getattr(diffusers, pipeline))
    pipe.vae_scale_factor, pipe.transformer = 8, None
    check_pipeline(pipe)
    merged = {
        name: {**job.sampler.kwargs(), **each.sampler.kwargs()}
        for name, each in job.variants.items()
    }
    check_samplers(pipe, job, source, merged)


def test_the_quickstart_has_the_five_variants_of_the_comparison():
    job, _ = load_job(quickstart_job())
    assert list(job.variants) == [
        "no guidance",
        "CFG",
        "layer PAG",
        "SoftPAG heads",
        "CFG + SoftPAG heads",
    ]
    assert job.compare == ["no guidance", "CFG"]
    scales = {
        name: variant.sampler.guidance_scale or job.sampler.guidance_scale
        for name, variant in job.variants.items()
    }
    assert [name for name, scale in scales.items() if scale > 1] == [
        "CFG",
        "CFG + SoftPAG heads",
    ]
    (layer,) = preset(job.variants["layer PAG"].preset)
    assert re.fullmatch(r"L\d+", layer.heads)
    (chosen,) = preset(job.variants["SoftPAG heads"].preset)
    assert job.variants["SoftPAG heads"].preset == job.variants["CFG + SoftPAG heads"].preset
    assert all("H" in item for item in chosen.heads.split(","))


def test_the_quickstart_shares_no_prompt_with_the_screen_of_heads():
    """The heads were chosen on other prompts: see examples/jobs/screen_heads.py."""
    import importlib.util

    path = ROOT / "examples" / "jobs" / "screen_heads.py"
    spec = importlib.util.spec_from_file_location("screen_heads", path)
    screen = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(screen)
    job, _ = load_job(quickstart_job())
    shown = set(job.prompts.texts)
    assert not shown & set(screen.new_prompts(60, 1, set(shown)))
