"""Ulysses and ring context parallelism on two processes: what one process predicts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import two_processes
from diffusers import TensorParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from tiny_oracle import close

from attn_control import AttnControlError, attach
from attn_control.parallel import Shards
from attn_control.processors import SoftPAG

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """Every case's prediction in each of two processes."""
    folder = tmp_path_factory.mktemp("spread")
    paths = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    script = str(HERE.parent / "two_processes.py")
    runs = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(folder / "store"), str(folder / f"{rank}.pt")],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [run.communicate(timeout=240)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", two_processes.CASES)
def test_two_processes_predict_what_one_does(spread, name):
    kind, _, controls = two_processes.CASES[name]
    model, call = two_processes.make(kind)
    expected = two_processes.predict(model, call, controls)
    for results in spread:
        close(results[name], expected)
    if controls:
        assert (expected - two_processes.predict(model, call, ())).abs().max() > 1e-3


def test_gradients_of_two_processes_add_up_to_those_of_one(spread):
    expected = two_processes.gradient(*two_processes.make("flux"))
    close(spread[0]["gradient"] + spread[1]["gradient"], expected)


def test_tensor_parallelism_is_refused():
    model = tiny.flux()
    model._parallel_config = ParallelConfig(tensor_parallel_config=TensorParallelConfig())
    with pytest.raises(AttnControlError, match="tensor parallelism spreads the heads"):
        attach(model, SoftPAG("L1"))


@pytest.mark.parametrize("streams", [(6, 8), (5, 9), (1, 7, 2), (3,)])
def test_shares_of_streams_put_together_again(streams, monkeypatch):
    whole = torch.arange(sum(streams))[None]
    starts = [sum(streams[:n]) for n in range(len(streams))]
    pieces = [whole[:, a : a + n].tensor_split(2, 1) for a, n in zip(starts, streams, strict=True)]
    local = [torch.cat([piece[rank] for piece in pieces], 1) for rank in range(2)]
    longest = max(x.shape[1] for x in local)
    padded = [torch.nn.functional.pad(x, (0, longest - x.shape[1])) for x in local]
    monkeypatch.setattr(
        "attn_control.parallel._all_gather", lambda x, dim, group: torch.cat(padded, 1)
    )
    for rank in range(2):
        shards = Shards(streams, rank, 2, None)
        assert torch.equal(shards.gather(local[rank], 1), whole)
        assert torch.equal(shards.own(whole, 1), local[rank])
