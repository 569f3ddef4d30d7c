"""Guidance in pipelines from text alone: contexts, further layouts, norms, two pictures at once."""

from __future__ import annotations

import pytest
import tiny_editing
import torch
from tiny_by_hand import denoisers, explicit, recorded
from tiny_further import FURTHER
from tiny_oracle import attention, close, toward_identity

from attn_control import attach
from attn_control.processors import SoftPAG

SITES = {
    "qwen": "transformer_blocks.1.attn",
    "chroma": "transformer_blocks.1.attn",
    "ltx": "transformer_blocks.1.attn1",
    "cogview4": "transformer_blocks.1.attn1",
    "hunyuanvideo": "transformer_blocks.1.attn",
    "lumina2": "layers.1.attn",
}
RENORMING = {"lumina2": {"cfg_normalization": False}}  # where it can be switched off
CONTROL = SoftPAG("L1H1", u=0.6, scale=1.5)


def changes(name):
    return {SITES[name]: toward_identity((1,), 0.6)}


@pytest.mark.parametrize("name", sorted({*FURTHER} - {"qwen"}))
def test_every_prediction_is_guided_as_by_hand(name):
    pipe, call, layout = FURTHER[name]()
    call |= RENORMING.get(name, {})
    plain, _ = recorded(pipe, call)
    with attach(pipe, CONTROL) as session:
        got, predictions = recorded(pipe, call)
    sign = -1.0 if name == "lumina2" else 1.0
    _, wanted = explicit(pipe, call, layout, changes(name), 1.5, sign=sign)
    assert len(predictions) == len(wanted) == 3
    for ours, theirs in zip(predictions, wanted, strict=True):
        close(ours, theirs)
    assert (got - plain).abs().max() > 1e-3
    assert session.report().guided["calls"] == 3
    with attach(pipe, SoftPAG("L1H1", u=0.0)):
        assert torch.equal(recorded(pipe, call)[0], plain)
    assert torch.equal(recorded(pipe, call)[0], plain)


class Added:
    """The difference added by hand to what each of the two calls of a step returns."""

    def __init__(self, model, changes, scale):
        self.model, self.changes, self.scale = model, changes, scale
        self.calls, self.busy = 0, False

    def __call__(self, model, args, kwargs, output):
        if self.busy:
            return None
        if self.calls % 2 == 0:
            self.busy = True
            with attention(model, self.changes):
                self.delta = self.scale * (output[0] - model(*args, **kwargs)[0])
            self.busy = False
        self.calls += 1
        return (output[0] + self.delta,)


@pytest.mark.parametrize("name", ["qwen", "lumina2"])
def test_a_norm_that_the_pipeline_restores_is_that_of_the_guided_prediction(name):
    """And the report says so: such a combination is not affine."""
    pipe, call, _ = FURTHER[name]()
    with attach(pipe, CONTROL) as session:
        got, predictions = recorded(pipe, call)
    (note,) = session.report().notes
    assert f"{type(pipe).__name__}, unless told otherwise, brings" in note
    by_hand = Added(pipe.transformer, changes(name), 1.5)
    hook = pipe.transformer.register_forward_hook(by_hand, with_kwargs=True)
    want, wanted = recorded(pipe, call)
    hook.remove()
    assert by_hand.calls == 6
    for ours, theirs in zip(predictions, wanted, strict=True):
        close(ours, theirs)
    close(got, want)


TWO = {
    "sd15_inpaint_nine": ("L2H1-2", {"mid_block.attentions.0.transformer_blocks.0.attn1": (1, 2)}),
    "sdxl_inpaint": ("L3H1", {"mid_block.attentions.0.transformer_blocks.0.attn1": (1,)}),
    "flux_kontext_true_cfg": ("L0H0", {"transformer_blocks.0.attn": (0,)}),
    "flux_controlnet": ("L0H0", {"transformer_blocks.0.attn": (0,)}),
}


@pytest.mark.parametrize("name", TWO)
def test_two_pictures_of_a_prompt_are_each_guided_by_their_own_difference(name):
    pipe, call, layout = tiny_editing.EDITING[name]()
    call |= {"num_images_per_prompt": 2}
    selector, heads = TWO[name]
    with attach(pipe, SoftPAG(selector, u=0.6, scale=2.0)):
        got, predictions = recorded(pipe, call)
    assert got.shape[0] == 2 and not torch.equal(got[0], got[1])
    explicitly = {site: toward_identity(which, 0.6) for site, which in heads.items()}
    _, wanted = explicit(pipe, call, layout, explicitly, 2.0)
    for ours, theirs in zip(predictions, wanted, strict=True):
        close(ours, theirs)
    assert len(denoisers(pipe)) == 1
