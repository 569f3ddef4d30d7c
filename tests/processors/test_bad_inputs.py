"""Each wrong request is one clear AttnControlError, and nothing is left patched behind it."""

from __future__ import annotations

import re

import diffusers
import pytest
import tiny
import tiny_pipelines
import torch
from tiny_oracle import fingerprint

from attn_control import AttnControlError, attach
from attn_control.processors import CONTROLS, HeadGate, SoftPAG, build_control

NAN, INF = float("nan"), float("inf")

CONTROL_ERRORS = [  # request, parts of the message
    (lambda: SoftPAG("L1", u=1.5), ("SoftPAG", "u", "1.5", "between -1 and 1")),
    (lambda: SoftPAG("L1", u=-1.1), ("SoftPAG", "u", "-1.1", "between -1 and 1")),
    (lambda: SoftPAG("L1", u=NAN), ("u=nan",)),
    (lambda: SoftPAG("L1", u=True), ("u must be a number", "True")),
    (lambda: SoftPAG("L1", u="0.5"), ("u must be a number", "'0.5'")),
    (lambda: SoftPAG("L1", u=None), ("u must be a number", "None")),
    (lambda: SoftPAG("L1", u=torch.tensor(0.5)), ("u must be a number",)),
    (lambda: SoftPAG("L1", scale=NAN), ("SoftPAG", "scale=nan", "finite")),
    (lambda: SoftPAG("L1", scale=INF), ("scale=inf", "finite")),
    (lambda: SoftPAG("L1", scale="3"), ("scale must be a number",)),
    (lambda: SoftPAG("L1", op="blur"), ("op must be one of 'identity'", "'blur'")),
    (lambda: SoftPAG("L1", tokens="imgae"), ("tokens must be one of", "'text'", "'imgae'")),
    (lambda: SoftPAG("L1", tokens=None), ("tokens must be one of", "None")),
    (lambda: SoftPAG("L1", tokens=["text"]), ("tokens must be one of",)),
    (lambda: SoftPAG("L1", window="0.8-0.2"), ("SoftPAG", "window", "0.8-0.2")),
    (lambda: SoftPAG("L1", window=0.5), ("SoftPAG", "window", "0.5", "0-0.25")),
    (lambda: SoftPAG("L1", window=[0, 1]), ("SoftPAG", "window", "[0, 1]")),
    (lambda: SoftPAG(7), ("SoftPAG", "heads", "7")),
    (lambda: SoftPAG(["L1"]), ("SoftPAG", "heads", "['L1']")),
    (lambda: SoftPAG(""), ("SoftPAG", "character 1", "the end")),
    (lambda: HeadGate("L1", gain=INF), ("HeadGate", "gain=inf")),
    (lambda: HeadGate("L1", gain=None), ("gain must be a number",)),
    (lambda: HeadGate("L1", tokens="words"), ("HeadGate", "tokens", "'words'")),
    (lambda: HeadGate("L1, X"), ("HeadGate", "character 5", "'X'")),
    (lambda: build_control("SoftPag", {"heads": "L1"}), ("SoftPag", "did you mean 'SoftPAG'")),
    (lambda: build_control("Nothing", {}), ("unknown control 'Nothing'", "HeadGate")),
    (lambda: build_control("SoftPAG", {"head": "L1"}), ("'head'", "did you mean 'heads'")),
    (lambda: build_control("SoftPAG", {}), ("'heads' is missing",)),
    (lambda: build_control("SoftPAG", ["L1"]), ("SoftPAG", "expected options")),
]


@pytest.mark.parametrize(
    ("request_", "parts"), CONTROL_ERRORS, ids=[str(n) for n in range(len(CONTROL_ERRORS))]
)
def test_a_bad_control_names_itself_the_option_and_what_was_expected(request_, parts):
    with pytest.raises(AttnControlError) as error:
        request_()
    for part in parts:
        assert part in str(error.value)


class NoDenoiser:
    scheduler = None


def _unknown_model():
    return diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(4, 4), norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip


TARGET_ERRORS = [
    (lambda: attach(None), ("pipeline", "transformer", "NoneType")),
    (lambda: attach("a pipeline"), ("pipeline", "str")),
    (lambda: attach(NoDenoiser()), ("pipeline", "NoDenoiser")),
    (lambda: attach(torch.nn.Linear(2, 2)), ("Linear", "not a model", "FLUX.1")),
    (lambda: attach(_unknown_model()), ("UNet2DModel", "cannot be controlled", "knows no text")),
    (lambda: attach(tiny.sd3(), "L1H2"), ("expected controls", "'L1H2'", "str")),
    (lambda: attach(tiny.sd3(), SoftPAG), ("expected controls", "type")),
    (lambda: attach(tiny.sd3(), [SoftPAG("L1")]), ("expected controls", "list")),
    (lambda: attach(tiny.sd3(), None), ("expected controls", "NoneType")),
    (lambda: attach(tiny.sd3(), SoftPAG("L1.cross")), ("L1.cross", "cannot act on")),
    (lambda: attach(tiny.sd3(), SoftPAG("L5H2")), ("L5H2", "L0 to L2", "4 heads")),
    (lambda: attach(tiny.sd3(), SoftPAG("L1H7")), ("head 7", "L1.joint", "0 to 3")),
    (lambda: attach(tiny.wan(), HeadGate("L0.joint")), ("L0.joint", "matches no attention")),
]


@pytest.mark.parametrize(
    ("request_", "parts"), TARGET_ERRORS, ids=[str(n) for n in range(len(TARGET_ERRORS))]
)
def test_a_bad_target_or_selection_says_what_is_there(request_, parts):
    before = fingerprint()
    with pytest.raises(AttnControlError) as error:
        request_()
    for part in parts:
        assert part in str(error.value)
    assert fingerprint() == before


def test_rows_that_are_no_pair_of_branches_are_refused():
    pipe, call = tiny_pipelines.sd3()
    before = fingerprint(pipe.transformer)
    pipe._guidance_scale = 4.0
    pipe.scheduler.set_timesteps(2)
    call = tiny.inputs("sd3", batch=3)
    call["timestep"] = pipe.scheduler.timesteps[:1].expand(3)
    with pytest.raises(AttnControlError, match="even batch, the denoiser got 3 rows"):
        with attach(pipe, SoftPAG("L1")):
            pipe.transformer(**call)
    assert fingerprint(pipe.transformer) == before


def test_a_message_is_one_line_unless_it_points():
    for request_, _ in CONTROL_ERRORS + TARGET_ERRORS:
        with pytest.raises(AttnControlError) as error:
            request_()
        message = str(error.value)
        assert message.count("\n") in (0, 2)
        assert not re.search(r" {2,}", message.split("\n")[0]), message


@pytest.mark.parametrize("name", CONTROLS)
def test_options_from_a_job_make_the_same_control(name):
    options = {"heads": "L1", "window": "0-0.5"}
    assert build_control(name, options) == CONTROLS[name](**options)


def test_controls_are_frozen_values():
    assert SoftPAG("L1", u=0.5) == SoftPAG("L1", u=0.5)
    assert len({SoftPAG("L1"), SoftPAG("L1"), HeadGate("L1")}) == 2
    with pytest.raises(AttributeError):
        SoftPAG("L1").u = 0.1  # type: ignore[misc]
