"""Further families: idle bits, a perturbed head, and layouts proved by poking tokens."""

from __future__ import annotations

import pytest
import torch
from guides_shared import combine, run
from tiny_more import MORE, TEXT, more_inputs
from tiny_oracle import attention, close, toward_identity

from attn_control import attach
from attn_control.families import family_of
from attn_control.processors import SoftPAG

# A site to perturb: label, module name, heads.
SITES = {
    "flux2": [("L1", "transformer_blocks.1.attn"), ("L2", "single_transformer_blocks.0.attn")],
    "chroma": [("L0", "transformer_blocks.0.attn"), ("L3", "single_transformer_blocks.1.attn")],
    "ovis": [("L1", "transformer_blocks.1.attn"), ("L2", "single_transformer_blocks.0.attn")],
    "longcat": [("L1", "transformer_blocks.1.attn"), ("L2", "single_transformer_blocks.0.attn")],
    "qwen": [("L0", "transformer_blocks.0.attn")],
    "cogview4": [("L0", "transformer_blocks.0.attn1")],
    "vace": [("L1", "blocks.1.attn1"), ("L2", "vace_blocks.0.attn1")],
    "skyreels": [("L1", "blocks.1.attn1")],
    "chronoedit": [("L1", "blocks.1.attn1")],
    "hunyuanvideo": [
        ("L1", "transformer_blocks.1.attn"),
        ("L2", "single_transformer_blocks.0.attn"),
    ],
    "ltx": [("L1", "transformer_blocks.1.attn1")],
}
CASES = [(family, *site) for family, sites in SITES.items() for site in sites]


def test_every_row_has_a_tiny_model():
    assert set(SITES) == set(MORE)


@pytest.mark.parametrize("family, label, name", CASES)
def test_a_perturbed_head_guides_as_written(family, label, name):
    model, call = MORE[family](), more_inputs(family)
    plain = run(model, call)
    with attach(model) as session:
        assert torch.equal(run(model, call), plain)
    assert {site.name: f"L{site.layer}" for site in session.sites}[name] == label
    with attention(model, {name: toward_identity([1], 0.6)}):
        perturbed = run(model, call)
    with attach(model, SoftPAG(f"{label}H1", u=0.6, scale=1.5)):
        close(run(model, call), combine(plain, perturbed, 1.5))
    assert torch.equal(run(model, call), plain)


def _poked_text(call, index):
    text = call["encoder_hidden_states"].clone()
    text[:, index] += 1.0
    return call | {"encoder_hidden_states": text}


def _poked_picture(call, token):
    """Change one token: 4 x 4 packed, patches of 2, or 3 frames of 2 x 2."""
    x = call["hidden_states"].clone()
    if x.ndim == 3:
        x[:, token] += 1.0
    elif x.ndim == 4:
        y, w = divmod(token, 4)
        x[:, :, 2 * y, 2 * w + 1] += 1.0
    else:
        frame, rest = divmod(token, 4)
        y, w = divmod(rest, 2)
        x[:, :, frame, 2 * y + 1, 2 * w] += 1.0
    return call | {"hidden_states": x}


def _queries(model, call, name):
    with attention(model) as seen:
        run(model, call)
    return seen[name][-1].q, seen[name][-1].k


def _moved(before, after):
    return [int(i) for i in (before - after).abs().amax(dim=(0, 1, 3)).nonzero().flatten()]


@pytest.mark.parametrize("family", SITES)
def test_layouts_name_the_token_that_moves(family):
    """At the first block, poking one token of a segment moves that segment's index alone."""
    model, call = MORE[family](), more_inputs(family)
    with attach(model) as session:
        sites = [site for site in session.sites if site.layer == 0]
    for site in sites:
        layout = family_of(model).layout(site, call, model)
        q, k = _queries(model, call, site.name)
        assert (layout.q_len, layout.k_len) == (q.shape[2], k.shape[2])
        picture = next(s for s in layout.q if s.role in ("image", "video"))
        assert picture.grid in ((1, 4, 4), (3, 2, 2))
        if site.slot != "cross":
            for token in (0, 1, 6, picture.length - 1):  # 1 and 6: off the diagonal of the grid
                changed, _ = _queries(model, _poked_picture(call, token), site.name)
                assert _moved(q, changed) == [picture.start + token]
        texts = [s for s in layout.k if s.role == "text"]
        for text in texts:
            for token in (0, TEXT - 2):
                _, changed = _queries(model, _poked_text(call, token), site.name)
                moved = _moved(k, changed)
                if family == "hunyuanvideo":  # its text refiner mixes the text tokens
                    assert text.start + token in moved
                    assert text.start <= min(moved) and max(moved) < text.stop
                else:
                    assert moved == [text.start + token]


def test_qwen_edit_references_come_after_the_picture():
    model, call = MORE["qwen"](), more_inputs("qwen")
    call["img_shapes"] = [[(1, 4, 4), (1, 2, 3)]] * 2
    call["hidden_states"] = torch.cat([call["hidden_states"], torch.randn(2, 6, 16)], 1)
    with attach(model) as session:
        layout = family_of(model).layout(session.sites[0], call, model)
    assert [(s.role, s.length, s.grid) for s in layout.q] == [
        ("text", TEXT, None), ("image", 16, (1, 4, 4)), ("reference", 6, (1, 2, 3)),
    ]  # fmt: skip
    plain = run(model, call)
    with attach(model, SoftPAG("L1", tokens="reference")):
        assert not torch.equal(run(model, call), plain)
