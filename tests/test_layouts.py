"""Where each token stands in attention, found out by moving one input token at a time."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_oracle import attention, dense, expose_heads, outputs, toward_identity

from attn_control import AttnControlError, attach
from attn_control.call import Layout, Step
from attn_control.families import family_of
from attn_control.processors import HeadGate, SoftPAG


def _layout(model, call, label: str) -> tuple[Layout, str]:
    with attach(model) as session:
        site = next(site for site in session.sites if site.label == label)
    return family_of(model).layout(site, call, model), site.name


@torch.no_grad()
def _moved(model, call, name: str, change, side: str = "q") -> list[int]:
    """Indices of the tokens that move at a site when ``change`` edits the call's arguments."""
    found = []
    for edit in (False, True):
        given = {k: v.clone() if torch.is_tensor(v) else v for k, v in call.items()}
        if edit:
            change(given)
        with attention(model) as seen:
            model(**given)
        found.append(getattr(seen[name][0], side))
    moved = (found[0] - found[1]).abs().amax(dim=(0, 1, 3))
    return torch.nonzero(moved > 1e-6).flatten().tolist()


def _segments(layout: Layout) -> list[tuple]:
    return [(s.role, s.start, s.stop, s.grid) for s in layout.q]


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_sd3_image_then_text(size):
    model, call = tiny.sd3(), tiny.inputs("sd3")
    call["hidden_states"] = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    rows, columns = size[0] // 2, size[1] // 2
    count = rows * columns
    layout, name = _layout(model, call, "L0.joint")
    assert _segments(layout) == [
        ("image", 0, count, (1, rows, columns)),
        ("text", count, count + 5, None),
    ]

    def pixel(given):
        given["hidden_states"][:, :, 3, 4] += 1.0

    def word(given):
        given["encoder_hidden_states"][:, 2] += 1.0

    assert _moved(model, call, name, pixel) == [1 * columns + 2]  # patch (3 // 2, 4 // 2)
    assert _moved(model, call, name, word) == [count + 2]
    assert _moved(model, call, name, word, side="k") == [count + 2]


def test_sd35_second_self_attention_sees_the_image_only():
    model, call = tiny.sd3(dual=(0, 1)), tiny.inputs("sd3")
    layout, name = _layout(model, call, "L0.self2")
    assert _segments(layout) == [("image", 0, 16, (1, 4, 4))]
    assert layout.is_self

    def pixel(given):
        given["hidden_states"][:, :, 7, 0] += 1.0

    def word(given):
        given["encoder_hidden_states"][:, 2] += 1.0

    assert _moved(model, call, name, pixel) == [12]
    assert _moved(model, call, name, word) == []


@pytest.mark.parametrize(("double", "single"), [(1, 1), (0, 2)])
def test_flux_text_then_image_in_double_and_in_single_blocks(double, single):
    model, call = tiny.flux(double, single), tiny.inputs("flux")
    layout, name = _layout(model, call, "L0.joint")
    assert name.startswith("transformer_blocks" if double else "single_transformer_blocks")
    assert _segments(layout) == [("text", 0, 5, None), ("image", 5, 21, (1, 4, 4))]

    def patch(given):
        given["hidden_states"][:, 6] += 1.0

    def word(given):
        given["encoder_hidden_states"][:, 3] += 1.0

    assert _moved(model, call, name, patch) == [5 + 6]
    assert _moved(model, call, name, word) == [3]


def kontext(reference: tuple[int, int] = (2, 4), image: tuple[int, int] = (4, 4)) -> dict:
    """A FLUX call whose image tokens are followed by those of a reference picture."""
    call = tiny.inputs("flux")
    ids = []
    for mark, (rows, columns) in ((0.0, image), (1.0, reference)):
        ids += [[mark, float(r), float(c)] for r in range(rows) for c in range(columns)]
    g = torch.Generator().manual_seed(5)
    call["hidden_states"] = torch.randn(2, len(ids), 16, generator=g)
    return {**call, "img_ids": torch.tensor(ids)}


def test_kontexts_reference_follows_the_image():
    model, call = tiny.flux(), kontext()
    layout, name = _layout(model, call, "L0.joint")
    assert [(s.role, s.start, s.stop) for s in layout.q] == [
        ("text", 0, 5),
        ("image", 5, 21),
        ("reference", 21, 29),
    ]
    assert layout.q[1].grid == (1, 4, 4)

    def patch(given):
        given["hidden_states"][:, 16 + 1] += 1.0

    assert _moved(model, call, name, patch) == [22]


@torch.no_grad()
def test_the_layout_of_a_new_reference_replaces_the_old_at_the_same_number_of_tokens():
    model = expose_heads(tiny.flux())
    module = model.transformer_blocks[0].attn
    with attach(model, HeadGate("L0H1", tokens="reference")):
        for image, reference in (((4, 4), (2, 4)), ((2, 4), (4, 4))):
            call = kontext(reference, image)
            with outputs(module, 2, text_first=True) as outs:
                model(**call)
            silent = torch.nonzero((outs[0][:, 1] == 0).all(-1).all(0)).flatten().tolist()
            first = 5 + image[0] * image[1]
            assert silent == list(range(first, 29))


@pytest.mark.parametrize("size", [(16, 16), (15, 17), (9, 14)])
def test_unet_grids_at_any_size(size):
    model, call = tiny.unet(), tiny.inputs("unet")
    call["sample"] = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attention(model) as seen:
        model(**call)
    with attach(model) as session:
        for site in session.sites:
            layout = family_of(model).layout(site, call, model)
            softmax = seen[site.name][0]
            assert layout.q_len == softmax.q.shape[2], site.label
            assert layout.k_len == softmax.k.shape[2], site.label
            (segment,) = layout.q
            frames, rows, columns = segment.grid
            assert frames == 1 and rows * columns == segment.length
            assert layout.is_self == (site.slot == "self")


def test_unet_tokens_run_row_by_row():
    model, call = tiny.unet(), tiny.inputs("unet")
    call["sample"] = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(0))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    with torch.no_grad():
        q = []
        for extra in (0.0, 5.0):
            given = call["sample"].clone()
            given[:, :, 7, 3] += extra
            with attention(model) as seen:
                model(**{**call, "sample": given})
            q.append(seen[name][0].q)
    strongest = (q[0] - q[1]).abs().sum(dim=(0, 1, 3)).reshape(12, 20)
    row, column = divmod(int(strongest.argmax()), 20)
    assert abs(row - 7) <= 2 and abs(column - 3) <= 2  # within the reach of the convolutions


def test_unet_words_are_the_keys_of_cross_attention():
    model, call = tiny.unet(), tiny.inputs("unet")
    layout, name = _layout(model, call, "L0.cross")
    assert [(s.role, s.start, s.stop) for s in layout.k] == [("text", 0, 7)]

    def word(given):
        given["encoder_hidden_states"][:, 4] += 1.0

    assert _moved(model, call, name, word, side="k") == [4]
    assert _moved(model, call, name, word) == []


def test_wan_video_grid():
    model, call = tiny.wan(), tiny.inputs("wan")
    call["hidden_states"] = torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    layout, name = _layout(model, call, "L0.self")
    assert _segments(layout) == [("video", 0, 18, (3, 2, 3))]

    def pixel(given):
        given["hidden_states"][:, :, 2, 1, 4] += 1.0

    def word(given):
        given["encoder_hidden_states"][:, 4] += 1.0

    assert _moved(model, call, name, pixel) == [2 * 6 + 0 * 3 + 2]  # frame 2, row 0, column 2
    cross, cross_name = _layout(model, call, "L0.cross")
    assert not cross.is_self
    assert [(s.role, s.length) for s in cross.k] == [("text", 6)]
    assert _moved(model, call, cross_name, word, side="k") == [4]


ROLES = {
    "sd15": {"all", "image", "video"},
    "sd3": {"all", "image", "video", "text"},
    "flux": {"all", "image", "video", "text"},
    "wan": {"all", "image", "video"},
}


@pytest.mark.parametrize("family", ROLES)
@pytest.mark.parametrize("tokens", ["all", "image", "video", "text", "reference"])
@torch.no_grad()
def test_tokens_that_a_site_lacks_are_refused_at_the_first_call(family, tokens):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    control = HeadGate("L0", gain=0.5, tokens=tokens)
    if tokens in ROLES[family]:
        with attach(model, control, strict=True):
            model(**call)
    else:
        with pytest.raises(AttnControlError, match=f"has no '{tokens}' tokens"):
            with attach(model, control):
                model(**call)


@torch.no_grad()
def test_softpag_on_the_reference_alone():
    model, call = expose_heads(tiny.flux()), kontext()
    module = model.transformer_blocks[1].attn
    with attention(model) as seen:
        model(**call)
    qkv = seen["transformer_blocks.1.attn"][0]
    with attach(model, SoftPAG("L1H0", u=0.5, tokens="reference")):
        with outputs(module, 2, text_first=True) as outs:
            model(**call)
    plain, changed = outs
    reference = toward_identity((0,), 0.5, slice(21, 29))(dense(qkv.q, qkv.k), qkv.v.double())
    assert (changed[:, 0, 21:].double() - reference[:, 0, 21:]).abs().max() < 1e-5
    assert torch.equal(changed[:, :, :21], plain[:, :, :21])
    assert torch.equal(changed[:, 1], plain[:, 1])


def test_layouts_are_values():
    one, two = (Layout.joint(("text", 5, None), ("image", 16, (1, 4, 4))) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    assert one.span("image") == ((5, 21),) and one.span("all") == ((0, 21),)
    assert one.span("reference") == ()


def test_rows_of_a_branch():
    step = Step(1, 0, 4, 1.0, ("uncond", "uncond", "cond", "cond"))
    assert step.rows("cond") == (2, 4)
    assert step.rows("uncond") == (0, 2)
    assert step.rows("perturbed:0") is None
    with pytest.raises(AttnControlError, match="not contiguous"):
        Step(1, 0, 4, 1.0, ("cond", "uncond", "cond")).rows("cond")
