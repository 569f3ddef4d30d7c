"""Previews and reports: what was foreseen is what was booked, and what was booked is what ran."""

from __future__ import annotations

import pytest
import tiny
import tiny_pipelines
import torch
from sparse_shared import video

from attn_control import AttnControlError, attach
from attn_control.policy import StepPolicy
from attn_control.processors import (
    NeighborhoodAttention,
    RadialAttention,
    SelectedAttention,
    TileAttention,
)

SIZE = {"height": 96, "width": 96, "num_frames": 9}
CONTROLS = [
    NeighborhoodAttention(kernel=3, policy=StepPolicy(first=2, last=1, refresh=2)),
    NeighborhoodAttention(kernel=3, correction="lse", policy=StepPolicy(layers="L1")),
    RadialAttention(block=8, correction="none", policy=StepPolicy(first=1, refresh=None)),
    RadialAttention("L1", block=8, correction="share", window="0.5-1"),
    TileAttention(tiles=1, correction="rho", policy=StepPolicy(refresh=3)),
]


@pytest.mark.parametrize("control", CONTROLS, ids=str)
def test_what_is_foreseen_is_what_happens(control):
    pipe, call = video(steps=8)
    with attach(pipe, control) as session:
        foreseen = session.preview(8, **SIZE)
        tiny_pipelines.render(pipe, call)
        again = session.preview(8)  # of the size that ran
    (expected,), record = foreseen.sparse, session.report().controls[0]
    assert again.sparse == foreseen.sparse
    assert expected.amortised == pytest.approx(record.density)
    assert expected.computed == pytest.approx(record.computed)
    by_step = [[steps[str(n)] for steps in record.layers.values()] for n in range(8)]
    assert expected.densities == pytest.approx([sum(s) / len(s) for s in by_step], abs=1e-6)
    assert sum(record.outcomes.values()) == 8 * 2 * expected.sites  # two branches
    assert f"amortised density {expected.amortised:.3f}" in str(foreseen)


def test_the_report_tells_layers_and_steps_that_are_alike_together():
    pipe, call = video(steps=8)
    control = NeighborhoodAttention(kernel=3, policy=StepPolicy(first=2, layers="L0", refresh=3))
    with attach(pipe, control) as session:
        tiny_pipelines.render(pipe, call)
    record = session.report().controls[0]
    density = record.layers["L1.self"]["3"]
    text = str(session.report())
    assert "L0.self: 1.000 at 0-7" in text
    assert f"L1.self: 1.000 at 0-2, 5; {density:.3f} at 3-4, 6-7" in text
    assert "16 dense" not in text and "20 dense, 4 refresh, 8 sparse" in text
    assert session.report().to_dict()["kept_bytes"] == 2 * 108 * 2 * 12 * 4  # two branches
    assert record.steps and list(record.steps.values()) == [[2, 3, 4, 5, 6, 7]]


def test_a_density_that_cannot_be_known_is_not_made_up():
    pipe, _ = video()
    with attach(pipe, SelectedAttention(top_p=0.8)) as session:
        assert "amortised density: not known beforehand" in str(session.preview(8, **SIZE))
    with attach(pipe, CONTROLS[0]) as session:
        assert session.preview(8).sparse[0].amortised is None
        assert session.preview(8, grid=(3, 6, 6)).sparse == session.preview(8, **SIZE).sparse
        with pytest.raises(AttnControlError, match="expected height and width, got height=None"):
            session.preview(8, num_frames=9)
    with attach(pipe, SelectedAttention(keep=0.3)) as session:
        assert "about so much: its masks are chosen" in str(session.preview(8, **SIZE))
    with attach(tiny.wan(), TileAttention()) as session:
        with pytest.raises(AttnControlError, match="does not say how many pixels a token has"):
            session.preview(8, height=8, width=8)


def test_a_run_that_would_be_all_dense_is_refused_beforehand():
    pipe, call = video(steps=4)
    for control, words in (
        (TileAttention(policy=StepPolicy(first=4)), "leaves no level of 4 to be sparse"),
        (TileAttention(policy=StepPolicy(first=2), window="0-0.5"), "every step of window '0-0.5'"),
    ):
        with attach(pipe, control) as session:
            with pytest.raises(AttnControlError, match=words):
                session.preview(4)
            with pytest.raises(AttnControlError, match=words):
                tiny_pipelines.render(pipe, call)


def test_packed_latents_are_counted_in_tokens():
    pipe, call = tiny_pipelines.flux()
    control = TileAttention(tiles=1, tile=2, policy=StepPolicy(first=1, refresh=2))
    with attach(pipe, control) as session:
        foreseen = session.preview(4, height=16, width=16, text_tokens=5).sparse[0]
        tiny_pipelines.render(pipe, call)
        assert session.preview(4).sparse[0].mask is not None
    grid = session._entries[0][0].ledger.place
    assert (grid.shape, grid.before) == ((1, 4, 4), 5)
    assert foreseen.amortised == pytest.approx(session.report().controls[0].density)


def test_two_denoisers_are_told_apart():
    pipe, call = tiny_pipelines.wan(second=tiny.wan())
    call |= {**SIZE, "num_inference_steps": 8}
    control = NeighborhoodAttention(kernel=3, policy=StepPolicy(first=2, refresh=None))
    with attach(pipe, control, strict=True) as session:
        first, second = (tiny_pipelines.render(pipe, call) for _ in range(2))
    assert torch.equal(first, second)
    record = session.report().controls[0]
    assert {"L0.self", "transformer_2:L0.self"} <= record.layers.keys()
    # Each keeps its own: the second denoiser looks at its own first step.
    rows = [row for entry in session._entries[0] for row in entry.ledger.rows]
    looks = {(row.layer, row.index) for row in rows if row.outcome == "refresh"}
    later = min(int(step) for step in record.layers["transformer_2:L0.self"])
    assert {("L0.self", 2), ("transformer_2:L0.self", later)} <= looks
