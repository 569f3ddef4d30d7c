"""Skipped layers and NAG in whole pipelines, against blocks and batches made by hand."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch
from tiny_by_hand import denoisers, recorded
from tiny_editing import EDITING
from tiny_loops import AtTheScheduler
from tiny_oracle import attention, close
from tiny_pipelines import render

from attn_control import attach
from attn_control.processors import NAG, SkipLayers

# Pipeline: selector, the block, and what it would hand on.
SKIPS = {
    "sd15_inpaint_nine": (
        "L2",
        "mid_block.attentions.0.transformer_blocks.0",
        ("hidden_states",),
    ),
    "sd3_image": ("L1", "transformer_blocks.1", ("encoder_hidden_states", "hidden_states")),
    "flux_fill": ("L2", "single_transformer_blocks.0", ("encoder_hidden_states", "hidden_states")),
    "wan_vace": ("L1", "blocks.1", ("hidden_states",)),
}


@contextlib.contextmanager
def without(block, returns):
    """The block hands on what it was given."""
    names = list(inspect.signature(type(block).forward).parameters)[1:]

    def forward(*args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        handed = tuple(given[name] for name in returns)
        return handed if len(handed) > 1 else handed[0]

    block.forward = forward
    yield
    del block.forward


@pytest.mark.parametrize("name", SKIPS)
def test_a_skipped_block_guides_as_by_hand(name):
    pipe, call, layout = EDITING[name]()
    selector, path, returns = SKIPS[name]
    plain = render(pipe, call)
    with attach(pipe, SkipLayers(selector, scale=1.5)):
        got, predictions = recorded(pipe, call)
    by_hand = AtTheScheduler(
        pipe, denoisers(pipe), lambda m: without(m.get_submodule(path), returns), 1.5, layout
    )
    with by_hand:
        render(pipe, call)
    for ours, theirs in zip(predictions, by_hand.predictions, strict=True):
        close(ours, theirs)
    assert not torch.equal(got, plain)
    assert torch.equal(render(pipe, call), plain)


def extrapolated(good, bad, scale, tau, alpha):
    """arXiv 2505.21179 in the L1 norm, float64."""
    far = scale * good - (scale - 1) * bad
    over = far.abs().sum(-1, keepdim=True) / good.abs().sum(-1, keepdim=True)
    return alpha * far * torch.where(over > tau, tau / over, 1.0) + (1 - alpha) * good


def test_nag_on_kontext_steers_the_picture_and_its_reference():
    """A distilled pipeline without a negative prompt of its own: one row more, and no more."""
    pipe, call, _ = EDITING["flux_kontext"]()
    negative = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(9))
    plain = render(pipe, call)
    with attach(pipe, NAG(negative=negative, scale=3.0, alpha=0.5)):
        got, predictions = recorded(pipe, call)
    model, forward = pipe.transformer, pipe.transformer.forward

    def change(a, v):
        out = a @ v
        out[:, :, 5:] = extrapolated(out[:1, :, 5:], out[1:, :, 5:], 3.0, 2.5, 0.5)
        return out

    def doubled(**kwargs):
        twice = {
            n: torch.cat([v, v]) if torch.is_tensor(v) and "ids" not in n else v
            for n, v in kwargs.items()
        }
        twice["encoder_hidden_states"] = torch.cat([kwargs["encoder_hidden_states"], negative])
        names = [n for n, m in model.named_modules() if hasattr(m, "processor")]
        with attention(model, dict.fromkeys(names, change)):
            return (forward(**twice)[0][:1],)

    model.forward = doubled
    want, wanted = recorded(pipe, call)
    del model.forward
    for ours, theirs in zip(predictions, wanted, strict=True):
        close(ours, theirs)
    close(got, want)
    assert not torch.equal(got, plain)
    assert torch.equal(render(pipe, call), plain)
