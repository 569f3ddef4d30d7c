"""The README's tables are made here, from what really runs; its code is run.

After a change: ``UPDATE_README=1 pytest tests/test_readme.py`` writes the tables anew.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import tiny_pipelines
import torch

from attn_control import AttnControlError, attach
from attn_control.call import Layout
from attn_control.families import FAMILIES, Family, family_of
from attn_control.processors import CONTROLS, HeadGate, SoftPAG

README = Path(__file__).parent.parent / "README.md"
CFG = {"batched": "one call, rows [uncond, cond]", "split": "two calls, or none"}


def _order(layout: Layout) -> str:
    names = [s.role for s in layout.q]
    if layout.is_self:
        return "[" + ", ".join(names) + "]"
    return f"{', '.join(names)} -> {', '.join(s.role for s in layout.k)}"


def _works(model: Any, call: dict[str, Any], control: Any) -> bool:
    """The control fires on this model, changes its prediction, and leaves no trace."""
    with torch.no_grad():
        plain = model(**call, return_dict=False)[0]
        with attach(model, control) as session:
            acted = model(**call, return_dict=False)[0]
        again = model(**call, return_dict=False)[0]
    fired = session.report().controls[0].fired
    return fired and not torch.equal(plain, acted) and torch.equal(plain, again)


def _model_row(family: Family, name: str) -> str:
    model, call = tiny.MODELS[name](), tiny.family_inputs(name)
    with attach(model) as session:
        sites = session.sites
    slots = list(dict.fromkeys(site.slot for site in sites))
    orders = [_order(family.layout(site, call, model)) for site in sites]
    works = [c for c in (SoftPAG("L0-1"), HeadGate("L0-1")) if _works(model, call, c)]
    cells = [
        {"sd35": "SD3.5", "sd3": "SD3", "sd15": "SD 1.5", "sdxl": "SDXL"}.get(name, family.name),
        f"`{family.denoiser}`",
        ", ".join(slots),
        "; ".join(dict.fromkeys(orders)),
        CFG[family.cfg],
        ", ".join(type(c).__name__ for c in works),
    ]
    return "| " + " | ".join(cells) + " |"


def models_table() -> str:
    head = "| model | denoiser | attention | tokens | guidance | controls that fire |"
    rows = [_model_row(family_of(make()), name) for name, make in tiny.MODELS.items()]
    probed = {family_of(make()).name for make in tiny.MODELS.values()}
    assert probed == {family.name for family in FAMILIES}, "a family has no tiny model"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def methods_table() -> str:
    head = "| control | what it does | options | extra forward | as a bare processor |"
    rows = []
    for name, cls in CONTROLS.items():
        control = cls("L0H0")
        try:
            control.processors(tiny.sd3())
            bare = "yes"
        except AttnControlError:
            bare = "no"
        what = (cls.__doc__ or "").strip().split("\n\n")[0].split(". ")[0].strip(".").replace("``", "`")
        what = " ".join(what.split())
        options = ", ".join(f"`{f.name}`" for f in fields(cls))
        extra = "one a step" if control.guidance_scale is not None else "none"
        rows.append(f"| `{name}` | {what} | {options} | {extra} | {bare} |")
    return "\n".join([head, "|---|---|---|---|---|", *rows])


@pytest.mark.parametrize("name, make", [("models", models_table), ("methods", methods_table)])
def test_tables_in_the_readme_are_what_the_code_does(name, make):
    begin, end = f"<!-- {name}: made by tests/test_readme.py -->", f"<!-- /{name} -->"
    text = README.read_text()
    assert begin in text and end in text
    before, rest = text.split(begin)
    old, after = rest.split(end)
    table = make()
    if os.environ.get("UPDATE_README"):
        README.write_text(f"{before}{begin}\n{table}\n{end}{after}")
    else:
        assert old.strip() == table, "the table has drifted: UPDATE_README=1 pytest " + __file__


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.parametrize("number", range(len(_blocks())))
def test_python_in_the_readme_runs(number, monkeypatch, tmp_path):
    """As printed, but for the checkpoint: from_pretrained gives a tiny FLUX of as many blocks."""
    pipe, call = tiny_pipelines.flux(tiny.flux(double=19, single=38, heads=24))

    class Loaded:
        transformer = pipe.transformer
        scheduler = pipe.scheduler

        def __call__(self, prompt: str) -> Any:
            assert isinstance(prompt, str)
            return pipe(**call | {"num_inference_steps": 2})

    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", lambda *a, **k: Loaded())
    monkeypatch.chdir(tmp_path)
    exec(compile(_blocks()[number], f"README block {number}", "exec"), {})
