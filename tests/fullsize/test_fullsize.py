"""Every row on the published full-size config: sites, heads, sizes, layouts and memory of plans.

Nothing is loaded and nothing computed: the weights are on the meta device.
"""

from __future__ import annotations

import pytest
from fullsize.calls import CALLS
from fullsize.figures import FIGURES, Figures
from fullsize.measure import (
    NAMES,
    build,
    disagreements,
    plan_bytes,
    published,
    seen,
    sites_of,
)

from attn_control.families import FAMILIES
from attn_control.processors import SEG, HeadGate

NAMED_FOR_ITS_TRUNK = 0.25
"""How far above the size in its name a checkpoint may be that carries a note which says so."""


def test_every_family_has_a_published_checkpoint():
    classes = {published(name)["class"] for name in NAMES}
    assert classes == {family.denoiser for family in FAMILIES}
    assert set(FIGURES) == set(NAMES)
    known = {name for name in NAMES if FIGURES[name].layouts}
    assert set(CALLS) == known


@pytest.mark.parametrize("name", NAMES)
def test_every_config_says_where_it_is_from(name):
    one = published(name)
    assert one["source"] and one["file"].endswith("config.json")
    if one["checkpoint"] is None:
        assert "class defaults" in one["source"] and not one["config"]
    else:
        assert one["config"]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


def _billions(stated: str) -> float:
    return float(stated.removesuffix("B")) * 1e9


def test_figures_are_the_published_ones(name):
    found, one = seen(name), published(name)
    assert Figures(**vars(found)) == FIGURES[name]
    if one["stated"] is not None:
        above = found.elements / _billions(one["stated"]) - 1
        assert -0.12 < above < (NAMED_FOR_ITS_TRUNK if "note" in one else 0.12), above
    for field, size in (("bf16_bytes", 2), ("fp32_bytes", 4)):
        if field in one:  # of the checkpoint's own index of weights
            assert found.elements * size == one[field]


def test_the_softmax_has_the_tokens_that_the_layout_says(name):
    if name not in CALLS:
        pytest.skip("attach-only: no layout is claimed")
    assert disagreements(name) == []


def test_plans_are_small(name):
    """A plan holds a strength a head and a count a control; a blur also two matrices of each
    picture's height and width. Nothing in it is of tokens by tokens.
    """
    if name not in CALLS:
        pytest.skip("attach-only: plans are compiled from layouts")
    sites, model, call = sites_of(build(name)), build(name), CALLS[name]()
    gate = HeadGate(", ".join(site.label for site in sites), gain=0.5)
    softmaxes = {site: _layouts(site, call, model) for site in sites}
    expected = sum(4 * site.heads + 8 for site, found in softmaxes.items() for _ in found)
    assert plan_bytes(name, gate) == expected
    expected = 0
    for site, found in softmaxes.items():
        for layout in found if site.slot in SEG.slots else ():
            pictures = [s for s in layout.q if s.role in ("image", "video")]
            expected += (4 * site.heads + 8) * bool(pictures)
            for _, height, width in (segment.grid for segment in pictures):
                expected += 4 * (height**2 + width**2)
    if expected:
        assert plan_bytes(name, SEG("all", sigma=2.0)) == expected < 4 * 2**20


def _layouts(site, call, model):
    """Of each softmax of a processor call."""
    row = next(f for f in FAMILIES if f.denoiser == type(model).__name__)
    found = row.layout(site, call, model)
    return [softmax.layout for softmax in found] if isinstance(found, tuple) else [found]
