"""The Video tab: masks and densities before a run, and a run of a stock Wan pipeline."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import tiny_pipelines
import torch
from studio.conftest import prompts_as_noise

from attn_control import attach
from attn_control.processors import build_control
from attn_control.studio import show, show_run
from attn_control.studio.page import start_form
from attn_control.studio.settings import Refused, Settings
from attn_control.studio.studio import Studio
from attn_control.studio.tabs import METHODS, video


@pytest.fixture
def wan(monkeypatch, tmp_path):
    """The zoo has one model: a stock Wan pipeline of random weights."""
    from attn_control import zoo

    pipe, _ = tiny_pipelines.wan()
    prompts_as_noise(pipe, (5, 16))
    size = {"height": 128, "width": 128, "num_frames": 9}  # 3 x 8 x 8 tokens, six blocks of 32
    monkeypatch.setattr(zoo, "NAMES", ("shapes-wan",))
    monkeypatch.setattr(zoo, "path", lambda name: tmp_path)
    monkeypatch.setattr(zoo, "load", lambda name, **_: pipe)
    monkeypatch.setattr(
        zoo, "defaults", lambda name: {**size, "num_inference_steps": 4, "guidance_scale": 2.0}
    )
    return pipe


@pytest.fixture
def studio(wan):
    opened = Studio(Settings(), METHODS)
    yield opened
    opened.close()


@pytest.fixture
def form(studio):
    facts = studio.facts("shapes-wan")
    assert facts.video
    return start_form(facts, METHODS) | {"model": "shapes-wan", "prompt": "a red circle"}


def on(name, **options):
    return {f"{name}.on": True, **{f"{name}.{key}": value for key, value in options.items()}}


SMALL = {"more": "{block: 32}", "policy.first": 0.25, "policy.refresh": 2}


@pytest.mark.parametrize("method", video.METHODS, ids=lambda method: method.control)
def test_what_is_foreseen_is_what_the_session_foresees(studio, form, wan, method):
    """Density by step and amortised, held to Session.preview of the same control and size."""
    # Three frames are all near each other: by the decay factor, no density is asked of radial.
    share = 0.0 if method.control == "RadialAttention" else 0.9
    form |= on(method.control, target_density=share, **SMALL)
    (plan,) = studio.foresee(form)
    ((name, options),) = studio_controls(studio, form)
    with closing(attach(wan, build_control(name, options))) as session:
        (theirs,) = session.preview(4, grid=plan.place.shape).sparse
    assert list(plan.densities) == list(theirs.densities)
    assert list(plan.outcomes) == list(theirs.outcomes) and plan.amortised == theirs.amortised
    assert f"{plan.amortised:.3f}" in show.foreseen([plan])


def studio_controls(studio, form):
    from attn_control.studio.form import controls_of

    return controls_of(form, METHODS, studio.settings.text)


def test_the_drawn_mask_is_the_controls_own(studio, form):
    form |= on("NeighborhoodAttention", target_density=0.5, **SMALL)
    (plan,) = studio.foresee(form)
    drawn = np.asarray(plan.picture()).astype(int)
    share = (drawn.sum(2) < 3 * 255).mean()
    frames, rows, columns = plan.place.shape
    assert plan.mask.q_len == frames * rows * columns
    assert abs(share - plan.mask.visited_density()) < 0.25


def test_a_video_is_made_without_and_with_and_its_densities_are_told(studio, form):
    form |= on("NeighborhoodAttention", target_density=0.5, correction="none", **SMALL)
    run = studio.submit("me", form)
    assert run.wait(120) and run.state == "done", run.error
    result = run.result
    frames = {name: side.frames() for name, side in result.sides.items()}
    assert len(frames["without"]) == len(frames["with"]) == form["frames"]
    assert any(a.tobytes() != b.tobytes() for a, b in zip(*frames.values(), strict=True))
    assert result.report["controls"][0]["density"] < 1
    page = show_run.compare(result)
    assert page.count("data:image/png") == 2 and f'data-count="{form["frames"]}"' in page
    assert f"{result.report['controls'][0]['density']:.3f}" in show_run.report(result)


def test_the_film_holds_every_frame_where_the_page_looks_for_it(studio, form):
    """The sheet is cut by the rule of compare.js: frame n is at (n % columns, n // columns)."""
    import base64
    import io

    from PIL import Image

    run = studio.submit("me", form)
    assert run.wait(120) and run.state == "done", run.error
    frames = run.result.sides["without"].frames()
    page = show_run.compare(run.result)
    raw = base64.b64decode(page.split("data:image/png;base64,")[1].split(")")[0])
    sheet = np.asarray(Image.open(io.BytesIO(raw)))
    columns = int(page.split('data-columns="')[1].split('"')[0])
    height, width = np.asarray(frames[0]).shape[:2]
    for number, frame in enumerate(frames):
        x, y = number % columns * width, number // columns * height
        assert np.array_equal(sheet[y : y + height, x : x + width], np.asarray(frame))


def test_what_cannot_act_is_refused_before_anything_runs(studio, form, monkeypatch):
    """Radial attention of one frame: not after the whole side without it."""
    monkeypatch.setattr("attn_control.studio.work.render", None)
    with pytest.raises(Refused, match="expected a video") as caught:
        studio.submit("me", form | {"frames": 1} | on("RadialAttention"))
    assert caught.value.place == "RadialAttention"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 2}, "1 more than a multiple of"),
        ({"frames": 400}, "frames must be from 1 to 81"),
        (on("RadialAttention", correction="magic"), "must be one of"),
        (on("RadialAttention", **{"policy.refresh": 0}), "from 1"),
        (on("RadialAttention", **{"policy.layers": "L9"}), "L9"),
        (on("RadialAttention", more="{policy: {drfit: 1}}"), "drfit"),
        (on("TileAttention", target_density=1e-9), "density"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(studio, form, change, words):
    with pytest.raises(Refused) as caught:
        run = studio.submit("me", form | change)
        run.wait(60)
        raise run.error or AssertionError("it ran")
    assert words in str(caught.value)
    assert caught.value.place in ("sampler", *[key.partition(".")[0] for key in change])


def test_the_tokens_of_a_size_are_those_that_the_model_sees(studio, form, wan):
    facts = studio.facts("shapes-wan")
    seen = []

    def look(module, arguments, options):
        hidden = options.get("hidden_states", arguments[0] if arguments else None)
        seen.append(tuple(hidden.shape[2:]))

    hook = wan.transformer.register_forward_pre_hook(look, with_kwargs=True)
    run = studio.submit("me", form | {"steps": 1})
    assert run.wait(60) and run.state == "done", run.error
    hook.remove()
    patch = torch.tensor(wan.transformer.config.patch_size)
    latent = torch.tensor(seen[0])
    found = facts.tokens(form["height"], form["width"], form["frames"])
    assert list(found) == (latent // patch).tolist()


@pytest.mark.parametrize("method", video.METHODS, ids=lambda method: method.control)
def test_a_mask_is_drawn_where_it_is_fixed_and_a_sentence_stands_where_it_is_not(
    studio, form, method
):
    form |= on(method.control, **SMALL)
    form |= {f"{method.control}.target_density": 0.9}
    if method.control == "RadialAttention":
        form["RadialAttention.target_density"] = 0.0
    ((name, options),) = studio_controls(studio, form)
    (plan,) = studio.foresee(form)
    page = show.foreseen([plan])
    if build_control(name, options).fixed:
        assert plan.mask is not None and "data:image/png" in page
    else:
        assert plan.mask is None and "it is chosen while it runs" in page
    assert page.count("<rect") == form["steps"]


def test_a_model_whose_layers_differ_in_tokens_has_no_one_mask(monkeypatch, tmp_path):
    """A U-Net: the page says so, and a run is refused or made by what each layer sees."""
    from attn_control import zoo

    pipe, _ = tiny_pipelines.sd15()
    prompts_as_noise(pipe, (7, 32))
    start = {"num_inference_steps": 4, "guidance_scale": 2.0, "height": 128, "width": 128}
    monkeypatch.setattr(zoo, "NAMES", ("shapes-sd15",))
    monkeypatch.setattr(zoo, "path", lambda name: tmp_path)
    monkeypatch.setattr(zoo, "load", lambda name, **_: pipe)
    monkeypatch.setattr(zoo, "defaults", lambda name: start)
    opened = Studio(Settings(), METHODS)
    try:
        facts = opened.facts("shapes-sd15")
        form = start_form(facts, METHODS) | {"model": "shapes-sd15", "prompt": "a red circle"}
        form |= on("NeighborhoodAttention", **SMALL)
        (plan,) = opened.foresee(form)
        assert plan.mask is None and plan.amortised is None
        assert "tokens differ from layer to layer" in show.foreseen([plan])
    finally:
        opened.close()
