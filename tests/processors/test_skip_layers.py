"""Skipped layers against blocks replaced by hand."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import tiny
import torch
from guides_shared import combine, run
from tiny_oracle import close

from attn_control import AttnControlError, attach
from attn_control.processors import SkipLayers, SoftPAG

BLOCKS = {
    "sd15": ("L1", "down_blocks.1.attentions.0.transformer_blocks.0", ("hidden_states",), ("ff",)),
    "sdxl": ("L2", "down_blocks.1.attentions.0.transformer_blocks.1", ("hidden_states",), ("ff",)),
    "sd3": (
        "L1",
        "transformer_blocks.1",
        ("encoder_hidden_states", "hidden_states"),
        ("ff", "ff_context"),
    ),
    "sd35": (
        "L0",
        "transformer_blocks.0",
        ("encoder_hidden_states", "hidden_states"),
        ("ff", "ff_context"),
    ),
    "flux": (
        "L1",
        "transformer_blocks.1",
        ("encoder_hidden_states", "hidden_states"),
        ("ff", "ff_context"),
    ),
    "flux single": (
        "L2",
        "single_transformer_blocks.0",
        ("encoder_hidden_states", "hidden_states"),
        ("act_mlp",),
    ),
    "wan": ("L1", "blocks.1", ("hidden_states",), ("ffn",)),
}


@contextlib.contextmanager
def _replaced(module, change):
    """Module.forward replaced on the instance: another mechanism than the package's."""
    original = module.forward
    module.forward = lambda *args, **kwargs: change(original, args, kwargs)
    try:
        yield
    finally:
        del module.forward


def _by_hand(model, family, what, u):
    label, path, returns, ffs = BLOCKS[family]
    block = model.get_submodule(path)
    names = list(inspect.signature(type(block).forward).parameters)[1:]

    def skip_block(original, args, kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        x = [given[name] for name in returns]
        y = original(*args, **kwargs)
        y = y if isinstance(y, tuple) else (y,)
        mixed = tuple(None if b is None else (1 - u) * b + u * a for a, b in zip(x, y, strict=True))
        return mixed if len(mixed) > 1 else mixed[0]

    def scaled(original, args, kwargs):
        y = original(*args, **kwargs)
        return tuple((1 - u) * v for v in y) if isinstance(y, tuple) else (1 - u) * y

    stack = contextlib.ExitStack()
    if what == "block":
        stack.enter_context(_replaced(block, skip_block))
    elif what == "attention":
        name = "attn1" if hasattr(block, "attn1") else "attn"
        stack.enter_context(_replaced(getattr(block, name), scaled))
    else:
        for name in ffs:
            stack.enter_context(_replaced(getattr(block, name), scaled))
    return stack


@pytest.mark.parametrize("u", [1.0, 0.4])
@pytest.mark.parametrize("what", ["block", "attention", "feed_forward"])
@pytest.mark.parametrize("family", BLOCKS)
def test_equals_a_block_replaced_by_hand(family, what, u):
    name = family.split()[0]
    model, call = tiny.MODELS[name](), tiny.family_inputs(name)
    cond = run(model, call)
    with _by_hand(model, family, what, u):
        perturbed = run(model, call)
    control = SkipLayers(BLOCKS[family][0], u=u, scale=1.7, what=what)
    with attach(model, control) as session:
        close(run(model, call), combine(cond, perturbed, 1.7))
    assert session.report().controls[0].fired
    assert torch.equal(run(model, call), cond)
    assert not any("_attn_control" in key for m in model.modules() for key in m.__dict__)
    assert all("_attn_control_class" not in type(m).__dict__ for m in model.modules())


def test_a_skipped_block_is_not_computed():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    seen = []
    model.transformer_blocks[1].ff.register_forward_hook(lambda *a: seen.append(1))
    with attach(model, SkipLayers("L1")):
        run(model, call)
    assert len(seen) == 1  # by the plain forward only


def test_skips_and_heads_guide_together():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    cond = run(model, call)
    found = []
    for controls in ((SkipLayers("L1", scale=1.0),), (SoftPAG("L0H1", scale=2.0),)):
        with attach(model, *controls):
            found.append(run(model, call) - cond)
    with attach(model, SkipLayers("L1", scale=1.0), SoftPAG("L0H1", scale=2.0)):
        close(run(model, call), cond + found[0] + found[1])


def test_compiled_whole():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    with attach(model, SkipLayers("L1", u=0.5)):
        want = run(model, call)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with attach(compiled, SkipLayers("L1", u=0.5)):
        close(run(compiled, call), want)


def test_heads_are_refused():
    with pytest.raises(AttnControlError, match="'L1H2' names heads"):
        SkipLayers("L0, L1H2")
