"""Weights that are elsewhere or otherwise: LoRA, quantised, cast, offloaded."""

from __future__ import annotations

from typing import Any

import accelerate
import gguf
import peft
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from guided_by_hand import by_hand, control
from tiny_oracle import close

from attn_control import attach
from attn_control.processors import NAG, SoftPAG

FAMILIES = ("sd15", "sd3", "flux")
ADAPTER = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)


def _make(family: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(7)  # of the adapters' weights
    return tiny.MODELS[family](), tiny.family_inputs(family)


@torch.no_grad()
def _agrees(family: str, model: Any, call: dict[str, Any], twin: Any = None) -> torch.Tensor:
    """The attached model against the formula on a twin that was never attached."""
    got = model(**call)[0]
    close(got, by_hand(family, model if twin is None else twin, call), 2e-5)
    return got


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_added_scaled_fused_and_taken_off_during_a_session(family):
    model, call = _make(family)
    twin, _ = _make(family)
    seen = []
    with attach(model, control(family)):
        seen.append(_agrees(family, model, call, twin))
        for each in (model, twin):
            torch.manual_seed(7)
            each.add_adapter(ADAPTER, "style")
        seen.append(_agrees(family, model, call, twin))
        for each in (model, twin):
            each.set_adapters("style", 0.3)
        seen.append(_agrees(family, model, call, twin))
        for each in (model, twin):
            each.fuse_lora()
        close(_agrees(family, model, call, twin), seen[-1], 2e-5)
        for each in (model, twin):
            each.unfuse_lora()
            each.delete_adapters("style")
        close(_agrees(family, model, call, twin), seen[0], 2e-5)
    assert (seen[1] - seen[0]).abs().max() > 1e-2 and (seen[2] - seen[1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_before_a_session(family):
    model, call = _make(family)
    model.add_adapter(ADAPTER, "style")
    expected = by_hand(family, model, call)
    with attach(model, control(family)):
        close(model(**call)[0], expected, 2e-5)
    model.unload_lora()
    with attach(model, control(family)):
        _agrees(family, model, call, _make(family)[0])


def test_the_scale_of_a_lora_reaches_the_extra_forward_too():
    model, call = _make("sd3")
    model.add_adapter(ADAPTER, "style")
    call["joint_attention_kwargs"] = {"scale": 0.3}
    expected = by_hand("sd3", model, {**call, "joint_attention_kwargs": {"scale": 0.3}})
    with torch.no_grad(), attach(model, control("sd3")):
        close(model(**call)[0], expected, 2e-5)


def test_a_pipelines_lora_weights_loaded_during_a_session():
    donor, _ = _make("flux")
    donor.add_adapter(ADAPTER, "style")
    state = {
        f"transformer.{name}": value.clone()
        for name, value in peft.get_peft_model_state_dict(donor, adapter_name="style").items()
    }
    pipe, call = tiny_pipelines.flux()
    guide = SoftPAG("L1H1", u=0.6, scale=2.0)
    with attach(pipe, guide, NAG(scale=2.0)):
        plain = tiny_pipelines.render(pipe, call)
        pipe.load_lora_weights(dict(state), adapter_name="style")
        styled = tiny_pipelines.render(pipe, call)
        pipe.unload_lora_weights()
        assert torch.equal(tiny_pipelines.render(pipe, call), plain)
    pipe, call = tiny_pipelines.flux()
    pipe.load_lora_weights(dict(state), adapter_name="style")
    with attach(pipe, guide, NAG(scale=2.0)):
        close(tiny_pipelines.render(pipe, call), styled)
    assert (styled - plain).abs().max() > 1e-2


def _quantised(model: Any) -> Any:
    """Every linear weight of whole 32s as GGUF Q8_0."""
    kind = gguf.GGMLQuantizationType.Q8_0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not torch.nn.Linear or child.in_features % 32:
                continue
            bytes_ = gguf.quants.quantize(child.weight.detach().numpy(), kind)
            linear = GGUFLinear(
                child.in_features, child.out_features, child.bias is not None, torch.float32
            )
            linear.weight = GGUFParameter(torch.from_numpy(bytes_), quant_type=kind)
            linear.bias = child.bias
            setattr(module, name, linear)
    return model.requires_grad_(False)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_gguf_weights(family):
    model, call = _make(family)
    with torch.no_grad():
        plain = model(**call)[0]
        model = _quantised(model)
        assert sum(isinstance(m, GGUFLinear) for m in model.modules()) > 10
        assert (model(**call)[0] - plain).abs().max() > 1e-4
    expected = by_hand(family, model, call)
    with attach(model, control(family)):
        _agrees(family, model, call, _quantised(_make(family)[0]))
        close(model(**call)[0].detach(), expected, 2e-5)


def _sequential(model: Any) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def _whole(model: Any) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))


def _groups(kind: str, **options: Any):
    cpu = torch.device("cpu")

    def apply(model: Any) -> None:
        apply_group_offloading(
            model, onload_device=cpu, offload_device=cpu, offload_type=kind, **options
        )

    return apply


def _cast(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


ELSEWHERE = {
    "sequential offload": _sequential,
    "model offload": _whole,
    "group offload by leaves": _groups("leaf_level"),
    "group offload by blocks": _groups("block_level", num_blocks_per_group=1),
    "layerwise casting": _cast,
}


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("where", ELSEWHERE)
@torch.no_grad()
def test_weights_elsewhere(where, when, family):
    model, call = _make(family)
    twin, _ = _make(family)
    ELSEWHERE[where](twin)
    if when == "before":
        ELSEWHERE[where](model)
    with attach(model, control(family)):
        if when == "during":
            model(**call)
            ELSEWHERE[where](model)
        got = model(**call)[0]
        assert torch.equal(model(**call)[0], got)
    plain = _make(family)[0]
    if where == "layerwise casting":
        plain = plain.bfloat16().float()
        close(got, by_hand(family, plain, call), 0.1)  # some layers keep their precision
        close(twin(**call)[0], model(**call)[0], 0.0)
    else:
        close(got, by_hand(family, plain, call), 2e-5)
