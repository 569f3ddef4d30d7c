"""NAG against the paper by hand: a processor for cross-attention, a doubled batch for joint."""

from __future__ import annotations

import pytest
import tiny
import tiny_pipelines
import torch
from guides_shared import run
from tiny_oracle import attention, close, forwards, toward_identity

from attn_control import AttnControlError, attach
from attn_control.processors import NAG, SoftPAG


def extrapolate(good, bad, scale=5.0, tau=2.5, alpha=0.25, order=1):
    """Element by element from the paper (arXiv 2505.21179), float64."""
    good, bad = good.double(), bad.double()
    far = scale * good - (scale - 1) * bad
    if order == 1:
        size, own = far.abs().sum(-1, keepdim=True), good.abs().sum(-1, keepdim=True)
    else:
        size, own = (
            far.square().sum(-1, keepdim=True).sqrt(),
            good.square().sum(-1, keepdim=True).sqrt(),
        )
    over = size / own
    far = torch.where(over > tau, far / over * tau, far)
    return alpha * far + (1 - alpha) * good


class ByHand:
    """A UNet cross-attention processor with NAG inside: one batch, two texts."""

    def __init__(self, negative, **numbers):
        self.negative, self.numbers = negative, numbers

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs
    ):
        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).double()

        q = heads(attn.to_q(hidden_states))
        outs = []
        for text in (encoder_hidden_states, self.negative):
            k, v = heads(attn.to_k(text)), heads(attn.to_v(text))
            a = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
            outs.append(a @ v)
        z = extrapolate(*outs, **self.numbers)
        return attn.to_out[0](z.transpose(1, 2).flatten(2).to(hidden_states.dtype))


def _negative(call, seed=9):
    text = call["encoder_hidden_states"]
    return torch.randn(text.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"scale": 2.0},
        {"tau": 1.1},
        {"alpha": 1.0},
        {"order": 2, "tau": 1.2},
        {"tau": 100.0, "alpha": 0.7},
    ],
)
def test_cross_attention_equals_the_paper(numbers):
    model, call = tiny.unet(), tiny.inputs("unet")
    negative = _negative(call)
    with attach(model, NAG(negative=negative, **numbers)):
        got = run(model, call)
    processors = dict(model.attn_processors)
    by_hand = {n: ByHand(negative, **numbers) if "attn2" in n else p for n, p in processors.items()}
    model.set_attn_processor(by_hand)
    close(got, run(model, call))


def _doubled(model, call, negative, image, numbers, before=None):
    """Rows [positive, negative]; at each softmax the picture is extrapolated, in both halves."""
    rows = call["encoder_hidden_states"].shape[0]
    twice = {
        n: torch.cat([v, v]) if v.shape[0] == rows and "ids" not in n else v
        for n, v in call.items()
    }
    twice["encoder_hidden_states"] = torch.cat([call["encoder_hidden_states"], negative])

    def change(a, v, first=lambda a, v: a @ v):
        out = first(a, v)
        z = extrapolate(out[:rows, :, image], out[rows:, :, image], **numbers)
        out[:, :, image] = torch.cat([z, z])
        return out

    names = [n for n, m in model.named_modules() if callable(getattr(m, "processor", None))]
    changes = dict.fromkeys(names, change)
    for name, first in (before or {}).items():
        changes[name] = lambda a, v, first=first: change(a, v, first)
    with attention(model, changes):
        return run(model, twice)[:rows]


@pytest.mark.parametrize("family, image", [("sd3", slice(0, 16)), ("flux", slice(5, 21))])
@pytest.mark.parametrize("numbers", [{}, {"scale": 3.0, "alpha": 0.5, "tau": 1.3}])
def test_joint_attention_equals_a_doubled_batch(family, image, numbers):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    negative = _negative(call)
    with attach(model, NAG(negative=negative, **numbers)) as session, forwards(model) as seen:
        got = run(model, call)
    close(got, _doubled(model, call, negative, image, numbers))
    assert len(seen) == 1 and session.report().controls[0].fired
    assert got.shape == run(model, call).shape


def test_only_cond_rows_are_steered_in_a_pipeline():
    """SD3 with batched CFG: the cond rows come from NAG, the uncond rows do not."""
    pipe, call = tiny_pipelines.sd3()
    negative = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(9))
    with attach(pipe, NAG(negative=negative, scale=3.0)):
        got = tiny_pipelines.render(pipe, call)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(4)
    for t in pipe.scheduler.timesteps:
        both = {}
        for name in ("", "negative_"):
            both[name] = {
                "hidden_states": x,
                "timestep": t.expand(1),
                "encoder_hidden_states": call[f"{name}prompt_embeds"],
                "pooled_projections": call[f"{name}pooled_prompt_embeds"],
            }
        with attach(pipe.transformer, NAG(negative=negative, scale=3.0)):
            good = run(pipe.transformer, both[""])
        bad = run(pipe.transformer, both["negative_"])
        x = pipe.scheduler.step(bad + 4.0 * (good - bad), t, x, return_dict=False)[0]
    close(got, x)


def test_split_guidance_leaves_the_uncond_call_alone():
    pipe, call = tiny_pipelines.flux(true_cfg=True)
    with attach(pipe, NAG(scale=3.0)) as session, forwards(pipe.transformer) as seen:
        tiny_pipelines.render(pipe, call)
    assert seen == [2, 1] * 4
    assert session.report().controls[0].fired


def test_the_perturbed_pass_of_soft_pag_runs_nag_too():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    negative = _negative(call)
    cond = _doubled(model, call, negative, slice(0, 16), {})
    perturbed = _doubled(
        model,
        call,
        negative,
        slice(0, 16),
        {},
        {"transformer_blocks.1.attn": toward_identity([1], 1.0)},
    )
    with attach(model, SoftPAG("L1H1", scale=2.0), NAG(negative=negative)):
        close(run(model, call), cond + 2.0 * (cond - perturbed))


@pytest.mark.parametrize("options", [{"scale": 1.0}, {"alpha": 0.0}])
def test_idle(options):
    model, call = tiny.sd3(), tiny.inputs("sd3")
    plain = run(model, call)
    with attach(model, NAG(**options)), forwards(model) as seen:
        assert torch.equal(run(model, call), plain)
    assert seen == [2]


BAD = [
    (lambda: NAG(scale=0.5), "scale"),
    (lambda: NAG(tau=-1.0), "tau"),
    (lambda: NAG(alpha=1.5), "alpha"),
    (lambda: NAG(order=3), "order"),
    (lambda: NAG(negative=torch.zeros(3)), "rows, tokens, width"),
    (lambda: NAG("L0.self"), "expected|cannot act"),
]


@pytest.mark.parametrize("make, words", BAD)
def test_bad_values(make, words):
    with pytest.raises(AttnControlError, match=words):
        attach(tiny.unet(), make())


def test_text_of_another_length_is_refused():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    with pytest.raises(AttnControlError, match=r"\(1, 7, 32\).*\(2, 5, 32\)"):
        with attach(model, NAG(negative=torch.zeros(1, 7, 32))):
            run(model, call)
