"""Every option of every control: changed alone, it changes the picture, and to what an explicit
loop with that change draws."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import tiny_loops
import tiny_pipelines
import torch
from tiny_oracle import close, gated, toward_identity

from attn_control import AttnControlError, attach
from attn_control.processors import CONTROLS, HeadGate, SoftPAG

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


# Options that have their explicit forms in files of their own.
ELSEWHERE = {
    "SoftPAG": {"op", "path", "cap", "seed", "gates", "parallel", "limit", "rescale"},
    "HeadGate": set(),
    "SEG": {"heads", "window", "sigma", "scale", "parallel", "limit", "rescale"},
    "SkipLayers": {"heads", "window", "u", "scale", "what", "parallel", "limit", "rescale"},
    "NAG": {"heads", "window", "scale", "tau", "alpha", "order", "negative"},
}


def test_no_option_is_forgotten():
    """Here, or in test_guides, test_skip_layers, test_nag and tests/kernels/test_targets."""
    assert set(ELSEWHERE) == set(CONTROLS)
    for name, cls in CONTROLS.items():
        table = BASES[name][2] if name in BASES else {}
        assert {f.name for f in fields(cls)} - set(table) == ELSEWHERE[name]


def test_the_usual_op_is_the_identity():
    assert SoftPAG("L0").op == "identity"
    with pytest.raises(AttnControlError, match="op must be one of 'identity'"):
        SoftPAG("L0", op="unifrom")


def test_defaults_are_the_papers():
    control = SoftPAG("L0H1")
    assert (control.u, control.scale, control.tokens, control.window) == (1.0, 3.0, "all", "0-1")
    assert HeadGate("L0H1").gain == 0.0
