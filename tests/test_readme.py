"""The README's tables are made here, from what really runs; its code is run.

After a change: ``UPDATE_README=1 pytest tests/test_readme.py`` writes the tables anew.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import pytest
import test_attach_only
import test_z_image
import tiny
import tiny_pipelines
import torch
from made_tables import held
from tiny_attach_only import ATTACH_ONLY, SEVERAL
from tiny_more import MORE, more_inputs
from tiny_pictures import PICTURES
from tiny_videos import VIDEOS

from attn_control import AttnControlError, attach
from attn_control.call import Layout, Softmax, sample_of
from attn_control.families import FAMILIES, Family, family_of
from attn_control.processors import CONTROLS, SPARSE, HeadGate, SoftPAG

README = Path(__file__).parent.parent / "README.md"
CFG = {
    "batched": "one call",
    "batched, cond first": "one call, cond first",
    "split": "two calls, or none",
}
# Where sparse ones fire is in docs/sparse-video.md, by tests/sparse/test_models.py.
ALL = [name for name, cls in CONTROLS.items() if cls not in SPARSE]


def _order(layout: Layout | tuple[Softmax, ...] | None) -> str:
    if layout is None:
        return "not known yet"
    if isinstance(layout, tuple):
        return "; ".join(dict.fromkeys(_order(softmax.layout) for softmax in layout))
    names = "[" + ", ".join(dict.fromkeys(s.role for s in layout.q)) + "]"
    if layout.is_self:
        return names
    return f"{names} -> [" + ", ".join(dict.fromkeys(s.role for s in layout.k)) + "]"


def _models() -> Iterator[tuple[str | None, Any, dict[str, Any]]]:
    """A tiny model of every family, with a call of it; a name where a row has several."""
    names = {"sd15": "SD 1.5", "sdxl": "SDXL", "sd3": "SD3", "sd35": "SD3.5"}
    for key, make in tiny.MODELS.items():
        yield names.get(key), make(), tiny.family_inputs(key)
    for key, make in MORE.items():
        yield None, make(), more_inputs(key)
    for wide in (PICTURES, VIDEOS, SEVERAL, ATTACH_ONLY):
        for one in wide.values():
            yield None, one.make(), one.call()
    yield None, test_z_image.MAKE(), test_z_image._call()
    yield None, *test_attach_only._animatediff()


def _fires(model: Any, call: dict[str, Any], control: Any) -> bool:
    """The control fires on this model, changes its prediction, and leaves no trace."""
    with torch.no_grad():
        plain = sample_of(model(**call, return_dict=False))
        try:
            with attach(model, control) as session:
                acted = sample_of(model(**call, return_dict=False))
        except AttnControlError:
            return False
        again = sample_of(model(**call, return_dict=False))
    fired = session.report().controls[0].fired
    return fired and not torch.equal(plain, acted) and torch.equal(plain, again)


def _controls() -> list[Any]:
    return [
        SoftPAG("all"),
        CONTROLS["SEG"]("all", sigma=1.0),
        CONTROLS["SkipLayers"]("all", u=0.5),
        CONTROLS["NAG"](),
        HeadGate("all"),
    ]


def _model_row(family: Family, name: str | None, model: Any, call: dict[str, Any]) -> str:
    with attach(model) as session:
        sites = session.sites
    orders = [_order(family.layout(site, call, model) if family.layout else None) for site in sites]
    works = [type(c).__name__ for c in _controls() if _fires(model, call, c)]
    cells = [
        name or family.name,
        f"`{family.denoiser}`",
        "; ".join(dict.fromkeys(orders)),
        CFG[family.cfg],
        "all" if sorted(works) == sorted(ALL) else ", ".join(works),
    ]
    return "| " + " | ".join(cells) + " |"


def models_table() -> str:
    rows, seen = {}, set()
    for name, model, call in _models():
        family = family_of(model)
        seen.add(family.denoiser)
        rows.setdefault(name or family.name, _model_row(family, name, model, call))
    assert seen == {family.denoiser for family in FAMILIES}, "a family has no tiny model"
    head = "| model | denoiser | tokens | CFG | controls that fire |"
    return "\n".join([head, "|---|---|---|---|---|", *rows.values()])


def _first_sentence(cls: type) -> str:
    text = " ".join((cls.__doc__ or "").split()).replace("``", "`")
    return text.split(". ")[0].rstrip(".")


def methods_table() -> str:
    head = "| control | what it does | options | extra forward | as a bare processor |"
    rows = []
    for name, cls in CONTROLS.items():
        control = cls("L0") if name != "NAG" else cls()
        try:
            control.processors(tiny.sd3())
            bare = "yes"
        except AttnControlError:
            bare = "no"
        options = ", ".join(f"`{f.name}`" for f in fields(cls))
        extra = "one a step" if control.guidance_scale is not None else "none"
        extra = "cond rows twice" if control.appends else extra
        rows.append(f"| `{name}` | {_first_sentence(cls)} | {options} | {extra} | {bare} |")
    return "\n".join([head, "|---|---|---|---|---|", *rows])


@pytest.mark.slow
@pytest.mark.parametrize("name, make", [("models", models_table), ("methods", methods_table)])
def test_tables_in_the_readme_are_what_the_code_does(name, make):
    held(README, name, "tests/test_readme.py", make())


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.fixture
def collected():
    """A model with bare processors is a cycle: until it is collected, names stay redirected."""
    yield
    gc.collect()


@pytest.mark.usefixtures("collected")
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
