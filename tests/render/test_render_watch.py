"""Watching a run step by step: what is told, that it may stop there, and that all is undone."""

from __future__ import annotations

import copy
import inspect

import pytest
import tiny_pipelines
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_control.errors import AttnControlError
from attn_control.render.watch import watched
from attn_control.render.yamlfile import JobError, dump_yaml, parse_yaml

PIPES = {"sd3": tiny_pipelines.sd3, "sd15": tiny_pipelines.sd15, "wan": tiny_pipelines.wan}


@pytest.mark.parametrize("name", PIPES)
def test_each_step_is_told_and_no_bit_changes(name):
    pipe, call = PIPES[name]()
    plain = tiny_pipelines.render(pipe, call)
    told = []
    with watched(pipe, lambda: told.append(1)):
        assert torch.equal(tiny_pipelines.render(pipe, call), plain)
    assert len(told) == call["num_inference_steps"]
    assert "step" not in vars(pipe.scheduler)


def test_what_is_raised_ends_the_run_and_the_scheduler_is_its_old_self():
    pipe, call = tiny_pipelines.sd3()
    told = []

    def stop():
        told.append(1)
        if len(told) == 2:
            raise KeyboardInterrupt

    parameters = inspect.signature(pipe.scheduler.step)
    with pytest.raises(KeyboardInterrupt), watched(pipe, stop):
        assert inspect.signature(pipe.scheduler.step) == parameters
        copy.deepcopy(pipe.scheduler)
        pipe(**{**call, "num_inference_steps": 5}, output_type="latent")
    assert len(told) == 2 and "step" not in vars(pipe.scheduler)


DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text()
    | st.floats(allow_nan=False) | st.sampled_from(["1e3", "off", "010", "0-0.5", ".5", "~", "<<"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(data=DATA, one_line=st.booleans())
def test_what_is_dumped_reads_back_the_same(data, one_line):
    assert parse_yaml(dump_yaml({"data": data}, one_line=one_line), "x").data == {"data": data}


def test_a_number_of_thousands_of_digits_is_an_error_with_its_place():
    with pytest.raises(AttnControlError, match=r"job:2:8: .*5000 digits"):
        parse_yaml("a: 1\nseeds: " + "9" * 5000, "job")


def test_errors_of_a_job_know_their_key():
    error = parse_yaml("a: {b: 1}", "job").error(("a", "b"), "is wrong")
    assert isinstance(error, JobError) and str(error) == "job:1:5: a.b: is wrong"
    assert (error.path, error.problem) == (("a", "b"), "is wrong")
