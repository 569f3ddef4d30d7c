"""Every option of every control: changed alone, it changes the picture, and to what an explicit
loop with that change draws."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import tiny
import tiny_loops
import tiny_pipelines
import torch
from guides_shared import run
from tiny_oracle import close, forwards, gated, toward_identity

from attn_control import AttnControlError, attach
from attn_control.processors import CONTROLS as ALL
from attn_control.processors import NAG, SEG, SPARSE, HeadGate, SkipLayers, SoftPAG

# Sparse ones want a video: tests/sparse/test_options.py.
CONTROLS = {name: cls for name, cls in ALL.items() if cls not in SPARSE}
FIRST, SECOND = "transformer_blocks.0.attn", "transformer_blocks.1.attn"
IMAGE, TEXT = slice(0, 16), slice(16, 21)


def late(step: int, steps: int) -> bool:
    return 2 * step >= steps


# option: (its other value, what the explicit loop then does)
SOFT_PAG = {
    "heads": ("L0H1-2, L1H3", {"changes": {
        FIRST: toward_identity((1, 2), 0.6), SECOND: toward_identity((3,), 0.6),
    }}),
    "u": (0.2, {"changes": {FIRST: toward_identity((1,), 0.2)}}),
    "scale": (-4.5, {"scale": -4.5}),
    "tokens": ("text", {"changes": {FIRST: toward_identity((1,), 0.6, TEXT)}}),
    "window": ("0.5-1", {"due": late}),
}  # fmt: skip
HEAD_GATE = {
    "heads": ("L0H1-2, L1H3", {"gates": {
        FIRST: gated((1, 2), 0.4), SECOND: gated((3,), 0.4),
    }}),
    "gain": (-2.0, {"gates": {FIRST: gated((1,), -2.0)}}),
    "tokens": ("image", {"gates": {FIRST: gated((1,), 0.4, IMAGE)}}),
    "window": ("0.5-1", {"due": late}),
}  # fmt: skip


def _draw(control, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """What the attached pipeline draws, and what the loop with these options draws."""
    pipe, call = tiny_pipelines.sd3()
    call["latents"] = tiny_loops.start("sd3")
    scheduler = copy.deepcopy(pipe.scheduler)
    with attach(pipe, control, strict=True):
        got = tiny_pipelines.render(pipe, call)
    loop = {"changes": {}, "scale": 3.0, **options}
    return got, tiny_loops.batched(pipe.transformer, scheduler, call, call["latents"], **loop)


BASES = {
    "SoftPAG": (
        SoftPAG("L0H1", u=0.6),
        {"changes": {FIRST: toward_identity((1,), 0.6)}},
        SOFT_PAG,
    ),
    "HeadGate": (HeadGate("L0H1", gain=0.4), {"gates": {FIRST: gated((1,), 0.4)}}, HEAD_GATE),
}
CASES = [(name, option) for name, (_, _, table) in BASES.items() for option in table]


@pytest.mark.parametrize(("name", "option"), CASES)
def test_an_option_does_what_it_says(name, option):
    control, loop, table = BASES[name]
    value, change = table[option]
    base, _ = _draw(control, **loop)
    changed = type(control)(
        **{**{f.name: getattr(control, f.name) for f in fields(control)}, option: value}
    )
    got, expected = _draw(changed, **{**loop, **change})
    close(got, expected)
    assert (got - base).abs().max() > 1e-3


WIDE = torch.zeros(1, 5, 32)
GATES = torch.full((3, 4), 0.5)
COMBINE = {"parallel": 0.0, "limit": 0.05, "rescale": 0.7, "fused": True, "batched": True}
# control: its options as the others are held against, then one other value an option; a pair of
# dicts where an option wants company. What each value means is held to explicit forms above, in
# test_guides, test_fused, test_skip_layers, test_nag, test_pairs and tests/kernels.
OTHER = {
    "SoftPAG": (
        {"heads": "L1H1", "scale": 2.0},
        {"heads": "L1H2", "u": 0.3, "scale": 4.0, "op": "uniform", "tokens": "image"}
        | {"window": "0.5-1", "path": ({"u": 0.5}, {"u": 0.5, "path": "slerp"})}
        | {"seed": ({"op": "permute"}, {"op": "permute", "seed": 3})}
        | {"cap": ({"u": -0.9}, {"u": -0.9, "cap": 1.0}), "gates": GATES}
        | COMBINE,
    ),
    "HeadGate": (
        {"heads": "L1H1"},
        {"heads": "L1H2", "gain": 0.4, "tokens": "text", "window": "0-0.5"},
    ),
    "SEG": (
        {"heads": "L1H1"},
        {"heads": "L1H2", "window": "0.5-1", "sigma": 0.8, "scale": 1.0, **COMBINE},
    ),
    "SkipLayers": (
        {"heads": "L0-2"},
        {"heads": "L1", "window": "0.5-1", "u": 0.4, "scale": 1.0, "what": "attention"}
        | {"stochastic": 1, "seed": ({"stochastic": 1}, {"stochastic": 1, "seed": 1})}
        | COMBINE,
    ),
    "NAG": (
        {"scale": 4.0},
        {"heads": "L1H1", "window": "0.5-1", "scale": 2.0, "tau": 1.1, "alpha": 0.8, "order": 2}
        | {"negative": WIDE + 0.3},
    ),
}
ALONE = {"cap": ("scale",), "fused": ("scale",)}  # what an option does not go with
SAME = {"batched"}  # what changes the rows of a forward, and no picture: see test_batched


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, (_, table) in OTHER.items() for option in table]
)
def test_another_value_draws_another_picture(name, option):
    base, table = OTHER[name]
    value = table[option]
    first, second = value if isinstance(value, tuple) else ({}, {option: value})
    drawn = []
    for given in (first, second):
        options = {n: v for n, v in base.items() if n not in ALONE.get(option, ())} | given
        pipe, call = tiny_pipelines.sd3()
        call |= {"num_inference_steps": 2, "latents": tiny_loops.start("sd3")}
        with attach(pipe, CONTROLS[name](**options), strict=True):
            drawn.append(tiny_pipelines.render(pipe, call))
    assert option in SAME or (drawn[0] - drawn[1]).abs().max() > 1e-4


def test_no_option_is_forgotten():
    """An option without another value in the table above fails here."""
    assert set(OTHER) == set(CONTROLS)
    for name, cls in CONTROLS.items():
        assert {f.name for f in fields(cls)} == set(OTHER[name][1])


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, field.name) for name, cls in ALL.items() for field in fields(cls)],
)
def test_each_option_refuses_what_it_cannot_be(name, option):
    with pytest.raises(AttnControlError, match=name):
        ALL[name](**{"heads": "L1", option: object()})


# what asks for nothing: no row more than the pipeline's own runs
NOTHING = {
    "u": SoftPAG("L1", u=0.0),
    "u by head": SoftPAG("L1", u={"L1": 0.0}),
    "scale": SoftPAG("L1", scale=0.0),
    "gates": SoftPAG.from_gates(torch.zeros(3, 4)),
    "gates by row": SoftPAG.from_gates(torch.zeros(1, 3, 4)),
    "SEG": SEG("L1", scale=0.0),
    "SkipLayers": SkipLayers("L1", scale=0.0),
    "SkipLayers u": SkipLayers("L1", u=0.0),
    "NAG": NAG(scale=1.0),
    "NAG alpha": NAG(alpha=0.0),
    "HeadGate": HeadGate("L1", gain=1.0),
}


@pytest.mark.parametrize("why", NOTHING)
def test_no_row_runs_for_a_control_that_asks_for_nothing(why):
    pipe, call = tiny_pipelines.sd3()
    plain = tiny_pipelines.render(pipe, call)
    with attach(pipe, NOTHING[why], strict=True), forwards(pipe.transformer) as rows:
        assert torch.equal(tiny_pipelines.render(pipe, call), plain)
    assert rows == [2] * 4


@pytest.mark.parametrize("window", ["0.5-1", "sigma 0.85-0.4"])
@pytest.mark.parametrize(
    "make", [lambda w: SoftPAG("L1", window=w), lambda w: SEG("L1", window=w),
             lambda w: SkipLayers("L1", window=w), lambda w: NAG(window=w)],
)  # fmt: skip
def test_rows_are_added_inside_the_window_only(make, window):
    pipe, call = tiny_pipelines.sd3()
    control = make(window)
    with attach(pipe, control), forwards(pipe.transformer) as rows:
        tiny_pipelines.render(pipe, call)
    pipe.scheduler.set_timesteps(4)
    inside = [n >= 2 if window == "0.5-1" else 0.4 <= s <= 0.85
              for n, s in enumerate(pipe.scheduler.sigmas[:4].tolist())]  # fmt: skip
    assert 0 < sum(inside) < 4
    due = [3] if control.appends else [2, 1]
    assert rows == [n for is_in in inside for n in (due if is_in else [2])]


def test_gates_that_change_between_steps_switch_the_extra_forward():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    gates, plain = torch.zeros(3, 4), run(tiny.sd3(), call)
    with attach(model, SoftPAG.from_gates(gates)), forwards(model) as rows:
        assert torch.equal(run(model, call), plain)
        gates[1, 2] = 0.5
        assert not torch.equal(run(model, call), plain)
        gates.zero_()
        assert torch.equal(run(model, call), plain)
    assert rows == [2, 2, 2, 2]


def test_gates_that_want_gradients_run_even_at_zero():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    with attach(model, SoftPAG.from_gates(torch.zeros(3, 4, requires_grad=True))):
        with forwards(model) as rows:
            run(model, call)  # no gradients here
            model(**call)
    assert rows == [2, 2, 2]


def test_the_usual_op_is_the_identity():
    assert SoftPAG("L0").op == "identity"
    with pytest.raises(AttnControlError, match="op must be one of 'identity'"):
        SoftPAG("L0", op="unifrom")


def test_defaults_are_the_papers():
    control = SoftPAG("L0H1")
    assert (control.u, control.scale, control.tokens, control.window) == (1.0, 3.0, "all", "0-1")
    assert HeadGate("L0H1").gain == 0.0
