"""Skipped layers, dropout, numbers (B8-B11): diffusers' guiders swap text and picture, or crash."""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import subprocess
import sys

import pytest
import tiny
import torch
from diffusers.guiders import AutoGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig, _common
from tiny_guiders import (
    CFG,
    SCALE,
    NeitherNor,
    crashing,
    guided_by,
    judge,
    pushed_by,
    pushed_by_guider,
    pushed_by_hand,
    same,
    upstream,
)

from attn_control import attach
from attn_control.processors import SkipLayers

MODELS = {
    "sd3": lambda: (tiny.sd3(layers=4), tiny.inputs("sd3")),
    "flux": lambda: (tiny.flux(double=4), tiny.inputs("flux")),
}
SHAPES = {"sd3": "shape", "flux": "size of tensor"}  # in the message of torch's error


@contextlib.contextmanager
def without(model, numbers, swapped=False):
    """Blocks that hand on what they were given; their own order is (text, picture)."""

    def forward(hidden_states, encoder_hidden_states, **_):
        handed = encoder_hidden_states, hidden_states
        return handed[::-1] if swapped else handed

    for number in numbers:
        model.transformer_blocks[number].forward = forward
    yield
    for number in numbers:
        del model.transformer_blocks[number].forward


def slg(numbers):
    return SkipLayerGuidance(
        guidance_scale=CFG, skip_layer_guidance_scale=SCALE, skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=LayerSkipConfig(numbers, fqn="transformer_blocks"),
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("numbers", [[1], [0, 2]])
def test_b8_blocks_of_two_streams(name, numbers):
    model, call = MODELS[name]()
    control = SkipLayers(", ".join(f"L{n}" for n in numbers), scale=SCALE)
    same(pushed_by(control, model, call), model, call, lambda: without(model, numbers))


@upstream("B8", "the SLG guider swaps text and picture at a block that is left out", RuntimeError)
@pytest.mark.parametrize("name", MODELS)
def test_b8_the_guider_with_one_block(name):
    model, call = MODELS[name]()
    got = crashing(lambda: pushed_by_guider(slg([1]), model, call), SHAPES[name])
    same(got, model, call, lambda: without(model, [1]))


@upstream("B8", "the SLG guider swaps text and picture between two blocks that are left out")
@pytest.mark.parametrize("name", MODELS)
def test_b8_the_guider_with_two_blocks(name):
    model, call = MODELS[name]()
    got = pushed_by_guider(slg([0, 2]), model, call)
    right = pushed_by_hand(model, call, without(model, [0, 2]))
    judge(got, right, wrong=pushed_by_hand(model, call, without(model, [0, 2], swapped=True)))


def test_b9_layers_by_their_number():
    model, call = MODELS["sd3"]()
    got = pushed_by(SkipLayers("L1", scale=SCALE), model, call)
    same(got, model, call, lambda: without(model, [1]))


@upstream("B9", "guiders pass the number of a layer on where a list is read", TypeError)
@pytest.mark.parametrize("name", ["slg", "auto"])
def test_b9_the_guiders(name):
    model, call = MODELS["sd3"]()
    if name == "slg":
        guider = SkipLayerGuidance(
            skip_layer_guidance_layers=[1], skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
        )  # fmt: skip
    else:
        guider = AutoGuidance(auto_guidance_layers=[1], dropout=1.0)
    crashing(lambda: guided_by(guider, model, call), "int")


@upstream("B10", "AutoGuidance drops out of a tuple on blocks of two streams", TypeError)
def test_b10_the_guider():
    """Ours has no dropout: nothing here to compare."""
    model, call = MODELS["sd3"]()
    config = LayerSkipConfig([1], fqn="transformer_blocks", dropout=0.5)
    guider = AutoGuidance(auto_guidance_config=config)
    assert crashing(lambda: guided_by(guider, model, call), "dropout").isfinite().all()


def test_b11_blocks_of_two_stacks_are_numbered_in_the_order_in_which_they_run():
    model = tiny.flux(double=2, single=2)
    with attach(model) as session:
        found = {f"L{site.layer}": site.name.rpartition(".")[0] for site in session.sites}
    ran = []
    for name, module in model.named_modules():
        if name in found.values():
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        model(**tiny.inputs("flux"))
    assert [found[f"L{n}"] for n in range(4)] == ran


@upstream("B11", "fqn='auto' takes the first of a set of names, whose order is of the process")
def test_b11_the_stack_that_auto_finds():
    """The names as diffusers makes them, in processes of their own."""
    source = ast.parse(inspect.getsource(_common))
    names = [
        ast.unparse(node)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("_IDENTIFIERS")
    ]
    stacks = "{'transformer_blocks', 'single_transformer_blocks'}"
    names.append(f"print(next(n for n in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS if n in {stacks}))")
    found = set()
    for seed in range(12):
        environment = os.environ | {"PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-S", "-c", "\n".join(names)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.add(run.stdout.strip())
    if not found <= {"transformer_blocks", "single_transformer_blocks"}:
        raise NeitherNor(str(found))
    assert len(found) == 1
