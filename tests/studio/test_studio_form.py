"""From the page's fields to controls and YAML, and back: nothing is lost, nothing is added."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_control import zoo
from attn_control.processors import CONTROLS, build_control
from attn_control.render import job_from_text
from attn_control.studio.examples import EXAMPLES
from attn_control.studio.form import controls_of, form_of
from attn_control.studio.grid import Layer, cells_of, text_of
from attn_control.studio.settings import Refused
from attn_control.studio.tabs import METHODS, TABS


def test_a_tab_is_a_file_and_a_section_a_control():
    assert len({tab.NAME for tab in TABS}) == len(TABS)
    for method in METHODS:
        known = {each.name for each in fields(CONTROLS[method.control])}
        assert {field.option.partition(".")[0] for field in method.fields} <= known, method.control


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.control)
def test_each_section_says_what_it_does_in_two_sentences_with_its_paper(method):
    assert method.about.count(". ") + method.about.endswith(".") == 2, method.about
    assert method.paper.startswith("https://arxiv.org/abs/")
    assert method.paper.rpartition("/")[2] in method.paper_name


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.control)
def test_every_section_opens_off_and_becomes_its_control_when_switched_on(method):
    form, _ = form_of((), METHODS)
    assert controls_of(form, METHODS, 100) == ()
    form[f"{method.control}.on"] = True
    if f"{method.control}.heads" in form:
        form[f"{method.control}.heads"] = "L2"
    ((name, options),) = controls_of(form, METHODS, 100)
    assert name == method.control
    build_control(name, options)


OPTIONS = [
    ("RadialAttention", {"decay_factor": 0.5, "policy": {"first": 2, "refresh": 3}}),
    ("RadialAttention", {"target_density": 0.4, "policy": {"drift": 0.1, "layers": "L0"}}),
    ("TileAttention", {"heads": "L1", "tiles": 3, "correction": "lse"}),
    ("SpatialTemporalAttention", {"target_density": 0.2, "policy": {"refresh": None}}),
    ("SelectedAttention", {"keep": 1}),
    ("SelectedAttention", {"keep": 1.0}),
    ("SelectedAttention", {"top_p": 0.9}),
    ("SelectedAttention", {"threshold": 0.1, "score": "sampled", "samples": 8, "near": [1, 2, 2]}),
    ("SelectedAttention", {"keep": 0.3, "select_at": "step", "correction": "none"}),
    ("ReshapedAttention", {"width": 0.001}),
    ("ReshapedAttention", {"correction": "none", "policy": {"layers": "L0"}}),
    ("AutoSparse", {"target_density": 0.4, "samples": 32, "heads": "L1"}),
    ("SoftPAG", {"heads": "L3H2", "u": 0.5, "scale": 2.0, "op": "uniform", "window": "0.2-0.5"}),
    ("SoftPAG", {"heads": "L3", "u": {"L3": 0.3}, "scale": 1.0}),
    ("SoftPAG", {"heads": "L3", "scale": 40.0, "parallel": 0, "limit": 0.3, "window": "sigma 9-1"}),
    ("SEG", {"heads": "L1", "sigma": float("inf")}),
    ("SkipLayers", {"heads": "L1-3", "stochastic": 1, "seed": 7}),
    ("NAG", {}),
    ("NAG", {"heads": "L2.cross", "alpha": 0.5, "order": 2}),
    ("HeadGate", {"heads": "L0H1", "gain": 1.5}),
]


@pytest.mark.parametrize("control", OPTIONS, ids=str)
def test_a_control_survives_the_page(control):
    """Also what the page has no field for: it goes through 'more options'."""
    form, left = form_of([control], METHODS)
    assert not left
    ((name, options),) = controls_of(form, METHODS, 500)
    assert build_control(name, options) == build_control(*control)


@settings(max_examples=60, deadline=None)
@given(
    u=st.floats(0, 1),
    scale=st.floats(0, 10),
    ends=st.tuples(st.integers(0, 99), st.integers(1, 100)).filter(lambda e: e[0] < e[1]),
    op=st.sampled_from(["identity", "uniform", "permute"]),
)
def test_what_the_fields_say_is_what_the_control_gets(u, scale, ends, op):
    form, _ = form_of((), METHODS)
    form |= {"SoftPAG.on": True, "SoftPAG.heads": " L3H1,  L5 ", "SoftPAG.u": u}
    form |= {"SoftPAG.scale": scale, "SoftPAG.op": op}
    form |= {"SoftPAG.from": ends[0] / 100, "SoftPAG.to": ends[1] / 100}
    ((name, options),) = controls_of(form, METHODS, 100)
    built = build_control(name, options)
    assert (built.u, built.scale, built.op) == (u, scale, op)
    assert (built.when.first, built.when.last) == (ends[0] / 100, ends[1] / 100)
    assert built.selector.terms == build_control(name, {"heads": "L3H1, L5"}).selector.terms


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SoftPAG.heads": ""}, ["no head is chosen"]),
        ({"SoftPAG.heads": "H3"}, ["expected a layer such as L3"]),
        ({"SoftPAG.heads": 7}, ["must be text"]),
        ({"SoftPAG.heads": "L1, " * 200}, ["characters"]),
        ({"SoftPAG.u": None}, ["u, strength must be a number"]),
        ({"SoftPAG.u": "0.5"}, ["must be a number", "'0.5'"]),
        ({"SoftPAG.u": float("nan")}, ["must be a number"]),
        ({"SoftPAG.u": 3.0}, ["between -1 and 1"]),
        ({"SoftPAG.scale": True}, ["scale must be a number"]),
        ({"SoftPAG.op": "eval"}, ["must be one of"]),
        ({"SoftPAG.op": ["identity"]}, ["must be one of"]),
        ({"SoftPAG.from": 0.5, "SoftPAG.to": 0.2}, ["needs 0 <= first < last <= 1"]),
        ({"SoftPAG.more": "{paralel: 0}"}, ["unknown option 'paralel'", "parallel"]),
        ({"SoftPAG.more": "[1, 2"}, ["more options"]),
        ({"SoftPAG.more": "{" * 90}, ["more options"]),
        ({"SoftPAG.more": "!!python/object/apply:os.system ['true']"}, ["more options"]),
        ({"SoftPAG.more": 5}, ["characters of text"]),
        ({"SoftPAG.more": "seed: 3"}, ["seed is for op='permute'"]),
    ],
)
def test_a_wrong_field_is_refused_in_its_own_section(change, words):
    form, _ = form_of((), METHODS)
    form |= {"SoftPAG.on": True, "SoftPAG.heads": "L3", **change}
    with pytest.raises(Refused) as caught:
        controls_of(form, METHODS, 200)
    assert caught.value.place == "SoftPAG"
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.label)
def test_every_example_fits_the_page(example):
    form, left = form_of(example.controls, METHODS)
    assert not left and controls_of(form, METHODS, 100)
    assert zoo.is_scorable(example.model, example.prompt), "the scorer has something to say"


LAYERS = [Layer(0, 4), Layer(1, 4), Layer(2, 2), Layer(4, 8)]


@settings(max_examples=200, deadline=None)
@given(
    cells=st.dictionaries(
        st.sampled_from([0, 1, 2, 4]), st.sets(st.integers(0, 7), min_size=1), max_size=4
    )
)
def test_the_grid_and_its_selector_are_one(cells):
    fits = {
        layer.number: cells[layer.number] & set(range(layer.heads))
        for layer in LAYERS
        if layer.number in cells
    }
    fits = {number: heads for number, heads in fits.items() if heads}
    assert cells_of(text_of(cells, LAYERS), LAYERS) == fits


def test_what_no_grid_shows_stays_in_the_selector():
    assert text_of({0: {0, 1, 2, 3}}, LAYERS, "L1.cross, controlnet:L2") == (
        "L0, L1.cross, controlnet:L2"
    )
    assert cells_of("L3H", LAYERS) == {} and cells_of("all", LAYERS)[4] == set(range(8))


def test_the_job_of_a_form_is_a_job(studio, form):
    job, _ = job_from_text(studio.job(form), "page")
    assert job.prompts.texts[0].prompt == "a red circle" and list(job.variants) == [
        "without",
        "with",
    ]
    opened, facts, notes = studio.open(studio.job(form))
    assert notes == [] and facts.model == "shapes-sd3"
    assert {key: form[key] for key in opened} == {**opened, "SoftPAG.heads": "L1H0, L0"}
    assert studio.job(opened) == studio.job(form)
