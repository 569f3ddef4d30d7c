"""Every option of every sparse control: another value draws another video, or it is refused."""

from __future__ import annotations

from dataclasses import fields
from functools import cache

import pytest
import tiny_pipelines
import torch
from sparse_shared import video

from attn_control import AttnControlError, attach
from attn_control.policy import StepPolicy
from attn_control.processors import SPARSE, build_control
from attn_control.processors.sparse import SparseControl

NAMES = {cls.__name__: cls for cls in SPARSE}
ONCE = {"correction": "none", "policy": StepPolicy(refresh=None)}
FREE = {"select_at": "step", **ONCE}
# control: (options that all its cases have, option: another value, or a pair of dicts)
OTHER = {
    "RadialAttention": (
        {"block": 8},
        {"decay_factor": 0.1, "model": "hunyuan", "revision": "r1", "sink": False}
        | {"target_density": ({}, {"target_density": 0.8})}
        # What all controls share is tried on this one.
        | {"heads": "L1H0", "window": "0.5-1", "correction": "lse", "block": 16}
        | {"rho_gain": ({"correction": "rho"}, {"correction": "rho", "rho_gain": 0.4})}
        | {"policy": StepPolicy(layers="L0")},
    ),
    "NeighborhoodAttention": (
        {"kernel": 3},
        {"kernel": (3, 5, 3), "stride": 3, "dilation": (1, 2, 2), "order": "raster"}
        | {"target_density": ({}, {"kernel": None, "target_density": 0.9})},
    ),
    "TileAttention": (
        {"tiles": 2},
        {"tiles": (1, 2, 2), "tile": (1, 4, 4)}
        | {"target_density": ({}, {"tiles": None, "target_density": 0.9})},
    ),
    "SpatialTemporalAttention": (
        {"target_density": 0.7},
        {"target_density": 0.9, "samples": 1}
        | {"select_at": (ONCE, FREE)},
    ),
    "SelectedAttention": (
        {"keep": 0.3},
        {"keep": 5, "top_p": ({}, {"keep": None, "top_p": 0.2})}
        | {"threshold": ({}, {"keep": None, "threshold": 0.12}), "score": "exact"}
        | {"samples": ({"score": "sampled"}, {"score": "sampled", "samples": 1})}
        | {"near": 2, "order": "raster", "select_at": (ONCE, FREE)},
    ),
    "ReshapedAttention": ({}, {"width": 0.5, "correction": "residual"}),
    "AutoSparse": ({"target_density": 0.5}, {"target_density": 0.8, "samples": 2}),
}  # fmt: skip
ELSEWHERE = {"sink"}  # of heads that are spatial, which these are not: test_choices
ROUNDING = {("NeighborhoodAttention", "order")}
POLICIES = {
    "first": StepPolicy(first=2, refresh=None),
    "last": StepPolicy(last=1, refresh=None),
    "layers": StepPolicy(layers="L0", refresh=None),
    "refresh": StepPolicy(refresh=2),
    "drift": StepPolicy(drift=0.0, refresh=None),
    "min_tokens": StepPolicy(min_tokens=321, refresh=None),
}


@cache
def _drawn(name: str, options: tuple) -> torch.Tensor:
    pipe, call = video(steps=5, size=128)
    control = NAMES[name](**dict(options))
    call |= {"num_frames": 17}  # 5 x 8 x 8 tokens
    with attach(pipe, control):
        return tiny_pipelines.render(pipe, call)


def draw(name: str, options: dict) -> torch.Tensor:
    return _drawn(name, tuple(options.items()))


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, (_, table) in OTHER.items() for option in table]
)
def test_another_value_draws_another_video(name, option):
    base, table = OTHER[name]
    value = table[option]
    first, second = (
        value
        if isinstance(value, tuple) and isinstance(value[0], dict)
        else (
            {},
            {option: value},
        )
    )
    one, other = (draw(name, {**base, **given}) for given in (first, second))
    difference = float((one - other).abs().max())
    if (name, option) in ROUNDING:
        assert difference < 1e-4
    else:
        assert difference > 1e-5


def test_no_option_is_forgotten():
    shared = {field.name for field in fields(SparseControl)}
    assert OTHER.keys() == NAMES.keys()
    assert {f for f in OTHER["RadialAttention"][1]} >= shared
    for name, cls in NAMES.items():
        own = {field.name for field in fields(cls)} - shared
        assert own <= OTHER[name][1].keys() | ELSEWHERE


@pytest.mark.filterwarnings("ignore:attach. never acted")
@pytest.mark.parametrize("option", POLICIES)
def test_each_option_of_a_policy_draws_another_video(option):
    assert POLICIES.keys() == {field.name for field in fields(StepPolicy)}
    base = {"kernel": 3, "policy": StepPolicy(refresh=None)}
    one = draw("NeighborhoodAttention", base)
    other = draw("NeighborhoodAttention", base | {"policy": POLICIES[option]})
    assert (one - other).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("RadialAttention", {"decay_factor": 0.5, "target_density": 0.3}, "not both"),
        ("RadialAttention", {"target_density": 1.5}, "target_density must be a share"),
        ("RadialAttention", {"rho_gain": 0.1}, "expected correction='rho'"),
        ("RadialAttention", {"block": 4}, "block must be a whole number from 8"),
        ("RadialAttention", {"policy": {"layers": "L0H1"}}, "names heads; expected layers"),
        ("NeighborhoodAttention", {"kernel": 3, "target_density": 0.2}, "not both"),
        ("NeighborhoodAttention", {"kernel": 1}, "kernel must be a whole number from 2"),
        ("NeighborhoodAttention", {"kernel": [3, 3, 3, 3]}, "or one an axis"),
        ("TileAttention", {"tile": 4, "block": 32}, "a tile is a block"),
        ("SpatialTemporalAttention", {"select_at": "step"}, "expected select_at='refresh' or"),
        ("SelectedAttention", {"threshold": 0.1, "keep": 0.2}, "stands alone"),
        ("SelectedAttention", {"samples": 2}, "expected score='sampled'"),
        ("SelectedAttention", {"near": 2, "order": "raster"}, "expected order='tiles'"),
        ("SelectedAttention", {"keep": 0}, "keep must be a whole number from 1"),
        ("AutoSparse", {"samples": 0}, "samples must be a whole number from 1"),
    ],
)
def test_what_does_not_go_together_is_refused(name, options, words):
    with pytest.raises(AttnControlError) as error:
        build_control(name, options)
    assert str(error.value).startswith(f"{name}(heads='all'): ") and words in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"policy": StepPolicy(layers="L7")}, "policy.layers: 'L7' matches no attention site"),
     ({"policy": StepPolicy(layers="L0-1")}, "keeps every selected layer dense")],
)  # fmt: skip
def test_layers_that_cannot_be_are_refused_when_attached(options, words):
    pipe, _ = video()
    with pytest.raises(AttnControlError, match=words):
        attach(pipe, NAMES["TileAttention"](**options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RadialAttention", {"revision": "paper"}),
        ("NeighborhoodAttention", {}),
        ("SpatialTemporalAttention", {}),
        ("AutoSparse", {}),
    ],
)
def test_a_block_size_that_a_mask_cannot_have_is_told_as_the_controls(name, options):
    pipe, call = video(steps=4, size=112)
    control = NAMES[name](block=16, **options)
    with pytest.raises(AttnControlError) as error:
        with attach(pipe, control):
            tiny_pipelines.render(pipe, call | {"num_frames": 17})
    said = str(error.value)
    assert said.startswith(f"{name}(") and "BlockMask" not in said
    assert "block=16 does not fit (5, 7, 7) tokens" in said and "a multiple of 32" in said


def test_what_the_maker_of_a_mask_refuses_names_the_control():
    pipe, call = video(steps=4)
    control = NAMES["RadialAttention"](target_density=0.01)
    with pytest.raises(AttnControlError, match=r"^RadialAttention\(.*target_density=0\.01"):
        with attach(pipe, control):
            tiny_pipelines.render(pipe, call)


def test_a_density_out_of_reach_says_what_is_in_reach():
    pipe, call = video(steps=4)
    control = NAMES["SpatialTemporalAttention"](target_density=0.1)
    with pytest.raises(AttnControlError, match="0.1 is out of reach for this geometry: the spars"):
        with attach(pipe, control):
            tiny_pipelines.render(pipe, call)
