"""Processors that make several softmaxes a call: Mochi one a row, Qwen-Image 2.1 one a stretch."""

from __future__ import annotations

import pytest
import torch
from guides_shared import combine
from processors.test_nag import extrapolate
from test_wider_families import _run
from tiny_attach_only import MOCHI, QWEN
from tiny_oracle import attention, close, gated, toward_identity
from tiny_wide import rand

from attn_control import attach
from attn_control.call import Layout, Softmax
from attn_control.errors import AttnControlError
from attn_control.families import family_of
from attn_control.phases import with_appended, within
from attn_control.processors import NAG, SEG, HeadGate, SoftPAG

ROW, STRETCH = "transformer_blocks.0.attn1", "transformer_blocks.0.attn"
REFERENCED = {
    # text 3, a reference of 8 tokens (2 slots), text 2, the image of 16
    "hidden_states": rand(2, 24, 16),
    "encoder_hidden_states": rand(2, 7, 32, seed=1),
    "timestep": torch.full((2,), 0.5),
    "img_shapes": [[(1, 2, 4), (1, 4, 4)]] * 2,
    "img_mask": torch.tensor([[False] * 3 + [True] * 2 + [False] * 2 + [True] * 4] * 2),
}


def layouts(model, call):
    with attach(model) as session:
        return family_of(model).layout(session.sites[0], call, model)


def look(model, call, name):
    with attention(model) as seen:
        _run(model, call)
    return seen[name]


def moved(before, after, which, pooled=False):
    """Indices of tokens that differ; pooled: text moves all of them, so the one that moves most."""
    a, b = getattr(before, which), getattr(after, which)
    change = (a - b).abs().amax((0, 1, 3))
    return (
        change.argmax(0, keepdim=True).tolist()
        if pooled and change.any()
        else change.nonzero().flatten().tolist()
    )


def changed(call, name, *index):
    tensor = call[name].clone()
    tensor[index] += 1.0
    return call | {name: tensor}


def test_mochis_rows_are_video_and_the_rows_own_words():
    model, call = MOCHI.make(), MOCHI.call()
    found = layouts(model, call)
    assert [softmax.rows for softmax in found] == [(0, 1), (1, 2)]
    plain = look(model, call, ROW)
    for softmax, seen in zip(found, plain, strict=True):
        assert (softmax.layout.q_len, softmax.layout.k_len) == (seen.q.shape[2], seen.k.shape[2])
    assert [[(s.role, s.length) for s in softmax.layout.q] for softmax in found] == [
        [("video", 12), ("text", 3)], [("video", 12), ("text", 5)],
    ]  # fmt: skip
    words = look(model, changed(call, "encoder_hidden_states", slice(None), 2), ROW)
    assert [moved(*pair, "k", True) for pair in zip(plain, words, strict=True)] == [[14], [14]]
    padding = look(model, changed(call, "encoder_hidden_states", slice(None), 4), ROW)
    assert [moved(*pair, "k", True) for pair in zip(plain, padding, strict=True)] == [[], [16]]
    # Frame 1, row 0, column 1 of 2 x 2 patches: token 4 + 1.
    place = (slice(None), slice(None), 1, 0, 3)
    pixels = look(model, changed(call, "hidden_states", *place), ROW)
    assert [moved(*pair, "q") for pair in zip(plain, pixels, strict=True)] == [[5], [5]]


@pytest.mark.parametrize(
    "tokens, span", [("video", slice(0, 12)), ("image", slice(0, 12)), ("text", slice(12, None))]
)
def test_mochis_tokens_are_changed_in_every_row(tokens, span):
    model, call = MOCHI.make(), MOCHI.call()
    plain = _run(model, call)
    with attention(model, {ROW: toward_identity([1], 0.6, span)}):
        perturbed = _run(model, call)
    for batched in (False, True):
        control = SoftPAG("L0H1", u=0.6, scale=1.5, tokens=tokens, batched=batched)
        with attach(model, control) as session:
            close(_run(model, call), combine(plain, perturbed, 1.5))
        assert session.report().controls[0].fired
    with attention(model, {ROW: gated([0], 0.25, span)}):
        expected = _run(model, call)
    with attach(model, HeadGate("L0H0", gain=0.25, tokens=tokens)):
        close(_run(model, call), expected)
    assert torch.equal(_run(model, call), plain)


def test_what_compares_rows_is_refused_where_each_row_is_alone():
    model, call = MOCHI.make(), MOCHI.call()
    gates = torch.rand(2, 2, 2)
    for control in (NAG(negative=torch.zeros(1, 5, 32)), SoftPAG.from_gates(gates)):
        with attach(model, control):
            with pytest.raises(AttnControlError, match="L0.joint of Mochi each row"):
                _run(model, call)


def test_a_controls_rows_as_rows_of_a_softmax():
    assert within(None, (1, 2)) is None and within((0, 2), None) == (0, 2)
    assert within((0, 2), (1, 2)) == (0, 1) and within((1, 3), (0, 4)) == (1, 3)
    assert within((0, 1), (1, 2)) == (0, 0)


def test_appended_rows_have_the_softmax_of_the_rows_that_they_repeat():
    one, two = (Layout.joint(("text", n, None)) for n in (3, 5))
    rows = (Softmax(one, (0, 1)), Softmax(two, (1, 2)))
    assert with_appended(rows, (1, 2), 2, 2) == (*rows, Softmax(two, (2, 3)), Softmax(two, (3, 4)))
    whole = (Softmax(one), Softmax(two))
    assert with_appended(whole, (1, 2), 1, 2) == whole and with_appended(rows, None, 0, 2) == rows


def test_qwens_stretches_see_what_went_before():
    model = QWEN.make()
    found = layouts(model, REFERENCED)
    sides = [
        [[(s.role, s.length) for s in side] for side in (f.layout.q, f.layout.k)] for f in found
    ]
    text, reference, more, image = ("text", 3), ("reference", 8), ("text", 2), ("image", 16)
    assert sides == [
        [[text], [text]],
        [[reference], [text, reference]],
        [[more], [text, reference, more]],
        [[image], [text, reference, more, image]],
    ]
    assert [f.layout.q[0].grid for f in found] == [None, (1, 2, 4), None, (1, 4, 4)]
    plain = look(model, REFERENCED, STRETCH)
    assert [(s.q.shape[2], s.k.shape[2]) for s in plain] == [
        (f.layout.q_len, f.layout.k_len) for f in found
    ]
    for name, at, expected in (
        ("encoder_hidden_states", 1, [[1], [], [], []]),
        ("encoder_hidden_states", 6, [[], [], [1], []]),  # two slots of the reference lie between
        ("hidden_states", 5, [[], [5], [], []]),
        ("hidden_states", 8 + 9, [[], [], [], [9]]),
    ):
        poked = look(model, changed(REFERENCED, name, slice(None), at), STRETCH)
        assert [moved(*pair, "q") for pair in zip(plain, poked, strict=True)] == expected


def only(length, change):
    """A change of the softmax with so many queries."""
    return lambda a, v: change(a, v) if a.shape[-2] == length else a @ v


@pytest.mark.parametrize("tokens, length", [("image", 16), ("reference", 8)])
def test_qwens_tokens_are_gated_in_their_own_softmax(tokens, length):
    model = QWEN.make()
    with attention(model, {STRETCH: only(length, gated([1], 0.25))}):
        expected = _run(model, REFERENCED)
    with attach(model, HeadGate("L0H1", gain=0.25, tokens=tokens)):
        close(_run(model, REFERENCED), expected)


def test_qwens_text_is_gated_in_both_of_its_stretches():
    model = QWEN.make()
    text = {STRETCH: lambda a, v: gated([1], 0.25)(a, v) if a.shape[-2] < 8 else a @ v}
    with attention(model, text):
        expected = _run(model, REFERENCED)
    with attach(model, HeadGate("L0H1", gain=0.25, tokens="text")):
        close(_run(model, REFERENCED), expected)


def test_the_identity_needs_keys_that_are_the_queries():
    model = QWEN.make()
    with attach(model, SoftPAG("L0H1", tokens="image")):
        with pytest.raises(AttnControlError, match="L0.joint attends from 16 queries to 29 other"):
            _run(model, REFERENCED)
    with attach(model, HeadGate("L0H1", gain=0.5, tokens="reference")):
        with pytest.raises(AttnControlError, match="no 'reference' tokens"):
            _run(model, QWEN.call())


def test_seg_blurs_the_images_queries_alone():
    """With an infinite blur each query is the mean one: every row of the map is the same."""
    model, u = QWEN.make(), 1.0
    plain = _run(model, REFERENCED)
    seen = look(model, REFERENCED, STRETCH)[-1]
    mean = seen.q.double().mean(2, keepdim=True)
    weights = torch.softmax(mean @ seen.k.double().transpose(-1, -2) * 16**-0.5, -1)

    def flat(a, v):
        out = a @ v
        out[:, 1] = (1 - u) * out[:, 1] + u * (weights @ v)[:, 1]
        return out

    with attention(model, {STRETCH: only(16, flat)}):
        perturbed = _run(model, REFERENCED)
    with attach(model, SEG("L0H1", scale=1.5)):
        close(_run(model, REFERENCED), combine(plain, perturbed, 1.5))


def test_nag_extrapolates_the_image_from_the_negative_rows():
    model, numbers = QWEN.make(), {"scale": 3.0, "alpha": 0.5, "tau": 1.3}
    negative = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(9))
    call = QWEN.call()
    twice = {
        name: torch.cat([value] * 2) if isinstance(value, torch.Tensor) else value * 2
        for name, value in call.items()
    }
    twice["encoder_hidden_states"] = torch.cat([call["encoder_hidden_states"], negative])

    def change(a, v):
        out = a @ v
        z = extrapolate(out[:2], out[2:], **numbers)
        return torch.cat([z, z])

    with attention(model, {STRETCH: only(16, change)}):
        expected = _run(model, twice)[:2]
    with attach(model, NAG("L0", negative=negative, **numbers)):
        close(_run(model, call), expected)
