"""Sparse attention on real classes of every family: against explicit maps, masked by hand.

The window is NATTEN's, on the grid of tokens that the test itself lays out; text and what else is
no picture reads all and is read by all. No code is shared but the model.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import tiny
import torch
from sparse_shared import window_by_hand
from test_wan_keys import _CONFIG as _WAN_I2V
from test_wan_keys import _call as _call_of_a_picture
from test_wider_families import _run
from tiny_attach_only import ATTACH_ONLY, MOCHI
from tiny_more import MORE, more_inputs
from tiny_oracle import attention, close
from tiny_pictures import PICTURES
from tiny_videos import VIDEOS
from tiny_wide import rand

from attn_control import AttnControlError, attach
from attn_control.policy import StepPolicy
from attn_control.processors import (
    NeighborhoodAttention,
    RadialAttention,
    SelectedAttention,
    TileAttention,
)

BARE = {"correction": "none", "policy": StepPolicy(first=0, refresh=None)}
NEAR = NeighborhoodAttention(kernel=2, **BARE)
CUBE = (3, 2, 2)


@dataclass(frozen=True)
class Case:
    """grid: tokens as the test lays them out; before: tokens in front of them."""

    model: Any
    call: dict[str, Any]
    grid: tuple[int, int, int] = CUBE
    before: int = 0


def _video(name: str, **more: Any) -> Case:
    one = VIDEOS[name]
    return Case(one.make(), one.call() | more.pop("call", {}), **more)


def _wan_i2v() -> Any:
    torch.manual_seed(0)
    return tiny._spread(diffusers.WanTransformer3DModel(**_WAN_I2V))


def _padded() -> torch.Tensor:
    """Row 0 has three valid text tokens of five."""
    return torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


CASES = {
    "wan": lambda: Case(tiny.wan(), tiny.inputs("wan")),
    "wan, image to video": lambda: Case(_wan_i2v(), _call_of_a_picture(3, 6)),
    "vace": lambda: Case(MORE["vace"](), more_inputs("vace")),
    "skyreels": lambda: Case(MORE["skyreels"](), more_inputs("skyreels")),
    # Its first frame is a reference: 8 tokens in front of 2 frames.
    "wan_animate": lambda: _video(
        "wan_animate",
        call={
            "hidden_states": rand(2, 12, 3, 8, 4),
            "pose_hidden_states": rand(2, 4, 2, 8, 4, seed=3),
        },
        grid=(2, 4, 2),
        before=8,
    ),
    "hunyuanvideo": lambda: Case(MORE["hunyuanvideo"](), more_inputs("hunyuanvideo")),
    "hunyuanvideo, padded": lambda: Case(
        MORE["hunyuanvideo"](),
        more_inputs("hunyuanvideo") | {"encoder_attention_mask": _padded()},
    ),
    "hunyuanvideo15": lambda: _video("hunyuanvideo15"),
    "hunyuanvideo15, padded": lambda: _video(
        "hunyuanvideo15", call={"encoder_attention_mask": _padded()}
    ),
    "mochi": lambda: Case(MOCHI.make(), MOCHI.call()),
    "cogvideox": lambda: _video("cogvideox", before=5),
    "cogvideox1.5": lambda: _video(
        "cogvideox1.5",
        call={
            "hidden_states": rand(2, 6, 4, 4, 4),
            "image_rotary_emb": (torch.ones(12, 16), torch.zeros(12, 16)),
        },
        before=5,
    ),
    "ltx": lambda: Case(MORE["ltx"](), more_inputs("ltx")),
    "ltx2": lambda: _video("ltx2"),
    "motif": lambda: _video("motif"),
    "flux": lambda: Case(tiny.flux(), tiny.inputs("flux"), (1, 4, 4), 5),
    "sd3": lambda: Case(tiny.sd3(), tiny.inputs("sd3"), (1, 4, 4)),
    "pixart": lambda: Case(PICTURES["pixart"].make(), PICTURES["pixart"].call(), (1, 4, 4)),
}


def windowed(case: Case, kernel: int, heads: tuple[int, ...] | None = None) -> Any:
    """Softmax over the window alone, of some heads."""
    shape = case.grid if case.grid[0] > 1 else case.grid[1:]
    near = window_by_hand(shape, kernel)

    def change(a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        on = torch.ones(a.shape[-2:], dtype=a.dtype)
        video = slice(case.before, case.before + len(near))
        on[video, video] = near.to(a.dtype)
        masked = a * on
        masked = masked / masked.sum(-1, keepdim=True).clamp(min=1e-300)
        which = range(a.shape[1]) if heads is None else heads
        a = a.clone()
        a[:, list(which)] = masked[:, list(which)]
        return a @ v

    return change


def sites_of(model: Any) -> list[str]:
    with attach(model) as session:
        return [site.name for site in session.sites if site.slot in ("self", "joint")]


@pytest.mark.parametrize("name", CASES)
def test_a_window_is_what_it_is_by_hand(name):
    case = CASES[name]()
    plain = _run(case.model, case.call)
    names = sites_of(case.model)
    with attention(case.model, dict.fromkeys(names, windowed(case, 2))):
        expected = _run(case.model, case.call)
    assert (expected - plain).abs().max() > 1e-4
    for order in ("tiles", "raster"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*dense|attach")
            with attach(case.model, NeighborhoodAttention(kernel=2, order=order, **BARE)) as done:
                close(_run(case.model, case.call), expected)
    outcomes = done.report().controls[0].outcomes
    rows = 2 if name == "mochi" else 1
    assert outcomes == {"sparse": len(names) * rows}
    assert torch.equal(_run(case.model, case.call), plain)


@pytest.mark.parametrize("name", ["wan", "hunyuanvideo", "hunyuanvideo15", "sd3", "mochi"])
def test_under_autocast_too(name):
    """Norms may leave queries and keys in another type than values; torch's own attention casts
    them all. The map by hand sees what autocast rounds, but for the attention itself.
    """
    case = CASES[name]()
    with torch.autocast("cpu", torch.bfloat16):
        plain = _run(case.model, case.call).float()
        with attention(case.model, dict.fromkeys(sites_of(case.model), windowed(case, 2))):
            expected = _run(case.model, case.call).float()
        with attach(case.model, NEAR):
            got = _run(case.model, case.call).float()
    error, change = (got - expected).abs().mean(), (expected - plain).abs().mean()
    assert error < 0.2 * change


@pytest.mark.parametrize("name", ["wan", "cogvideox", "mochi", "flux"])
def test_some_heads_alone(name):
    """The others keep their bits: their outputs are the stock call's own."""
    case = CASES[name]()
    site = sites_of(case.model)[0]
    with attention(case.model, {site: windowed(case, 2, (1,))}):
        expected = _run(case.model, case.call)
    with attach(case.model, NeighborhoodAttention("L0H1", kernel=2, **BARE)):
        close(_run(case.model, case.call), expected)


def test_two_controls_share_a_layer_by_heads():
    case = CASES["wan"]()
    site = sites_of(case.model)[0]
    by_head = {0: windowed(case, 2, (0,)), 1: windowed(case, 3, (1,))}

    def both(a, v):
        out = by_head[0](a, v)
        out[:, 1] = by_head[1](a, v)[:, 1]
        return out

    with attention(case.model, {site: both}):
        expected = _run(case.model, case.call)
    pair = [NeighborhoodAttention(f"L0H{n}", kernel=k, **BARE) for n, k in ((0, 2), (1, 3))]
    with attach(case.model, *pair):
        close(_run(case.model, case.call), expected)
    with pytest.raises(AttnControlError, match="both decide which keys L0.selfH0 reads"):
        attach(case.model, *pair, TileAttention("L0", **BARE))


@pytest.mark.parametrize(
    "control",
    [NeighborhoodAttention(kernel=64, **BARE), TileAttention(tiles=64, **BARE),
     SelectedAttention(keep=1.0, select_at="step", **BARE),
     RadialAttention(block=64, revision="r2", **BARE)],
    ids=lambda c: type(c).__name__,
)  # fmt: skip
@pytest.mark.parametrize("name", ["wan", "hunyuanvideo, padded", "cogvideox"])
def test_a_mask_that_is_all_on_is_the_stock_model(name, control):
    case = CASES[name]()
    plain = _run(case.model, case.call)
    with attach(case.model, control) as session:
        close(_run(case.model, case.call), plain)
    assert session.report().controls[0].density == 1


def test_a_mask_that_is_not_padding_stays_dense_with_one_warning():
    """SkyReels-V2 gives its self-attention a mask of frame blocks when it is causal."""
    case = CASES["skyreels"]()
    model = case.model
    model._set_ar_attention(2)
    case.call["hidden_states"] = rand(2, 4, 4, 4, 4)
    plain = _run(model, case.call)
    with pytest.warns(UserWarning) as told:
        with attach(model, NEAR) as session:
            for _ in range(2):
                assert torch.equal(_run(model, case.call), plain)
    messages = [str(w.message) for w in told if "not padding; it stays dense" in str(w.message)]
    # The second is the session's, at its end: nothing ever acted.
    assert [m.split(":")[0] for m in messages] == [str(NEAR).split(":")[0], "attach"]
    record = session.report().controls[0]
    assert record.outcomes == {"dense": 4} and record.density == 1 and not record.fired
    assert "mask of its own" in record.reason


def test_what_has_no_grid_is_refused_with_the_reason():
    one = ATTACH_ONLY["framepack"]
    with pytest.raises(AttnControlError, match="order of its tokens is not known"):
        attach(one.make(), TileAttention(**BARE))
    case = CASES["ltx"]()
    case.call.pop("num_frames")
    with pytest.raises(AttnControlError, match="no frames, rows and columns are known"):
        with attach(case.model, TileAttention(**BARE)):
            _run(case.model, case.call)
    picture = CASES["sd3"]()
    with pytest.raises(AttnControlError, match="L0.joint sees a picture; expected a video"):
        with attach(picture.model, RadialAttention(**BARE)):
            _run(picture.model, picture.call)


def test_cross_attention_is_left_alone():
    with pytest.raises(AttnControlError, match="names cross attention, which this control cannot"):
        attach(tiny.wan(), TileAttention("L0.cross", **BARE))


def test_few_tokens_stay_dense():
    case = CASES["wan"]()
    plain = _run(case.model, case.call)
    policy = StepPolicy(first=0, refresh=None, min_tokens=13)
    with pytest.warns(UserWarning, match="12 tokens, fewer than min_tokens=13; they stay dense"):
        with attach(case.model, NeighborhoodAttention(kernel=2, correction="none", policy=policy)):
            assert torch.equal(_run(case.model, case.call), plain)


def test_gradients_go_through_it():
    """A mask that is all on has the stock model's gradients; a window has others."""
    grads = []
    for kernel in (None, 64, 2):
        case = CASES["wan"]()
        controls = [NeighborhoodAttention(kernel=kernel, **BARE)] if kernel else []
        with attach(case.model, *controls):
            case.model(**case.call, return_dict=False)[0].square().sum().backward()
        grads.append(case.model.blocks[0].attn1.to_k.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
    assert (grads[2] - grads[0]).abs().max() > 1e-3


@pytest.mark.slow
def test_a_compiled_model_draws_the_same():
    case = CASES["wan"]()
    control = NeighborhoodAttention(kernel=2, **BARE)
    with attach(case.model, control):
        expected = _run(case.model, case.call)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, backend="eager")
    with attach(compiled, control, strict=True):
        close(_run(compiled, case.call), expected)
