"""The report's numbers are those of the run, and the preview's those of the run to come."""

from __future__ import annotations

import json

import diffusers
import pytest
import tiny
import tiny_pipelines
import torch
from tiny_oracle import forwards

from attn_control import AttnControlError, attach
from attn_control.processors import NAG, HeadGate, SoftPAG

pytestmark = pytest.mark.filterwarnings("ignore:::diffusers", "ignore:::numpy")


def test_numbers_of_a_known_run():
    pipe, call = tiny_pipelines.sd3()
    controls = (
        SoftPAG("L0H1, L2", u=0.5, window="0.5-1"),
        HeadGate("L1H0-1"),
        SoftPAG("L0", u=0.0),
    )
    with attach(pipe, *controls) as session:
        tiny_pipelines.render(pipe, call)
        during = session.report().to_dict()
    data = session.report().to_dict()
    assert data == during  # asking costs nothing and closing loses nothing
    guide, gate, idle = data["controls"]
    assert guide["name"] == "SoftPAG(heads='L0H1, L2', window='0.5-1', u=0.5)"
    assert {k: (s["label"], s["heads"], s["calls"]) for k, s in guide["sites"].items()} == {
        "transformer.transformer_blocks.0.attn": ("L0.joint", [1], 2),
        "transformer.transformer_blocks.2.attn": ("L2.joint", [0, 1, 2, 3], 2),
    }
    assert (guide["calls"], list(guide["steps"].values())) == (4, [[2, 3]])
    assert guide["fired"] and guide["idle"] is None and guide["reason"] is None
    assert guide["extra"]["calls"] == 2
    # In place: in 4 plain and 2 perturbed forwards.
    assert gate["calls"] == 6 and list(gate["steps"].values()) == [[0, 1, 2, 3]]
    assert gate["extra"] == {}
    assert idle["idle"] == "u is 0" and idle["calls"] == 0 and not idle["fired"]
    assert data["plain"]["calls"] == 4 and data["guided"]["calls"] == 2
    assert 0 < data["guided"]["seconds"] < 60 and 0 < data["plain"]["seconds"] < 60
    assert 0 < guide["extra"]["seconds"] < 60
    assert data["plain"]["peak_bytes"] > 2**20 and data["guided"]["peak_bytes"] > 2**20
    assert {c["density"] for c in data["controls"]} == {1.0}
    json.dumps(data)


def test_the_text_says_what_the_numbers_say():
    pipe, call = tiny_pipelines.sd3()
    with attach(pipe, SoftPAG("L0H1", window="0.25-1"), HeadGate("L1", gain=1)) as session:
        tiny_pipelines.render(pipe, call)
        tiny_pipelines.render(pipe, call)
    text = str(session.report())
    row = next(line for line in text.splitlines() if "SoftPAG" in line)
    assert "L0.joint" in row and "1-3; 1-3" in row and " 6 " in row
    assert "idle: gain is 1" in text
    assert "plain forwards: 8 calls" in text and "extra forwards: 6 calls" in text


def test_a_bare_model_has_calls_but_no_steps():
    model = tiny.sd3()
    with torch.no_grad(), attach(model, SoftPAG("L1H2")) as session:
        for _ in range(3):
            model(**tiny.inputs("sd3"))
    record = session.report().controls[0]
    assert record.calls == 3 and record.steps == {}


def test_an_inner_session_reports_its_own_controls_only():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    with torch.no_grad(), attach(model, HeadGate("L0")) as outer:
        model(**call)
        with attach(model, HeadGate("L1"), HeadGate("L2H0")) as inner:
            model(**call)
    assert [r.calls for r in outer.report().controls] == [2]
    assert [r.calls for r in inner.report().controls] == [1, 1]


def test_preview_of_guidance_and_gates():
    pipe, call = tiny_pipelines.sd3()
    controls = (
        SoftPAG("L0", window="0-0.5"),
        HeadGate("L1", window="0.9-1"),
        SoftPAG("L1", scale=0.0),
        SoftPAG("L2", window="sigma 0.9-0.5"),
    )
    with pytest.warns(UserWarning), attach(pipe, *controls) as session:
        preview = session.preview(10)
    pipe.scheduler.set_timesteps(10)
    levels = pipe.scheduler.sigmas.tolist()
    assert preview.steps == 10
    assert [(row.idle, row.steps, row.extra) for row in preview.rows] == [
        (None, [0, 1, 2, 3, 4], True),
        (None, [9], False),
        ("scale is 0", [], True),
        (None, [n for n, s in enumerate(levels) if 0.5 <= s <= 0.9], True),
    ]
    assert preview.extra_forwards == 5 + len(preview.rows[3][2])
    assert "5 of 10 steps, one extra forward each" in str(preview)
    assert f"extra forwards: {preview.extra_forwards} beside 10 steps" in str(preview)


@pytest.mark.parametrize(
    ("scheduler", "window"),
    [
        (lambda: diffusers.DDIMScheduler(clip_sample=False, steps_offset=1), "0.3-0.8"),
        (diffusers.HeunDiscreteScheduler, "0.3-0.8"),
        (lambda: diffusers.PNDMScheduler(skip_prk_steps=True), "0-0.5"),
        (diffusers.EulerDiscreteScheduler, "sigma 8-0.5"),
    ],
)  # fmt: skip
def test_preview_is_what_the_run_then_does(scheduler, window):
    pipe, call = tiny_pipelines.sd15(scheduler())
    with attach(pipe, SoftPAG("L2", window=window)) as session:
        preview = session.preview(6)
        tiny_pipelines.render(pipe, {**call, "num_inference_steps": 6})
    assert list(session.report().controls[0].steps.values()) == [preview.rows[0].steps]
    report = session.report()
    assert (report.plain["calls"], report.guided["calls"]) == (
        preview.steps,
        preview.extra_forwards,
    )


@pytest.mark.parametrize("window", ["sigma 0.9-0.5", "0.2-0.6"])
@pytest.mark.parametrize("family", ["flux", "flux_true_cfg", "wan"])
def test_preview_of_flow_models_is_what_the_run_then_does(family, window):
    pipe, call = tiny_pipelines.PIPELINES[family]()
    with attach(pipe, SoftPAG("L1", window=window)) as session:
        preview = session.preview(8)
        tiny_pipelines.render(pipe, {**call, "num_inference_steps": 8})
    assert list(session.report().controls[0].steps.values()) == [preview.rows[0].steps]
    assert session.report().guided["calls"] == preview.extra_forwards


def test_row_forwards_count_the_rows_that_really_run():
    """Under CFG: two rows a step, one more for each guide due, and NAG's cond rows again."""
    pipe, call = tiny_pipelines.sd3()
    guide, nag = SoftPAG("L1", window="0-0.5"), NAG(window="0.25-1")
    for controls, want in (((), 8), ((guide,), 10), ((nag,), 11), ((guide, nag), 14)):
        with attach(pipe, *controls) as session, forwards(pipe.transformer) as seen:
            preview = session.preview(4)
            tiny_pipelines.render(pipe, call)
        assert sum(seen) == preview.row_forwards(2) == want


def test_preview_of_noise_levels_that_depend_on_the_picture_is_an_upper_bound():
    pipe, _ = tiny_pipelines.flux()
    pipe.scheduler.register_to_config(use_dynamic_shifting=True)
    with pytest.warns(UserWarning), attach(pipe, SoftPAG("L1", window="sigma 0.9-0.5")) as session:
        preview = session.preview(8)
    assert not preview.exact
    assert "at most 8 beside 8 steps" in str(preview)


def test_preview_leaves_the_scheduler_alone():
    pipe, _ = tiny_pipelines.sd3()
    pipe.scheduler.set_timesteps(3)
    before = pipe.scheduler.timesteps
    with attach(pipe) as session:
        session.preview(50)
    assert pipe.scheduler.timesteps is before


def test_preview_refuses_an_empty_window():
    pipe, _ = tiny_pipelines.sd3()
    with pytest.warns(UserWarning), attach(pipe, SoftPAG("L0", window="0.1-0.2")) as session:
        with pytest.raises(AttnControlError, match="holds no step of this run of 4 steps"):
            session.preview(4)
        assert session.preview(10).extra_forwards == 1


@pytest.mark.parametrize("steps", [0, -1, 2.5, "10", True, None])
def test_preview_refuses_steps_that_are_no_positive_whole_number(steps):
    with attach(tiny.sd3()) as session, pytest.raises(AttnControlError, match="positive whole"):
        session.preview(steps)
