"""Selectors that name a component of the pipeline."""

from __future__ import annotations

import pytest
from tiny_editing import EDITING

from attn_control import AttnControlError, attach
from attn_control.call import Site
from attn_control.processors import HeadGate, SkipLayers
from attn_control.select import parse_heads

SITES = [
    Site(f"{model}.{layer}", model, layer, "self", 4, 4, 8, None)
    for model in ("transformer", "transformer_2", "controlnet")
    for layer in range(3)
]


def taken(text):
    found = parse_heads(text).resolve(SITES)
    return sorted((site.model, site.layer, heads) for site, heads in found.items())


def test_an_item_without_a_component_means_every_denoiser():
    both = [("transformer", 1, (2,)), ("transformer_2", 1, (2,))]
    assert taken("L1H2") == both
    assert {model for model, *_ in taken("all")} == {"transformer", "transformer_2"}


def test_an_item_with_one_means_that_one():
    assert taken("transformer_2:L1H2") == [("transformer_2", 1, (2,))]
    assert taken("controlnet:all") == [("controlnet", n, (0, 1, 2, 3)) for n in range(3)]
    assert taken("transformer:L0H1, transformer_2:L0-1H1") == [
        ("transformer", 0, (1,)),
        ("transformer_2", 0, (1,)),
        ("transformer_2", 1, (1,)),
    ]


def test_text_and_terms_keep_the_component():
    selector = parse_heads(" controlnet:L1.self , all")
    assert [term.text for term in selector.terms] == ["controlnet:L1.self", "all"]
    assert [term.model for term in selector.terms] == ["controlnet", None]


@pytest.mark.parametrize(
    "text, at",
    [("transformer_2:", 15), ("transformer_2:H1", 15), ("transformer_2 :L1", 1), (":L1", 1)],
)
def test_errors_point(text, at):
    with pytest.raises(AttnControlError, match=f"a layer such as L3 .* at character {at}"):
        parse_heads(text)


@pytest.mark.parametrize(
    "text, words",
    [
        ("unet:L1", "names the component 'unet'; there is: transformer, transformer_2, controlnet"),
        ("transformer_2:L7", "matches no attention site; the model has layers L0 to L2"),
        ("transformer_2:L2-3", "asks for layer 3, which has no such site"),
        ("controlnet:L1H4", "asks for head 4 of L1.self"),
        ("transformer:L1.cross", "names cross attention, which this control cannot act on"),
    ],
)
def test_what_is_not_there_is_said(text, words):
    with pytest.raises(AttnControlError, match=words):
        parse_heads(text).resolve(SITES, who="HeadGate")


def test_one_of_two_denoisers_in_a_pipeline():
    pipe, _, _ = EDITING["wan_image_two"]()
    for control in (HeadGate("transformer_2:L1"), SkipLayers("transformer_2:L1")):
        with attach(pipe, control) as session:
            sites = session.report().to_dict()["controls"][0]["sites"]
        assert {name.split(".")[0] for name in sites} == {"transformer_2"}
