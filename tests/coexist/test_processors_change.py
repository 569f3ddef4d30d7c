"""Backends, fused projections and adapters, before and during a session; copies of a session."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import tiny_pipelines
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from guided_by_hand import SCALE, SITES, U, by_hand, control
from tiny_oracle import attention, close, toward_identity

from attn_control import attach
from attn_control.processors import HeadGate, SoftPAG

BACKENDS = ("native", "_native_math", "_native_flash")
WHEN = ("before", "during")


@pytest.fixture(autouse=True)
def own_backend():
    """``set_attention_backend`` sets the process's backend too, and nothing takes that back."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def _make(family: str) -> tuple[Any, dict[str, Any]]:
    return tiny.MODELS[family](), tiny.family_inputs(family)


@pytest.mark.parametrize("family", ["flux", "wan"])
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_set_attention_backend(backend, when, family):
    model, call = _make(family)
    expected = by_hand(family, model, call)
    ran: list[str] = []
    name = AttentionBackendName(backend)
    function = _AttentionBackendRegistry._backends[name]
    _AttentionBackendRegistry._backends[name] = lambda *a, **k: (
        ran.append(backend) or function(*a, **k)
    )
    try:
        if when == "before":
            model.set_attention_backend(backend)
        with attach(model, control(family)):
            if when == "during":
                close(model(**call)[0], expected)
                model.set_attention_backend(backend)
            del ran[:]
            close(model(**call)[0], expected)
            assert len(ran) == 2 * sum(
                callable(getattr(m, "processor", 0)) for m in model.modules()
            )
            model.reset_attention_backend()
            with attention_backend("_native_math"):
                close(model(**call)[0], expected)
    finally:
        _AttentionBackendRegistry._backends[name] = function


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "wan"])
@torch.no_grad()
def test_fused_projections_before_a_session(family):
    model, call = _make(family)
    model.fuse_qkv_projections()
    expected = by_hand(family, model, call)
    with attach(model, control(family)) as session:
        close(model(**call)[0], expected)
    assert not session.report().notes


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "wan"])
@torch.no_grad()
def test_fused_and_unfused_during_a_session(family):
    model, call = _make(family)
    twin, _ = _make(family)  # fused as well: diffusers' fused SD3 leaves out the norms of q and k
    before = {name: (id(p), type(p)) for name, p in model.attn_processors.items()}
    with attach(model, control(family)) as session:
        close(model(**call)[0], by_hand(family, twin, call))
        for each in (model, twin):
            each.fuse_qkv_projections()
        close(model(**call)[0], by_hand(family, twin, call))
        replaced = family in ("sd15", "sd3")  # others keep their processors
        assert bool(session.report().notes) == replaced
        assert not replaced or "replaced by Fused" in session.report().notes[0]
        for each in (model, twin):
            if hasattr(each, "unfuse_qkv_projections"):
                each.unfuse_qkv_projections()
        close(model(**call)[0], by_hand(family, twin, call))
    assert {name: (id(p), type(p)) for name, p in model.attn_processors.items()} == before


def _adapter(model: Any, family: str) -> dict[str, dict[str, torch.Tensor]]:
    """An IP-Adapter's weights: 8 image features to 4 tokens, and keys and values for each site."""
    g = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> torch.Tensor:
        return 0.5 * torch.randn(*shape, generator=g)

    weights: dict[str, torch.Tensor] = {}
    if family == "flux":
        sites = [b.attn for b in model.transformer_blocks]
        places = {n: (site.inner_dim, 32) for n, site in enumerate(sites)}
    else:
        names = list(model.attn_processors)
        cross = [n for n in names if n.endswith("attn2.processor")]
        places = {
            2 * n + 1: (model.get_submodule(name.removesuffix(".processor")).inner_dim, 32)
            for n, name in enumerate(cross)
        }
    for number, (width, text) in places.items():
        for what in ("k", "v"):
            weights[f"{number}.to_{what}_ip.weight"] = rand(width, text)
            if family == "flux":
                weights[f"{number}.to_{what}_ip.bias"] = rand(width)
    proj = {"proj.weight": rand(4 * 32, 8), "proj.bias": rand(4 * 32)}
    return {
        "image_proj": {**proj, "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)},
        "ip_adapter": weights,
    }


def _with_image(call: dict[str, Any], family: str) -> dict[str, Any]:
    image = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(4))
    if family == "flux":
        return {**call, "joint_attention_kwargs": {"ip_adapter_image_embeds": [image]}}
    return {**call, "added_cond_kwargs": {"image_embeds": [image]}}


@pytest.mark.parametrize("family", ["sd15", "flux"])
@pytest.mark.parametrize("when", WHEN)
@torch.no_grad()
def test_image_prompt_adapters(when, family):
    model, call = _make(family)
    twin, _ = _make(family)
    twin._load_ip_adapter_weights([_adapter(twin, family)])
    expected = _by_hand_again(family, twin, call)
    if when == "before":
        model._load_ip_adapter_weights([_adapter(model, family)])
    with attach(model, control(family)) as session:
        if when == "during":
            plain = model(**call)[0]
            model._load_ip_adapter_weights([_adapter(model, family)])
            assert (expected - plain).abs().max() > 1e-3
        close(model(**_with_image(call, family))[0], expected)
        notes = session.report().notes
    assert bool(notes) == (when == "during")
    assert not notes or any("IPAdapter" in note and "healed" in note for note in notes)
    classes = [type(p) for p in model.attn_processors.values()]
    assert classes == [type(p) for p in twin.attn_processors.values()]


def _by_hand_again(family: str, model: Any, call: dict[str, Any]) -> torch.Tensor:
    """``by_hand``, with a fresh call each time: Flux pops from its nested dict."""

    def forward(**kwargs: Any) -> Any:
        return model(**_with_image(call, family))

    change = toward_identity((1,), U)

    def first_only(a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # the second asks the image
        return change(a, v) if a.shape[-2] == a.shape[-1] else a @ v

    plain = forward()[0]
    with attention(model, {SITES[family][0]: first_only}):
        return plain + SCALE * (plain - forward()[0])


@torch.no_grad()
def test_an_adapter_loaded_last_leaves_no_class_of_ours_behind():
    model, call = _make("sd15")
    with attach(model, HeadGate("L2.selfH1")):
        model(**call)
        model._load_ip_adapter_weights([_adapter(model, "sd15")])
    twin, _ = _make("sd15")
    twin._load_ip_adapter_weights([_adapter(twin, "sd15")])
    classes = [type(p) for p in model.attn_processors.values()]
    assert classes == [type(p) for p in twin.attn_processors.values()]


def test_a_pipelines_ip_adapter_loaded_and_unloaded_during_a_session():
    pipe, call = tiny_pipelines.sd15()
    pipe.register_modules(image_encoder=None)
    guide = SoftPAG("L2.selfH1", u=0.6, scale=2.0)
    with attach(pipe, guide) as session:
        plain = tiny_pipelines.render(pipe, call)
        pipe.unet._load_ip_adapter_weights([_adapter(pipe.unet, "sd15")])
        image = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(4))
        prompted = tiny_pipelines.render(pipe, {**call, "ip_adapter_image_embeds": [image]})
        pipe.unload_ip_adapter()
        assert torch.equal(tiny_pipelines.render(pipe, call), plain)
    assert (prompted - plain).abs().max() > 1e-3
    record = session.report().controls[0]
    assert list(record.steps.values()) == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_a_deep_copy_of_an_attached_pipeline_is_detached(family):
    pipe, call = tiny_pipelines.PIPELINES[family]()
    plain = tiny_pipelines.render(pipe, call)
    with attach(pipe, SoftPAG("L1", scale=2.0)) as session:
        guided = tiny_pipelines.render(pipe, call)
        twin = copy.deepcopy(pipe)
        twin.set_progress_bar_config(disable=True)
        assert torch.equal(tiny_pipelines.render(twin, call), plain)
        assert torch.equal(tiny_pipelines.render(pipe, call), guided)
        with attach(twin, SoftPAG("L1", scale=2.0)):
            assert torch.equal(tiny_pipelines.render(twin, call), guided)
    assert session.report().guided["calls"] == 8
    assert torch.equal(tiny_pipelines.render(twin, call), plain)


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
@torch.no_grad()
def test_an_attention_that_others_put_into_torch(family, monkeypatch):
    """As SageAttention's page tells its users to."""
    model, call = _make(family)
    original, ran = torch.nn.functional.scaled_dot_product_attention, []

    def theirs(*args: Any, **kwargs: Any) -> torch.Tensor:
        ran.append(1)
        return original(*args, **kwargs)

    expected = by_hand(family, model, call)
    with attach(model, control(family)):
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", theirs)
        close(model(**call)[0], expected)
    assert len(ran) == 2 * sum(callable(getattr(m, "processor", 0)) for m in model.modules())
