"""Further families: idle bits, a head against an explicit map, layouts proved by poking tokens."""

from __future__ import annotations

import pytest
import torch
from guides_shared import combine
from tiny_oracle import attention, close, gated, toward_identity
from tiny_pictures import PICTURES
from tiny_videos import VIDEOS
from tiny_wide import TEXT

from attn_control import attach
from attn_control.call import sample_of
from attn_control.families import family_of
from attn_control.processors import HeadGate, SoftPAG

WIDE = PICTURES | VIDEOS
CASES = [(name, *site) for name, tiny in WIDE.items() for site in tiny.sites]


def _run(model, call):
    with torch.no_grad():
        return sample_of(model(**call, return_dict=False))


def _state(model):
    return [(type(m), type(getattr(m, "processor", None)), set(vars(m))) for m in model.modules()]


@pytest.mark.parametrize("family, label, name", CASES)
def test_a_perturbed_head_acts_as_written(family, label, name):
    tiny = WIDE[family]
    model, call = tiny.make(), tiny.call()
    before, plain = _state(model), _run(model, call)
    with attach(model) as session:
        assert torch.equal(_run(model, call), plain)
        site = next(site for site in session.sites if site.name == name)
        assert label in (f"L{site.layer}", site.label)
        layout = family_of(model).layout(site, call, model)
    if layout.is_self:
        with attention(model, {name: toward_identity([1], 0.6)}):
            perturbed = _run(model, call)
        with attach(model, SoftPAG(f"{label}H1", u=0.6, scale=1.5)):
            close(_run(model, call), combine(plain, perturbed, 1.5))
    with attention(model, {name: gated([1], 0.25)}):
        expected = _run(model, call)
    with attach(model, HeadGate(f"{label}H1", gain=0.25)):
        close(_run(model, call), expected)
    assert torch.equal(_run(model, call), plain) and _state(model) == before


def _moved(before, after):
    return [int(i) for i in (before - after).abs().amax(dim=(0, 1, 3)).nonzero().flatten()]


@pytest.mark.parametrize("family", WIDE)
def test_layouts_name_the_token_that_moves(family):
    """Poking one token of a segment moves that segment's index alone (where text is mixed before
    the first block: indices of that segment alone, its own among them).
    """
    tiny = WIDE[family]
    model, call = tiny.make_quiet(), tiny.call()

    def look(call, name):
        with attention(model) as seen:
            _run(model, call)
        return seen[name][-1]

    with attach(model) as session:
        sites = [site for site in session.sites if site.layer in tiny.first]
    assert {site.layer for site in sites} == set(tiny.first)
    for site in sites:
        layout = family_of(model).layout(site, call, model)
        plain = look(call, site.name)
        assert (layout.q_len, layout.k_len) == (plain.q.shape[2], plain.k.shape[2])
        picture = next(s for s in layout.q if s.role in ("image", "video"))
        assert picture.grid == tiny.grid
        for token in (0, 1, 6, picture.length - 1):  # 1 and 6: off the diagonal of the grid
            moved = _moved(plain.q, look(tiny.poked(call, token), site.name).q)
            if site.slot == "cross":  # after attention among the picture's own
                assert picture.start + token in moved
            else:
                assert moved == [picture.start + token]
        text = next((s for s in layout.k if s.role == "text"), None)
        for name, first in tiny.texts if text else ():
            for token in range(0, min(TEXT, call[name].shape[1]), 2):
                changed = call[name].clone()
                changed[:, token] += 1.0
                moved = _moved(plain.k, look(call | {name: changed}, site.name).k)
                at = text.start + first + token
                if tiny.mixes:
                    assert at in moved
                    assert text.start <= min(moved) and max(moved) < text.stop
                else:
                    assert moved == [at]
