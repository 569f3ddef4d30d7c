"""Every control keeps to its window and to its heads or layers, in whole runs."""

from __future__ import annotations

import pytest
import tiny
import tiny_pipelines
import torch
from guides_shared import run

from attn_control import attach
from attn_control.processors import NAG, SEG, HeadGate, SkipLayers, SoftPAG

CONTROLS = {
    "SoftPAG": (lambda **o: SoftPAG(**o), "L0H1", "L1H1"),
    "SoftPAG in place": (lambda **o: SoftPAG(u=-0.5, **o), "L0H1", "L1H1"),
    "SEG": (lambda **o: SEG(sigma=1.0, **o), "L0H1", "L1H1"),
    "SkipLayers": (lambda **o: SkipLayers(u=0.5, **o), "L0", "L1"),
    "NAG": (lambda **o: NAG(**o), "L0", "all"),
    "HeadGate": (lambda **o: HeadGate(**o), "L0H1", "L1H1"),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_the_window_decides_which_steps_differ(name):
    make, heads, _ = CONTROLS[name]
    pipe, call = tiny_pipelines.sd3()
    results = {}
    for window, steps in (("0-0.5", [0, 1]), ("0.5-1", [2, 3]), ("0-1", [0, 1, 2, 3])):
        with attach(pipe, make(heads=heads, window=window)) as session:
            results[window] = tiny_pipelines.render(pipe, call)
        assert list(session.report().controls[0].steps.values()) == [steps]
    assert len({tuple(value.flatten().tolist()) for value in results.values()}) == 3


@pytest.mark.parametrize("name", CONTROLS)
def test_the_selector_decides_where_it_acts(name):
    make, one, other = CONTROLS[name]
    model, call = tiny.sd3(), tiny.inputs("sd3")
    found = []
    for heads in (one, other):
        with attach(model, make(heads=heads)) as session:
            found.append(run(model, call))
        sites = session.report().controls[0].sites.values()
        assert {site["label"] for site in sites if site["calls"]} == (
            {"L0.joint", "L1.joint", "L2.joint"} if heads == "all" else {f"{heads[:2]}.joint"}
        )
    assert not torch.allclose(found[0], found[1], atol=1e-4)
