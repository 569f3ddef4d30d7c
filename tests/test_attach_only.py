"""Families without a layout: what needs none works, what needs one is refused and says so."""

from __future__ import annotations

import diffusers
import pytest
import torch
from guides_shared import combine
from test_wider_families import _run, _state
from tiny import _spread
from tiny_attach_only import ATTACH_ONLY, QWEN
from tiny_more import MORE
from tiny_oracle import attention, close, gated, toward_identity
from tiny_pictures import PICTURES
from tiny_wide import rand

from attn_control import attach
from attn_control.errors import AttnControlError
from attn_control.families import family_of, slice_rows
from attn_control.phases import Pass
from attn_control.processors import HeadGate, SkipLayers, SoftPAG

CASES = [(name, *site) for name, tiny in ATTACH_ONLY.items() for site in tiny.sites]


@pytest.mark.parametrize("family, label, name", CASES)
def test_controls_of_all_tokens_act_as_written(family, label, name):
    tiny = ATTACH_ONLY[family]
    model, call = tiny.make(), tiny.call()
    before, plain = _state(model), _run(model, call)
    assert family_of(model).layout is None
    with attach(model) as session:
        assert torch.equal(_run(model, call), plain)
        site = next(site for site in session.sites if site.name == name)
        assert label == f"L{site.layer}"
    with attention(model, {name: toward_identity([1], 0.6)}):
        perturbed = _run(model, call)
    assert not torch.allclose(perturbed, plain)
    with attach(model, SoftPAG(f"{label}H1", u=0.6, scale=1.5)):
        close(_run(model, call), combine(plain, perturbed, 1.5))
    with attention(model, {name: gated([1], 0.25)}):
        expected = _run(model, call)
    with attach(model, HeadGate(f"{label}H1", gain=0.25)):
        close(_run(model, call), expected)
    assert torch.equal(_run(model, call), plain) and _state(model) == before


@pytest.mark.parametrize("family", ATTACH_ONLY)
def test_controls_of_some_tokens_are_refused_and_nothing_stays(family):
    model = ATTACH_ONLY[family].make()
    before = _state(model)
    name = family_of(model).name
    for control in (SoftPAG("L0", tokens="image"), HeadGate("L0", gain=0.5, tokens="text")):
        with pytest.raises(AttnControlError, match=rf"tokens.* in {name}, but the order"):
            attach(model, control)
        assert _state(model) == before


def test_an_extra_forward_never_writes_into_a_cache():
    """A pipeline hands the model a cache to fill: guidance would fill it with perturbed keys."""
    model = QWEN.make()
    call = QWEN.call() | {"kv_cache": object(), "kv_cache_mode": "extract"}
    with attach(model, SkipLayers("L1", what="attention")):
        with pytest.raises(AttnControlError, match="cache of keys and values"):
            _run(model, call)


def test_a_block_that_cannot_be_skipped_leaves_the_model_as_it_was():
    """VACE's own blocks hand on hints, which they are not given."""
    model = MORE["vace"]()
    before = _state(model)
    with pytest.raises(AttnControlError, match="vace_blocks.0 of Wan VACE cannot be skipped"):
        attach(model, HeadGate("L0", gain=0.5), SkipLayers("L2", what="block"))
    assert _state(model) == before
    with attach(model, HeadGate("L0", gain=0.5)):
        pass


def test_the_identity_is_refused_at_run_time_where_keys_are_others():
    """Without a layout nobody can say so before the call."""
    tiny = PICTURES["prx"]
    model, call = tiny.make(), tiny.call()
    with attach(model, SoftPAG("L0")) as session:
        family = next(iter(session._denoisers)).phases
        family._layout = lambda site, run: None
        with pytest.raises(AttnControlError, match=r"L0.joint attends from 16 queries to 21 keys"):
            _run(model, call)


def test_rows_of_unequal_text_have_no_common_layout():
    tiny = PICTURES["lumina2"]
    model, call = tiny.make(), tiny.call()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    call |= {"encoder_attention_mask": mask}
    plain = _run(model, call)
    with attach(model, SoftPAG("L1H1", u=0.6)):
        assert not torch.equal(_run(model, call), plain)
    with attach(model, SoftPAG("L1H1", tokens="image")):
        with pytest.raises(AttnControlError, match="Lumina Image 2.0, but the rows of this batch"):
            _run(model, call)
    mask[1, 3:] = False
    with attach(model) as session:
        layout = family_of(model).layout(session.sites[0], call, model)
    assert [(s.role, s.length) for s in layout.q] == [("text", 3), ("image", 16)]


def _animatediff():
    torch.manual_seed(0)
    model = diffusers.UNetMotionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=32,
        motion_num_attention_heads=2, motion_max_seq_length=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=2,
    )  # fmt: skip
    call = {
        "sample": rand(2, 4, 3, 8, 8),
        "timestep": torch.tensor(500),
        # As its pipelines give it: the text of each row once a frame.
        "encoder_hidden_states": rand(2, 5, 32, seed=1).repeat_interleave(3, 0),
    }
    return _spread(model), call


def test_frames_in_the_batch_are_pictures_of_their_own():
    """As AnimateDiff runs its UNet: the layout is of one frame, and the rows of the attention are
    not the rows of the batch.
    """
    model, call = _animatediff()
    plain = _run(model, call)
    with attach(model) as session:
        site = next(site for site in session.sites if site.slot == "self")
        cross = next(site for site in session.sites if site.slot == "cross")
        assert not any("motion" in site.name for site in session.sites)
    layout = family_of(model).layout(site, call, model)
    with attention(model) as seen:
        _run(model, call)
    assert seen[site.name][0].q.shape[0] == 6 and layout.q_len == seen[site.name][0].q.shape[2]
    assert family_of(model).layout(cross, call, model).k_len == seen[cross.name][0].k.shape[2]
    with attention(model, {site.name: toward_identity([1], 0.6)}):
        perturbed = _run(model, call)
    with attach(model, SoftPAG(f"L{site.layer}H1", u=0.6, scale=1.5)):
        close(_run(model, call), combine(plain, perturbed, 1.5))
    assert torch.equal(_run(model, call), plain)
    alone = slice_rows(family_of(model), call, (1, 2))
    close(_run(model, alone), plain[1:])


def test_cond_rows_alone_are_refused_where_rows_are_folded():
    model, call = _animatediff()
    unknown = call | {"class_labels": torch.zeros(2)}  # keeps the rows from being sliced
    with attach(model, SoftPAG("L0H1")) as session:
        denoiser = session._denoisers[0]
        entry = denoiser.phases.entries[0]
        run = Pass(unknown, [entry], (1, 2), perturbed=(1, 2))
        with pytest.raises(AttnControlError, match="AnimateDiff has other rows than the batch"):
            denoiser.phases.plans(run)
