"""The doctor on healthy models: PASS where it looked, SKIP with a reason where it could not.

What it says of sick ones is in test_doctor_defects.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_pipelines
import torch
from test_z_image import MAKE, _call
from tiny_attach_only import ATTACH_ONLY, SEVERAL
from tiny_more import MORE, more_inputs
from tiny_oracle import attention, dense
from tiny_pictures import PICTURES
from tiny_videos import VIDEOS
from typer.testing import CliRunner

from attn_control import doctor
from attn_control.cli import app
from attn_control.doctor import heads, subject
from attn_control.doctor import model as examination
from attn_control.doctor.finding import Skipped
from attn_control.doctor.inputs import made_up_call
from attn_control.doctor.memory import LiveBytes
from attn_control.doctor.watch import softmaxes
from attn_control.families import family_of

DOC = Path(__file__).parents[1] / "docs" / "doctor.md"
WIDE = {**PICTURES, **VIDEOS, **ATTACH_ONLY, **SEVERAL}
NOT_MADE_UP = {  # asks for arguments that have no rule
    "vace",
    "lumina2",
    "hunyuanimage",
    "krea2",
    "hunyuandit",
    "prx",
    "ernie",
    "glm",
    "hidream",
    "hunyuanvideo15",
    "kandinsky5",
    "wan_animate",
    "ltx2",
    "anyflow",
}


def models():
    yield from ((name, make, None) for name, make in tiny.MODELS.items())
    yield from ((name, make, more_inputs(name)) for name, make in MORE.items())
    yield from ((name, one.make, one.call()) for name, one in WIDE.items())
    yield "z_image", MAKE, _call()


def bad(findings: list[doctor.Finding]) -> list[doctor.Finding]:
    return [each for each in findings if each.status in ("FAIL", "WARN")]


# One model of every family would take a minute: here those that differ in what a check must know.
CHOSEN = ("sd15", "sd35", "flux", "wan", "sana", "pixart", "prx", "mochi", "cogvideox", "z_image")
CHOSEN += ("wan_animate", "hunyuanimage", "krea2", "flux3", "kandinsky5", "hunyuanvideo15")


@pytest.mark.parametrize(
    ("name", "make", "call"), [pytest.param(*m, id=m[0]) for m in models() if m[0] in CHOSEN]
)
def test_nothing_fails_on_a_healthy_denoiser(name, make, call):
    call = call or tiny.family_inputs(name)
    found = list(examination.examine_denoiser("transformer", make(), call))
    assert not bad(found), bad(found)
    passed = {each.name.split(" L")[0] for each in found if each.status == "PASS"}
    assert passed >= {"family", "sites", "prediction", "empty plan", "u = 0", "head", "restore"}
    known = name not in ("mochi",)
    assert ("layout" in passed) == known
    skipped = {each.name: each.detail for each in found if each.status == "SKIP"}
    assert set(skipped) <= {"layout", "one row"} and all(skipped.values())


@pytest.mark.parametrize(
    ("name", "make"),
    [pytest.param(*m[:2], id=m[0]) for m in models() if m[0] not in {*ATTACH_ONLY, *SEVERAL}],
)
def test_inputs_of_a_bare_denoiser_are_made_up_or_it_is_said_why_not(name, make):
    model = make()
    family = family_of(model)
    if name in NOT_MADE_UP | {"z_image"}:
        with pytest.raises(Skipped, match=f"for a bare {family.name}: .*; give the whole pipeline"):
            made_up_call(model, family)
        return
    call = made_up_call(model, family)
    with torch.no_grad():
        assert torch.isfinite(model(**call, return_dict=False)[0]).all()


def test_stacks_that_do_not_run_as_numbered_are_a_warning():
    found = examination.examine_denoiser("transformer", MORE["vace"](), more_inputs("vace"))
    (warned,) = bad(list(found))
    assert warned.status == "WARN" and "stack by stack" in warned.detail


def test_bfloat16():
    model = tiny.flux().to(torch.bfloat16)
    found = list(examination.examine_denoiser("transformer", model))
    assert not bad(found), bad(found)


# ---- loading


@pytest.mark.parametrize("where", ["", "transformer"])
def test_a_folder_that_holds_only_a_denoiser(tmp_path, where):
    tiny.flux().save_pretrained(tmp_path / where)
    found = list(doctor.examine_model(str(tmp_path), "cpu"))
    assert not bad(found), bad(found)
    lines = {each.name: each for each in found}
    assert lines["load"].figures["kind"] == "denoiser"
    assert lines["pipeline"].status == "SKIP" and "bare denoiser" in lines["pipeline"].detail
    assert "head L2.jointH1" in lines


def test_a_bare_denoiser_without_a_rule_is_skipped_not_passed(tmp_path):
    PICTURES["ernie"].make().save_pretrained(tmp_path)
    found = list(doctor.examine_model(str(tmp_path), "cpu"))
    assert [each.name for each in found if each.status == "PASS"] == ["load"]
    (call,) = [each for each in found if each.name == "call"]
    assert call.status == "SKIP" and "'text_bth'" in call.detail


def saved(tmp_path, **config):
    tiny.sd3().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: saved(f, _class_name="NoSuchModel"), "names no model class of diffusers"),
        (lambda f: (saved(f), (f / "x.py").write_text("")), "holds code (x.py)"),
        (lambda f: (saved(f), (f / "config.json").write_text("{")), "names no model class"),
        (lambda f: (saved(f), _pickle(f)), "only pickled weights"),
        (lambda f: saved(f, num_layers=2.5), "cannot be loaded"),
        (lambda f: None, "has no model_index.json"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_one_line(tmp_path, spoil, words):
    spoil(tmp_path)
    (found,) = doctor.examine_model(str(tmp_path), "cpu")
    assert (found.status, found.name) == ("FAIL", "load")
    assert words in found.detail and "\n" not in found.detail


def _pickle(folder):
    (weights,) = folder.glob("*.safetensors")
    weights.rename(folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("name", "device", "words"),
    [
        ("shapes-sd4", "cpu", "did you mean 'shapes-sd3'"),
        ("nobody/nothing", "cpu", "HF_HUB_OFFLINE is set"),
        ("shapes-sd3", "cuda:9", "use --device cpu"),
        ("shapes-sd3", "tpu", "expected auto, cpu"),
    ],
)
def test_a_name_or_device_that_is_not_there_is_one_line(name, device, words):
    (found,) = doctor.examine_model(name, device)
    assert found.status == "FAIL" and words in found.detail


# ---- pipelines


def tiny_subject(monkeypatch, pipe, call):
    monkeypatch.setattr(
        examination, "pipeline_arguments", lambda s, n: call | {"output_type": "latent"}
    )
    models = {
        name: getattr(pipe, name)
        for name in ("transformer", "transformer_2", "unet")
        if getattr(pipe, name, None) is not None
    }
    return subject.Subject("tiny", "folder", pipe, models, "cpu", "float32")


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_true_cfg"])
def test_a_pipeline_is_run_and_its_own_call_examined(monkeypatch, name):
    pipe, call = tiny_pipelines.PIPELINES[name]()
    call |= {"num_inference_steps": 2}
    found = list(examination.examine_subject(tiny_subject(monkeypatch, pipe, call)))
    assert not bad(found), bad(found)
    (run,) = [each for each in found if each.name == "pipeline"]
    assert run.status == "PASS" and run.figures["report"]["controls"][0]["fired"]


def test_both_denoisers_of_wan_2_2_are_examined_by_name(monkeypatch):
    pipe, call = tiny_pipelines.wan(tiny.wan(), tiny.wan())
    found = list(examination.examine_subject(tiny_subject(monkeypatch, pipe, call)))
    assert not bad(found), bad(found)
    names = {each.name for each in found}
    assert {"transformer: sites", "transformer_2: sites"} <= names


def test_a_pipeline_that_needs_more_than_a_prompt_is_skipped():
    class Odd:
        text_encoder = object()

        def __call__(self, prompt=None, num_inference_steps=4, *, pose, **kwargs):
            """Asks for a pose."""

    odd = subject.Subject("odd", "hub", Odd(), {}, "cpu", "float32")
    with pytest.raises(Skipped, match="Odd cannot be called with a prompt alone: pose"):
        subject.pipeline_arguments(odd, 2)
    bare, _ = tiny_pipelines.sd3()
    without = subject.Subject("x", "hub", bare, {}, "cpu", "float32")
    with pytest.raises(Skipped, match="loaded without its text encoder"):
        subject.pipeline_arguments(without, 2)


def test_pictures_are_made_up_where_a_pipeline_asks_for_them():
    class Inpaint:
        def __call__(self, prompt=None, image=None, mask_image=None, num_inference_steps=4):
            """Asks for both."""

    asked = subject.Subject("x", "hub", Inpaint(), {}, "cpu", "float32")
    given = subject.pipeline_arguments(asked, 3)
    assert given["image"].size == given["mask_image"].size == (subject.SIZE, subject.SIZE)
    assert given["num_inference_steps"] == 3 and "height" not in given


@pytest.mark.slow
def test_the_command_on_the_built_in_model(tmp_path):
    file = tmp_path / "report.json"
    done = CliRunner().invoke(
        app, ["doctor", "--model", "shapes-sd3", "--device", "cpu", "--json", str(file)]
    )
    assert done.exit_code == 0, done.output
    content = json.loads(file.read_text())
    assert content["model"] == "shapes-sd3" and not content["failed"]
    lines = {each["name"]: each for each in content["checks"]}
    assert {each["status"] for each in content["checks"]} == {"PASS"}
    assert lines["sites"]["figures"]["slots"] == {"joint": 6}
    assert lines["load"]["figures"]["weights"] > 3e6
    assert lines["peak memory"]["figures"]["plain"] > 1 << 20
    assert lines["head L3.jointH2"]["figures"]["error"] < 1e-5
    # The transcript in the documentation is of these very checks.
    transcript = re.search(r"```text\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S)
    assert transcript is not None
    shown = transcript.group(1).strip().splitlines()[-len(lines) :]
    assert [re.split(r"  +", line)[:2] for line in shown] == [
        [each["status"], each["name"]] for each in content["checks"]
    ]
    for name, _ in examination._CHECKS:
        assert f"`{name}" in DOC.read_text(encoding="utf-8") or name == "one head"


def test_the_command_ends_with_1_when_the_model_cannot_be_had(tmp_path):
    file = tmp_path / "report.json"
    done = CliRunner().invoke(app, ["doctor", "--model", "shapes-sd4", "--json", str(file)])
    assert done.exit_code == 1
    content = json.loads(file.read_text())
    assert content["failed"] and content["checks"][0]["name"] == "load"


# ---- the doctor's own instruments


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_observer_sees_what_another_observer_sees(family):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    with torch.no_grad(), attention(model) as theirs:
        model(**call)
    with torch.no_grad(), softmaxes(model, keep=tuple(theirs)) as ours:
        model(**call)
    assert list(ours) == list(theirs)
    for name, calls in theirs.items():
        canonical = theirs[name][0]
        mine = ours[name][0]
        assert len(ours[name]) == len(calls)
        for side in ("q", "k", "v", "out"):
            assert torch.equal(getattr(mine, side), getattr(canonical, side)), (name, side)
        assert torch.equal(mine.plain, mine.out)


@pytest.mark.parametrize("mask", [None, "keys", "bool keys", "queries", "heads", "two", "causal"])
def test_sampled_rows_are_rows_of_the_dense_softmax(mask):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 4, generator=g) for h in (4, 2, 2))
    keep = torch.rand(2, 1, 1, 9, generator=g) > 0.3
    keep[..., 0] = True
    given: Any = {
        "keys": torch.zeros(2, 1, 1, 9).masked_fill(~keep, -1e9),
        "bool keys": keep,
        "queries": torch.randn(2, 1, 9, 9, generator=g),
        "heads": torch.randn(2, 4, 9, 9, generator=g),
        "two": keep[:, 0, 0],
        "causal": torch.ones(9, 9).tril().bool()[None, None],
    }.get(mask or "")
    call = heads.Softmax(
        q, k, v, q, q, None if mask == "causal" else given, 0.7, causal=mask == "causal"
    )
    full = given[:, None, None] if mask == "two" else given
    a = dense(q, k.repeat_interleave(2, 1), 0.7, full)
    rows = torch.tensor([0, 3, 8])
    for head in range(4):
        wanted = (a @ v.repeat_interleave(2, 1).double())[:, head, rows]
        assert torch.allclose(heads.dense_rows(call, head, rows), wanted, atol=1e-12)


def test_living_bytes_are_counted_at_their_peak():
    weight = torch.randn(100, 100)
    with LiveBytes() as mode:
        a = torch.ones(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        del a
        c = b * 2  # 8,000
        del b
        d = weight.t()  # a view of what was there before
    assert mode.peak == 8000 and c.shape == (1000,) and d.shape == (100, 100)
