"""Presets: each acts on a model of its checkpoint's proportions, and is refused elsewhere.

docs/presets.md is generated here: ``UPDATE_README=1 pytest tests/test_presets.py`` writes it anew.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from tiny_published import PUBLISHED, published
from typer.testing import CliRunner

import attn_control
from attn_control import AttnControlError, attach, catalog
from attn_control.cli import app
from attn_control.families import FAMILIES
from attn_control.processors import CONTROLS, HeadGate, StepPolicy
from attn_control.render import job_from_text
from attn_control.render.prepare import prepare

ROOT = Path(__file__).parent.parent
PRESETS = {each.name: each for each in attn_control.presets()}
model_of = cache(published)


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_each_acts_on_a_model_of_its_checkpoints_proportions(name):
    model, call = model_of(PRESETS[name].model)
    # A bare model has no sampler, and so no window.
    controls = [_bare(each) for each in attn_control.preset(name)]
    plain = model(**call, return_dict=False)[0]
    with attach(model, *controls, strict=True) as session:
        acted = model(**call, return_dict=False)[0]
    for control, record in zip(controls, session.report().controls, strict=True):
        assert record.fired
        # By hand, from the selector's text: which blocks are named.
        named = {site["label"].split(".")[0] for site in record.sites.values()}
        assert control.heads == "all" or named == set(_layers(control.heads))
    dense = all(record.density == 1 for record in session.report().controls if record.layers)
    assert not torch.equal(acted, plain) or (controls[0].sparse and dense)
    assert torch.equal(model(**call, return_dict=False)[0], plain)


def _bare(control: Any) -> Any:
    """The control without what needs a sampler, or a video of more than a few tokens."""
    changes: dict[str, Any] = {"window": "0-1"}
    if control.sparse:
        bare = StepPolicy(first=0, refresh=None, layers=control.policy.layers)
        changes |= {"correction": "none", "policy": bare}
    if hasattr(control, "samples"):
        changes["target_density"] = 1.0  # a dozen tokens cannot be sparse
    return dataclasses.replace(control, **changes)


def _layers(text: str) -> list[str]:
    found = []
    for item in text.split(", "):
        first, _, last = item.removeprefix("L").split(".")[0].split("H")[0].partition("-")
        found += [f"L{n}" for n in range(int(first), int(last or first) + 1)]
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_every_option_of_the_file_reaches_its_control(name):
    entry = yaml.safe_load((ROOT / "attn_control" / "presets.yaml").read_text())[name]
    controls = attn_control.preset(name)
    assert len(controls) == len(entry["controls"])
    for control, written in zip(controls, entry["controls"], strict=True):
        ((cls, options),) = written.items()
        assert type(control) is CONTROLS[cls]
        if "policy" in options:
            options["policy"] = StepPolicy(**options["policy"])
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        assert {key: getattr(control, key) for key in options} == options


@pytest.mark.parametrize("name", PRESETS)
def test_each_entry_says_where_it_comes_from_and_who_verified_it(name):
    each = PRESETS[name]
    assert each.family in {family.name for family in FAMILIES}
    assert each.model in PUBLISHED
    paths = [word.strip(",") for word in each.source.split() if word.startswith("examples/jobs/")]
    assert "arXiv" in each.source or "diffusers" in each.source or paths
    assert all((ROOT / path).exists() for path in paths)
    assert each.verified == (each.model == "shapes-sd3"), "run it before you claim it"
    assert each.verified_on.startswith(("nothing: published", "shapes-sd3"))


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("sd3-pag", tiny.flux, "FLUX.1: 4 layers of 2 heads"),
        ("flux.1-schnell-nag", tiny.sd3, "SD3, SD3.5: 3 layers"),
        ("sdxl-seg", lambda: model_of("stable-diffusion-v1-5/stable-diffusion-v1-5")[0], "16 lay"),
        ("sd3-heads-dark", lambda: tiny.sd3(layers=24), "24 layers of 4 heads"),
        (
            "sd35-medium-slg",
            lambda: model_of(PRESETS["sd3-pag"].model)[0],
            "heads, joint attention",
        ),
    ],
)
def test_another_family_or_size_is_refused_with_both_named(name, make, words):
    model = make()
    with pytest.raises(AttnControlError) as error:
        attach(model, *attn_control.preset(name))
    text = str(error.value)
    assert text.startswith(f"preset {name!r}: ")
    assert PRESETS[name].model in text and words in text and "write the control out" in text
    assert "_attn_control" not in vars(model), "left something behind"


def test_a_changed_control_is_the_users_own():
    (control,) = attn_control.preset("sd3-heads-dark")
    mine = dataclasses.replace(control, heads="L1H2", scale=1.0)
    attach(tiny.sd3(), mine).close()


def test_the_bare_processor_refuses_other_models_too():
    entry = dataclasses.replace(PRESETS["sd3-pag"], options=(("HeadGate", {"heads": "L1H2"}),))
    (control,) = entry.controls()
    with pytest.raises(AttnControlError, match="3 layers of 4 heads"):
        control.processors(tiny.sd3())
    assert control == HeadGate("L1H2") and str(control) == "HeadGate(heads='L1H2')"


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(AttnControlError, match="did you mean 'sd3-pag'; there are: sd15-pag, "):
        attn_control.preset("sd3_pag")


def test_each_call_gives_fresh_controls():
    first, second = (attn_control.preset("sd3-pag")[0] for _ in range(2))
    assert first == second and first is not second
    assert first.made_for == PRESETS["sd3-pag"] and HeadGate("L0").made_for is None


def test_the_names_are_functions_of_the_package_without_torch():
    code = (
        "import sys, attn_control\n"
        "assert 'torch' not in sys.modules\n"
        "names = [each.name for each in attn_control.presets()]\n"
        "import attn_control.catalog\n"
        "assert callable(attn_control.presets) and callable(attn_control.preset)\n"
        "print(len(names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(len(PRESETS)), done.stderr


def test_an_entry_with_a_key_that_nobody_reads_is_an_error(monkeypatch, tmp_path):
    entry: dict[str, Any] = yaml.safe_load(catalog._FILE.read_text())["sd3-pag"]
    (tmp_path / "presets.yaml").write_text(yaml.safe_dump({"x": {**entry, "sclae": 3}}))
    monkeypatch.setattr(catalog, "_FILE", tmp_path / "presets.yaml")
    with pytest.raises(TypeError, match="sclae"):
        catalog._presets.__wrapped__()


# ---- in jobs and on the command line

JOB = """\
model: shapes-sd3
prompts: [a red circle]
seeds: 0
sampler: {num_inference_steps: 2, guidance_scale: 1.0}
variants:
  by name:
    preset: shapes-sd3-heads
    controls:
      - HeadGate: {heads: L1H0, gain: 0.5}
  by hand:
    controls:
      - SoftPAG: {heads: "L3H2, L0H1, L0H0, L5H3", u: 1.0, scale: 1.0}
      - HeadGate: {heads: L1H0, gain: 0.5}
"""


def prepared(tmp_path: Path, text: str) -> Any:
    job, source = job_from_text(text)
    return prepare(job, source, tmp_path / "out")


@pytest.mark.slow
def test_a_preset_in_a_job_is_the_controls_written_out(tmp_path):
    made = prepared(tmp_path, JOB)
    by_name, by_hand = made.variants
    assert by_name.described == by_hand.described and len(by_name.described) == 2
    assert made.tasks[0].settings == made.tasks[1].settings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("shapes-sd3-head", "job:7:5: variants.by name.preset: no preset 'shapes-sd3-head'; did"),
        ("sd3-pag", "job:7:5: variants.by name.preset: preset 'sd3-pag': SoftPAG("),
        ("7", "variants.by name.preset: expected a valid string, got 7"),
    ],
)
def test_a_preset_that_does_not_fit_a_job_is_told_with_its_place(tmp_path, written, words):
    with pytest.raises(AttnControlError) as error:
        prepared(tmp_path, JOB.replace("shapes-sd3-heads", written))
    assert words in str(error.value), str(error.value)


def test_the_command_lists_them_and_shows_one_whole():
    listed = CliRunner().invoke(app, ["presets"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()] == list(PRESETS)
    assert listed.output.count("(not run by us)") == sum(not p.verified for p in PRESETS.values())
    for name, each in PRESETS.items():
        shown = CliRunner().invoke(app, ["presets", name]).output
        for text in (each.model, each.source, each.verified_on, each.note, each.title):
            assert text in shown
        for cls, options in each.options:
            assert f"{cls}: {_flow(options)}" in shown
    missing = CliRunner().invoke(app, ["presets", "sd3_pag"])
    assert missing.exit_code == 2 and "did you mean 'sd3-pag'" in missing.output


# ---- the page

HEAD = """\
# Presets

Named sets of controls, with the figures of papers and public code. Generated from
`attn_control/presets.yaml` by `UPDATE_README=1 pytest tests/test_presets.py`.

```python
from attn_control import attach, preset

with attach(pipe, *preset("sd35-medium-slg")):
    image = pipe("a lighthouse at dusk").images[0]
```

In a job, beside further controls or alone: `preset: sd35-medium-slg` in a variant
([jobs](render.md)). On the command line, `attn-control presets` lists them and
`attn-control presets NAME` shows one.

A preset's controls refuse another family, and another size of the same one, since layers and heads
are numbers within one model. `dataclasses.replace(control, scale=2.0)` makes a control of your own,
which is no longer held to that model. Sampler settings of a source are told, never applied.

**Nothing below was run by us on its checkpoint unless "verified on" says so.** What is tested for
each: it attaches to a model with the layers and heads of its checkpoint, next to no width and
random weights, acts there, and every option arrives.

| preset | for | what it sets | verified on |
|---|---|---|---|
"""


def _flow(options: dict[str, Any]) -> str:
    """Options as a job file writes them."""
    return yaml.safe_dump(options, default_flow_style=True, sort_keys=False, width=1000).strip()


def page() -> str:
    rows, parts = [], []
    for each in PRESETS.values():
        controls = "; ".join(f"`{cls}: {_flow(options)}`" for cls, options in each.options)
        rows.append(f"| `{each.name}` | {each.model} | {controls} | {each.verified_on} |")
        lines = [f"### `{each.name}`", f"{each.title}.", f"Source: {each.source}."]
        if each.settings:
            settings = ", ".join(f"{key} {value}" for key, value in each.settings.items())
            lines.append(f"With, in the source: {settings}.")
        if each.note:
            lines.append(f"Note: {each.note}.")
        parts.append("\n\n".join(lines))
    return HEAD + "\n".join(rows) + "\n\n" + "\n\n".join(parts) + "\n"


def test_the_page_is_what_the_file_says():
    path = ROOT / "docs" / "presets.md"
    if os.environ.get("UPDATE_README"):
        path.write_text(page(), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == page(), f"UPDATE_README=1 pytest {__file__}"
