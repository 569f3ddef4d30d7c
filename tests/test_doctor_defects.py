"""Each check of the doctor's with a defect planted under it: it has to say FAIL, and why."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import tiny
import tiny_pipelines
import torch
from test_doctor_model import tiny_subject

from attn_control import denoiser, families, intercept, layouts, processors, session, softmax
from attn_control.call import Layout
from attn_control.doctor import model as examination
from attn_control.families import find
from attn_control.kernels import PATHS, TARGETS, Blend, Gain, Gates, Region


def examine(
    name: str = "sd3", model: Any = None, call: Any = None, only: str | None = None
) -> dict[str, Any]:
    """Findings by the name of their check; of the heads, the worst."""
    chosen = tuple(each for each in examination._CHECKS if only in (None, each[0]))
    with mock.patch.object(examination, "_CHECKS", chosen):
        model = model or tiny.MODELS[name]()
        call = tiny.family_inputs(name) if call is None else call
        found = list(examination.examine_denoiser("transformer", model, call))
    by_name: dict[str, Any] = {}
    for each in found:
        key = "one head" if each.name.startswith("head ") else each.name
        if by_name.get(key) is None or each.status == "FAIL":
            by_name[key] = each
    return by_name


def must_fail(found: dict[str, Any], check: str, words: str) -> None:
    assert found[check].status == "FAIL", found[check]
    assert words in found[check].detail, found[check].detail


def test_without_a_defect_nothing_fails():
    assert {each.status for each in examine().values()} == {"PASS"}


# ---- family and sites


def test_a_model_without_a_row_is_refused_and_nothing_else_is_claimed():
    class Unknown(torch.nn.Module):
        pass

    found = examine(model=Unknown(), call={})
    must_fail(found, "call", "Unknown is not a model that attn_control knows")
    assert {each.status for name, each in found.items() if name != "call"} == {"SKIP"}


def test_wrong_heads(monkeypatch):
    real = find._geometry
    monkeypatch.setattr(find, "_geometry", lambda m: real(m) | {"heads": 2, "head_dim": 16})
    must_fail(examine(only="sites"), "sites", "attach says 2 heads of 16, it ran 4 of 8")


def test_layers_numbered_backwards(monkeypatch):
    real = intercept.find_sites

    def backwards(model, component):
        sites = real(model, component)
        last = max(site.layer for site in sites)
        return [dataclasses.replace(site, layer=last - site.layer) for site in sites]

    monkeypatch.setattr(intercept, "find_sites", backwards)
    must_fail(examine(only="sites"), "sites", "ran after L2")


def test_a_processor_whose_attention_cannot_be_seen():
    class ByHand:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            q, k, v = (f(hidden_states) for f in (attn.to_q, attn.to_k, attn.to_v))
            out = (q @ k.transpose(1, 2)).softmax(-1) @ v
            return attn.to_out[0](out), encoder_hidden_states

    model = tiny.sd3(qk_norm=None)
    model.transformer_blocks[1].attn.processor = ByHand()
    found = examine(model=model)
    must_fail(
        found, "sites", "transformer_blocks.1.attn (ByHand) ran no attention that can be seen"
    )


# ---- prediction


def test_a_prediction_that_is_no_number():
    model = tiny.sd3()
    with torch.no_grad():
        model.proj_out.bias[0] = float("nan")
    must_fail(examine(model=model, only="prediction"), "prediction", "values that are no numbers")


def test_a_model_that_is_not_steady_is_never_said_to_keep_its_bits():
    model = tiny.sd3()
    model.register_forward_hook(
        lambda m, a, o: (
            (o.sample + torch.rand(()),) if hasattr(o, "sample") else (o[0] + torch.rand(()),)
        )
    )
    found = examine(model=model)
    assert found["prediction"].status == "WARN"
    assert found["empty plan"].status == found["u = 0"].status == "SKIP"
    assert "different bits" in found["empty plan"].detail


# ---- layout


def row(monkeypatch, name: str, layout: Any) -> None:
    """Give a family another layout."""
    cls = type(tiny.MODELS[name]()).__name__
    monkeypatch.setitem(
        find._BY_CLASS, cls, dataclasses.replace(find._BY_CLASS[cls], layout=layout)
    )


def swapped(site, args, model):
    return layouts.text_then_image(site, args, model)


def shifted(site, args, model):
    """The text begins one token later than it does, behind a token of padding."""
    picture, text = layouts.image_then_text(site, args, model).q
    return Layout.joint(
        ("image", picture.length, picture.grid), ("pad", 1, None), ("text", text.length - 1, None)
    )


def turned(site, args, model):
    """Rows and columns of the picture changed for one another."""
    picture, text = layouts.image_then_text(site, args, model).q
    frames, height, width = picture.grid
    return Layout.joint(
        ("image", picture.length, (frames, width, height)), ("text", text.length, None)
    )


def short(site, args, model):
    picture, text = layouts.image_then_text(site, args, model).q
    return Layout.joint(("image", picture.length, picture.grid), ("text", text.length - 1, None))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (swapped, "word 0 moved key 24, but the text is said to stand at 0 to 6"),
        (shifted, "word 0 moved key 24, but the text is said to stand at 25 to 30"),
        (turned, "moved query"),
        (short, "ran 31 queries and 31 keys"),
    ],
)
def test_a_wrong_layout(monkeypatch, layout, words):
    row(monkeypatch, "sd3", layout)
    found = list(examination.examine_denoiser("transformer", tiny.sd3()))  # 4 x 6 tokens, and 7
    (line,) = [each for each in found if each.name == "layout"]
    assert line.status == "FAIL" and words in line.detail, line


def test_a_unet_whose_picture_is_turned(monkeypatch):
    def turned_unet(site, args, model):
        real = layouts.unet(site, args, model)
        picture = real.q[0]
        frames, height, width = picture.grid
        mine = Layout.joint(("image", picture.length, (frames, width, height)))
        return mine if real.is_self else Layout.cross(mine, Layout(real.k, real.k))

    row(monkeypatch, "sd15", turned_unet)
    found = list(examination.examine_denoiser("unet", tiny.unet()))
    (line,) = [each for each in found if each.name == "layout"]
    assert line.status == "FAIL" and "moved query" in line.detail, line


def test_keys_of_cross_attention_that_are_not_the_text(monkeypatch):
    def half(site, args, model):
        real = layouts.video_and_text(site, args, model)
        if site.slot != "cross":
            return real
        keys = Layout.joint(("reference", 3, None), ("text", real.k_len - 3, None))
        return Layout(real.q, keys.k)

    row(monkeypatch, "wan", half)
    must_fail(
        examine("wan", only="layout"),
        "layout",
        "word 0 moved key 0, but the text is said to stand at 3",
    )


# ---- bits


def test_attaching_that_changes_a_bit(monkeypatch):
    real = denoiser.Denoiser.call

    def call(self, forward, args, kwargs):
        output = real(self, forward, args, kwargs)
        return type(output)(sample=output.sample * (1 + 2e-7))

    monkeypatch.setattr(denoiser.Denoiser, "call", call)
    must_fail(
        examine(only="empty plan"), "empty plan", "differs from the plain prediction by up to"
    )


def test_idle_controls_that_run(monkeypatch):
    monkeypatch.setattr(processors.HeadGate, "idle", None)
    real = Gain.__call__
    monkeypatch.setattr(Gain, "__call__", lambda self, out, call: real(self, out, call) + 1e-6)
    found = examine()
    must_fail(found, "u = 0", "differs from the plain prediction")
    assert found["empty plan"].status == "PASS"


# ---- one head, one row


def test_a_wrong_kernel(monkeypatch):
    monkeypatch.setitem(TARGETS, "identity", TARGETS["uniform"])
    must_fail(examine(only="one head"), "one head", "from a dense softmax of 16 rows")


def test_a_strength_that_is_a_little_off(monkeypatch):
    real = PATHS["linear"]
    monkeypatch.setitem(PATHS, "linear", lambda old, new, u, block: real(old, new, u + 1e-4, block))
    must_fail(examine(only="one head"), "one head", "from a dense softmax")


@pytest.mark.parametrize("name", ["sd15", "sana"])
def test_a_wrong_gate_where_heads_are_scaled_in_place(monkeypatch, name):
    from tiny_pictures import PICTURES

    model, call = (
        (PICTURES["sana"].make(), PICTURES["sana"].call()) if name == "sana" else (None,) * 2
    )
    real = Gain.__call__

    def more(self, out, call):
        return torch.where(out == real(self, out, call), out, real(self, out, call) * 1.001)

    monkeypatch.setattr(Gain, "__call__", more)
    must_fail(examine(name, model, call, only="one head"), "one head", "HeadGate")


def test_attention_that_is_no_softmax_is_skipped_not_passed(monkeypatch):
    """A bound made from plain attention's own error must not swallow everything."""
    from attn_control.doctor import heads

    real = heads.dense_rows
    monkeypatch.setattr(heads, "dense_rows", lambda *args: real(*args) * 1.2)
    (found,) = [examine(only="one head")["one head"]]
    assert found.status == "SKIP" and "not understood" in found.detail


def test_a_neighbouring_head_that_changes_too(monkeypatch):
    real = Region.runs
    monkeypatch.setattr(
        Region,
        "runs",
        lambda self: [(a - 1, b) if b - a == 1 and a else (a, b) for a, b in real(self)],
    )
    real_columns = "attn_control.kernels.epilogues._columns"
    monkeypatch.setattr(
        real_columns, lambda per_head, heads, like: per_head.flatten()[:1][None, :, None, None]
    )
    must_fail(
        examine(only="one head"), "one head", "outputs of other heads, tokens or rows changed"
    )


def test_text_that_changes_with_the_picture(monkeypatch):
    monkeypatch.setattr(
        "attn_control.processors.soft_pag.span_of", lambda tokens, layout: ((0, None),)
    )
    must_fail(
        examine(only="one head"), "one head", "outputs of other heads, tokens or rows changed"
    )


def test_a_kernel_that_does_nothing(monkeypatch):
    monkeypatch.setattr(Blend, "__call__", lambda self, out, call: out.clone())
    monkeypatch.setattr(processors.SoftPAG, "may_vanish", True)
    must_fail(examine(only="one head"), "one head", "nothing changed")


def test_gates_of_one_row_that_reach_the_others(monkeypatch):
    real = Gates.__call__

    def leak(self):
        gates = real(self)
        return gates.amax(0, keepdim=True).expand_as(gates) if gates.ndim == 2 else gates

    monkeypatch.setattr(Gates, "__call__", leak)
    must_fail(examine(only="one row"), "one row", "outputs of other heads, tokens or rows changed")


# ---- memory


def test_attaching_that_takes_memory(monkeypatch):
    real = denoiser.Denoiser.call

    def call(self, forward, args, kwargs):
        hoard = torch.ones(1 << 18)
        output = real(self, forward, args, kwargs)
        del hoard
        return output

    monkeypatch.setattr(denoiser.Denoiser, "call", call)
    must_fail(examine(only="peak memory"), "peak memory", "attaching alone takes memory")


def test_guidance_that_takes_memory(monkeypatch):
    real = Blend.__call__

    def call(self, out, call):
        hoard = torch.ones(1 << 18)
        new = real(self, out, call)
        del hoard
        return new

    monkeypatch.setattr(Blend, "__call__", call)
    must_fail(examine(only="peak memory"), "peak memory", "expected at most 1.6 x")


# ---- restore


def left_port(self):
    REAL_RESTORE(self)
    self.ports[0].site.module.__dict__["_attn_control_port"] = self.ports[0]


def left_class(self):
    processor = self.ports[0].site.module.processor
    watched = type(processor)
    REAL_RESTORE(self)
    processor.__class__ = watched


def left_attribute(self):
    REAL_RESTORE(self)
    self.ports[0].site.module.processor.touched = True


def left_hook(self):
    REAL_RESTORE(self)
    self.ports[0].site.module.register_forward_hook(lambda m, a, o: None)


REAL_RESTORE = intercept.Interception.restore


@pytest.mark.parametrize(
    ("restore", "words"),
    [
        (left_port, "the attributes of transformer.transformer_blocks.0.attn"),
        (left_class, "the processor's class of transformer.transformer_blocks.0.attn"),
        (left_attribute, "the processor's attributes of transformer.transformer_blocks.0.attn"),
        (left_hook, "the hooks of transformer.transformer_blocks.0.attn"),
    ],
)
def test_something_left_behind(monkeypatch, restore, words):
    armed = []

    def only_at_last(self):
        (restore if armed else REAL_RESTORE)(self)

    monkeypatch.setattr(intercept.Interception, "restore", only_at_last)
    real = examination.checks.restore

    def check(patient):
        armed.append(True)
        return real(patient)

    monkeypatch.setattr(examination, "_CHECKS", (*examination._CHECKS[:-1], ("restore", check)))
    must_fail(examine(only="restore"), "restore", words)


def test_a_name_left_redirected(monkeypatch):
    import diffusers.models.attention_processor as home

    before = home.F
    real = intercept.unpatch
    found: dict[str, Any] = {}
    try:
        monkeypatch.setattr(intercept, "unpatch", lambda names: None)
        patient = examination._patient(
            examination.Patient(
                "transformer", tiny.sd3(), families.family_of(tiny.sd3()), tiny.inputs("sd3")
            )
        )
        home.F, softmax.patched = before, {}
        found["restore"] = examination.checks.restore(patient)
    finally:
        softmax.patched.clear()
        home.F = before
        monkeypatch.setattr(intercept, "unpatch", real)
    must_fail(found, "restore", "diffusers.models.attention_processor.F")


def test_undo_that_an_exception_prevents(monkeypatch):
    real, open_still = session.Session.__exit__, []

    def leave(self, kind, error, trace):
        if kind is not None:
            open_still.append(self)
        return None if kind is not None else real(self, kind, error, trace)

    monkeypatch.setattr(session.Session, "__exit__", leave)
    try:
        must_fail(examine(only="restore"), "restore", "not as before")
    finally:
        for each in open_still:
            each.close()


# ---- pipelines


@pytest.fixture
def run(monkeypatch):
    def examined() -> Any:
        pipe, call = tiny_pipelines.sd3()
        found = examination.examine_subject(
            tiny_subject(monkeypatch, pipe, call | {"num_inference_steps": 2})
        )
        return {each.name: each for each in found}

    return examined


def test_a_pipeline_that_is_not_its_old_self(monkeypatch, run):
    real = denoiser.Denoiser.call

    def call(self, forward, args, kwargs):
        output = real(self, forward, args, kwargs)
        return (output[0] + 1e-3,) if self.sessions[-1][0].pipe is not None else output

    monkeypatch.setattr(denoiser.Denoiser, "call", call)
    must_fail(run(), "pipeline", "attached with no control, it differs")


def test_a_control_that_acts_at_one_step_only(monkeypatch, run):
    from attn_control.select import Window

    monkeypatch.setattr(Window, "holds", lambda self, step, who="": not step.index)
    must_fail(run(), "pipeline", "acted at steps [0] only")


def test_a_pipeline_that_breaks_is_one_line(monkeypatch, run):
    def broken(*args, **kwargs):
        raise RuntimeError("no\nway")

    monkeypatch.setattr(examination, "run_pipeline", broken)
    must_fail(run(), "pipeline", "RuntimeError: no way")
