"""The grammar of heads and windows: what it means, and where its errors point."""

from __future__ import annotations

import functools

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from attn_control import AttnControlError, attach
from attn_control.call import SLOTS, Step
from attn_control.processors import HeadGate, SoftPAG
from attn_control.select import parse_heads, parse_window


@functools.cache
def sites(family: str):
    session = attach(tiny.MODELS[family]())
    session.close()
    return tuple(session.sites)


def resolved(family: str, text: str, **options) -> dict[str, tuple[int, ...]]:
    found = parse_heads(text).resolve(sites(family), **options)
    return {site.label: heads for site, heads in found.items()}


GOOD = [
    ("sd3", "L0H1", {"L0.joint": (1,)}),
    ("sd3", "L0", {"L0.joint": (0, 1, 2, 3)}),
    ("sd3", "L0H1-2, L2", {"L0.joint": (1, 2), "L2.joint": (0, 1, 2, 3)}),
    ("sd3", "L0-1H3", {"L0.joint": (3,), "L1.joint": (3,)}),
    ("sd3", "  L1H0 ,L1H2  ", {"L1.joint": (0, 2)}),
    ("sd3", "L1H0,L1H0-1", {"L1.joint": (0, 1)}),
    ("sd3", "all", {f"L{n}.joint": (0, 1, 2, 3) for n in range(3)}),
    ("sd3", "L1.jointH2", {"L1.joint": (2,)}),
    ("sd35", "L2", {"L2.joint": (0, 1, 2, 3)}),
    ("sd35", "L1.self2H2", {"L1.self2": (2,)}),
    ("flux", "L1-2H0", {"L1.joint": (0,), "L2.joint": (0,)}),
    ("wan", "all", {"L0.self": (0, 1), "L1.self": (0, 1)}),
    ("sd15", "L0", {"L0.self": (0, 1)}),
    ("sd15", "L2", {"L2.self": (0, 1, 2, 3)}),
]


@pytest.mark.parametrize(("family", "text", "expected"), GOOD)
def test_good_selectors_mean(family, text, expected):
    allowed = ("joint", "self", "self2")
    assert resolved(family, text, allowed=allowed) == expected
    assert str(parse_heads(text)) == text


BAD = [  # text, the column at which the caret stands
    ("", 1),
    ("L", 2),
    ("L1,", 4),
    ("L1,,L2", 4),
    ("l1", 1),
    ("L1h2", 3),
    ("L1H", 4),
    ("L1H2-", 6),
    ("L1H5-2", 4),
    ("L3-1", 2),
    ("L1 H2", 4),
    ("L1;L2", 3),
    ("L-1", 2),
    ("H3", 1),
    ("L1.", 4),
    ("L1.foo", 4),
    ("L1.selfX", 4),
    ("L1.cross2", 4),
    ("allH3", 4),
    ("all L1", 5),
    ("L1H1.5", 5),
    ("L1, 7", 5),
    ("L²", 2),
]


@pytest.mark.parametrize(("text", "column"), BAD)
def test_bad_selectors_point_at_the_character(text, column):
    with pytest.raises(AttnControlError) as error:
        parse_heads(text)
    message = str(error.value)
    assert f"at character {column}" in message
    *_, shown, caret = message.split("\n")
    assert shown[2:] == text
    assert caret.index("^") - 2 == column - 1  # under the character itself
    assert caret.strip() == "^"


@pytest.mark.parametrize("value", [None, 3, ["L1"], b"L1"])
def test_a_selector_must_be_text(value):
    with pytest.raises(AttnControlError, match="expected text such as"):
        parse_heads(value)


NO_MATCH = [
    ("sd3", "L3", "layers L0 to L2"),
    ("sd3", "L1-4", "asks for layer 3"),
    ("sd3", "L0H4", "heads 0 to 3"),
    ("sd3", "L0H2-4", "asks for head 4"),
    ("sd3", "L0.self2", "matches no attention site"),
    ("sd35", "L2.self2", "matches no attention site"),
    ("sd15", "L2H3, L0H3", "L0.self"),
    ("wan", "L0.cross", "cannot act on"),
    ("flux", "L4", "layers L0 to L3"),
]


@pytest.mark.parametrize(("family", "text", "part"), NO_MATCH)
def test_selectors_that_match_nothing_say_what_there_is(family, text, part):
    with pytest.raises(AttnControlError, match=part):
        SoftPAG(text).select(sites(family))


def test_layers_of_a_unet_run_down_mid_up():
    order = [site.name.split(".")[0] for site in sites("sd15") if site.slot == "self"]
    assert order == ["down_blocks"] * 2 + ["mid_block"] + ["up_blocks"] * 4
    assert [s.layer for s in sites("sd15")] == [n for n in range(7) for _ in range(2)]
    # SDXL has several transformer blocks in one attention: each is a layer of its own.
    deep = {site.layer: site.name for site in sites("sdxl") if site.slot == "self"}
    assert deep[1] == "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert deep[2] == "down_blocks.1.attentions.0.transformer_blocks.1.attn1"
    assert deep[3] == "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert len(deep) == 11


@pytest.mark.parametrize("family", tiny.MODELS)
def test_layer_numbers_follow_the_order_in_which_attention_runs(family):
    import torch
    from tiny_oracle import attention

    model = tiny.MODELS[family]()
    with torch.no_grad(), attention(model) as seen:
        model(**tiny.family_inputs(family))
    layers = {site.name: site.layer for site in sites(family)}
    ran = [layers[name] for name in seen]
    assert ran == sorted(ran)
    assert set(ran) == set(range(max(ran) + 1))
    assert set(seen) == set(layers)


def test_flux_numbers_double_blocks_first_then_single():
    assert [(s.label, s.name) for s in sites("flux")] == [
        ("L0.joint", "transformer_blocks.0.attn"),
        ("L1.joint", "transformer_blocks.1.attn"),
        ("L2.joint", "single_transformer_blocks.0.attn"),
        ("L3.joint", "single_transformer_blocks.1.attn"),
    ]


def test_more_than_nine_blocks_keep_their_numbers():
    session = attach(tiny.sd3(layers=12))
    session.close()
    assert [s.name for s in session.sites] == [f"transformer_blocks.{n}.attn" for n in range(12)]


def test_sd35_self2_is_reached_by_its_slot_only():
    assert resolved("sd35", "L0", allowed=SLOTS) == {"L0.joint": (0, 1, 2, 3)}
    assert resolved("sd35", "L0.self2", allowed=SLOTS) == {"L0.self2": (0, 1, 2, 3)}


def test_cross_attention_is_refused_by_softpag_and_accepted_by_headgate():
    with pytest.raises(AttnControlError, match="names cross attention"):
        SoftPAG("L0.cross").select(sites("wan"))
    chosen = HeadGate("L0.crossH1").select(sites("wan"))
    assert {s.label: heads for s, heads in chosen.items()} == {"L0.cross": (1,)}


ranges = st.tuples(st.integers(0, 60), st.integers(0, 5)).map(lambda p: (p[0], p[0] + p[1]))
items = st.tuples(ranges, st.none() | st.sampled_from(SLOTS), st.none() | ranges)


def _span(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}-{pair[1]}"


@given(st.lists(items, min_size=1, max_size=5), st.sampled_from([",", ", ", " , "]))
def test_what_is_written_is_what_is_parsed(terms, comma):
    text = comma.join(
        f"L{_span(layers)}{'.' + slot if slot else ''}{'H' + _span(heads) if heads else ''}"
        for layers, slot, heads in terms
    )
    parsed = parse_heads(text)
    assert [(t.layers, t.slot, t.heads) for t in parsed.terms] == terms
    assert parse_heads(", ".join(t.text for t in parsed.terms)).terms == parsed.terms


@given(st.text(alphabet="LHall.-, 0123456789selfcrojint2", max_size=12))
def test_any_text_parses_or_points_inside_itself(text):
    try:
        parse_heads(text)
    except AttnControlError as error:
        column = str(error).split("\n")[-1].index("^") - 2
        assert 0 <= column <= len(text)


def step(index: int | None, total: int | None = 10, sigma: float | None = None) -> Step:
    return Step(1, index, total, sigma, ("cond",))


WINDOWS = [
    ("0-1", range(10)),
    ("0-0.25", [0, 1, 2]),
    ("0.3-0.7", [3, 4, 5, 6]),
    ("0.5-1", [5, 6, 7, 8, 9]),
    ("0.9-1", [9]),
    (" .1 - .2 ", [1]),
    ("0-1e-3", [0]),
]


@pytest.mark.parametrize(("text", "due"), WINDOWS)
def test_progress_windows_are_half_open_with_1_inside(text, due):
    window = parse_window(text)
    assert [n for n in range(10) if window.holds(step(n))] == list(due)
    assert window.contains(1.0) == (window.last == 1)


def test_sigma_windows_hold_both_ends():
    window = parse_window("sigma 14-2")
    held = [s for s in (15, 14, 7, 2, 1.99) if window.holds(step(0, sigma=s))]
    assert held == [14, 7, 2]


@pytest.mark.parametrize(
    "text",
    ["", "0", "0.5", "1-0", "0.5-0.5", "0-1.5", "-1-0.5", "a-b", "sigma 2-14", "sigma", "0-nan",
     "0-inf", "0-1e999", "sigma 1e999-2", "0..5-1", "0-0.5, 0.7-1", None, 0.5, (0, 1), [0, 1]],
)  # fmt: skip
def test_bad_windows_say_the_form(text):
    with pytest.raises(AttnControlError, match="expected '0-0.25'.*or 'sigma 14-2'"):
        parse_window(text)


def test_a_window_on_an_unknown_value_says_what_to_do():
    for text, value in (("0-0.5", "progress"), ("sigma 3-1", "sigma")):
        with pytest.raises(AttnControlError, match=f"needs the sampler's {value}"):
            parse_window(text).holds(step(None, None))
    assert parse_window("0-1").holds(step(None, None))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1, exclude_max=True))
def test_neighbouring_windows_share_no_step_and_miss_none(a, b, value):
    cut = sorted({0.0, a, b, 1.0})
    windows = [parse_window(f"{x!r}-{y!r}") for x, y in zip(cut, cut[1:], strict=False)]
    assert sum(w.contains(value) for w in windows) == 1
