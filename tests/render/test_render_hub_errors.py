"""A hub model that cannot be had: one sentence with a way out, for each way the hub says no."""

from __future__ import annotations

import socket
import types

import diffusers
import pytest
from huggingface_hub import errors as hub
from render.fakes import JOB

from attn_control.errors import AttnControlError
from attn_control.render.command import render

NAME = "black-forest-labs/FLUX.1-dev"


def response(status):
    return types.SimpleNamespace(
        status_code=status, headers={}, request=types.SimpleNamespace(url="https://x"), text=""
    )


def http(kind, status):
    return kind(f"{status} Client Error\nRequest ID: 1", response=response(status))


def wrapped(cause):
    """As diffusers does it: the hub's error behind a plain OSError."""
    try:
        raise OSError(f"Cannot load model {NAME}: root cause in the stacktrace above.") from cause
    except OSError as error:
        return error


class ConnectError(Exception):
    """The name of httpx's class; the hub's client changes its HTTP library now and then."""


@pytest.mark.parametrize(
    "error,words",
    [
        (
            http(hub.GatedRepoError, 403),
            ["gated", "licence", f"huggingface.co/{NAME}", "hf auth login"],
        ),
        (wrapped(http(hub.GatedRepoError, 401)), ["gated", "hf auth login"]),
        (
            wrapped(http(hub.RepositoryNotFoundError, 404)),
            ["does not exist", "private", "spelling"],
        ),
        (wrapped(http(hub.HfHubHTTPError, 401)), ["does not exist", "hf auth login"]),
        (wrapped(http(hub.HfHubHTTPError, 403)), ["gated"]),
        (wrapped(http(hub.HfHubHTTPError, 503)), ["answered 503", "later"]),
        (wrapped(http(hub.RevisionNotFoundError, 404)), ["no revision 'v9'", "tree/main"]),
        (wrapped(hub.OfflineModeIsEnabled("offline")), ["HF_HUB_OFFLINE"]),
        (wrapped(ConnectError("no route")), ["cannot be reached", "connection"]),
        (wrapped(socket.gaierror(-3, "name resolution")), ["cannot be reached"]),
        (hub.LocalEntryNotFoundError("not cached"), ["cannot be reached"]),
        (hub.HFValidationError("bad id"), ["not a valid hub id"]),
        (OSError("no file named diffusion.safetensors found"), ["no safetensors weights"]),
        (ValueError("something new\nwith a second line"), ["cannot be loaded (something new)"]),
    ],
)
def test_each_refusal_is_one_sentence_with_a_way_out(world, tmp_path, monkeypatch, error, words):
    def fail(*_, **options):
        assert options["use_safetensors"] is True, "never pickle"
        raise error

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", fail)
    text = JOB.replace("shapes-sd3", f"{{name: {NAME}, revision: v9}}")
    with pytest.raises(AttnControlError) as caught:
        render(world.job(text), tmp_path / "out")
    message = str(caught.value)
    assert NAME in message and "\n" not in message
    for word in words:
        assert word in message, message
    if "revision" not in message and "valid hub id" not in message:
        assert "--model shapes-sd3" in message
    assert not (tmp_path / "out").exists()


def test_the_real_client_offline_gives_the_same_sentence(world, tmp_path):
    """tests/conftest.py sets HF_HUB_OFFLINE, so nothing is asked of the network."""
    text = JOB.replace("shapes-sd3", "attn-control/there-is-no-such-model")
    with pytest.raises(AttnControlError, match="attn-control/there-is-no-such-model.*--model"):
        render(world.job(text), tmp_path / "out")


def test_an_error_chain_that_bites_its_tail_ends():
    from attn_control.render.hub_errors import error_chain

    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert error_chain(first) == [first, second]
