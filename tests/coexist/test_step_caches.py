"""diffusers' step caches: what is computed is controlled, what a cache answers is marked."""

from __future__ import annotations

import diffusers
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_pyramid_attention_broadcast,
)
from tiny_oracle import attention, close, toward_identity

from attn_control import AttnControlError, attach
from attn_control.processors import NAG, HeadGate, SkipLayers, SoftPAG

STEPS = 6
GUIDE = SoftPAG("L1H1", u=0.6, scale=2.0)


def _pipe(family: str, steps: int = STEPS):
    pipe, call = tiny_pipelines.PIPELINES[family]()
    return pipe, {**call, "num_inference_steps": steps}


def _broadcast(every: int = 2) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks", "blocks"),
        current_timestep_callback=lambda: 500,
    )


def _steps(report, number: int = 0) -> tuple[list[int], list[int]]:
    """Of its only run: where a control acted, and where a cache answered."""
    record = report.controls[number]
    return sum(record.steps.values(), []), sum(record.skipped.values(), [])


CACHES = {
    "first block": FirstBlockCacheConfig(threshold=0.0),
    "attention broadcast": _broadcast(every=1),
    "Taylor": TaylorSeerCacheConfig(cache_interval=1, disable_cache_before_step=99),
    "magnitude": MagCacheConfig(threshold=0.0, mag_ratios=[0.5] * STEPS, num_inference_steps=STEPS),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_that_never_answers_changes_nothing(cache):
    pipe, call = _pipe("flux")
    with attach(pipe, HeadGate("L0H1"), GUIDE):
        expected = tiny_pipelines.render(pipe, call)
        pipe.transformer.enable_cache(CACHES[cache])
        close(tiny_pipelines.render(pipe, call), expected)


def test_first_block_cache_marks_the_steps_it_answers():
    pipe, call = _pipe("flux")
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=1e9))
    with attach(pipe, HeadGate("L0-1H1")) as session:
        tiny_pipelines.render(pipe, call)
        first = session.report()
        tiny_pipelines.render(pipe, call)
    assert _steps(first) == ([*range(STEPS)], [*range(1, STEPS)])  # L0 always runs
    record = session.report().controls[0]
    assert [site["calls"] for site in record.sites.values()] == [2 * STEPS, 2]
    assert record.when() == "0-5 (1-5 cached); 0-5 (1-5 cached)"
    assert "(1-5 cached)" in str(session.report())


def test_a_control_that_comes_due_at_a_cached_step_is_no_error_and_no_silence():
    pipe, call = _pipe("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with pytest.warns(UserWarning, match="a step cache answered in its place at every due step"):
        with attach(pipe, HeadGate("L1", window="0.5-1")) as session:
            tiny_pipelines.render(pipe, call)
    record = session.report().controls[0]
    assert not record.fired and list(record.skipped.values()) == [[3, 4, 5]]
    strict = attach(pipe, HeadGate("L1", window="0.5-1"), strict=True)
    with pytest.raises(AttnControlError, match="a step cache answered"), strict:
        tiny_pipelines.render(pipe, call)


def test_attention_broadcast_reports_what_it_answered():
    pipe, call = _pipe("flux")
    apply_pyramid_attention_broadcast(pipe.transformer, _broadcast())
    with attach(pipe, HeadGate("L1H1"), GUIDE) as session:
        tiny_pipelines.render(pipe, call)
    for number in range(2):
        assert _steps(session.report(), number) == ([0, 2, 4], [1, 3, 5])


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_attention_broadcast_of_guidance_equals_two_models_apart(family):
    """Ours against an explicit second model with a broadcast, and a processor, of its own."""
    pipe, call = _pipe(family)
    twin = tiny.MODELS[family]()
    for model in (pipe.transformer, twin):
        apply_pyramid_attention_broadcast(model, _broadcast())
    with attach(pipe, GUIDE):
        got = tiny_pipelines.render(pipe, call)
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).reset_stateful_hooks()
    forward = pipe.transformer.forward

    def guided(*args, **kwargs):
        rows = kwargs["hidden_states"].shape[0] // 2 if family == "sd3" else 0
        output = forward(*args, **kwargs)
        alone = {
            name: value[rows:]
            if torch.is_tensor(value) and value.ndim and value.shape[0] == 2 * rows
            else value
            for name, value in kwargs.items()
        }
        perturbed = twin(**alone)[0]
        return (output[0] + 2.0 * (output[0][rows:] - perturbed), *output[1:])

    pipe.transformer.forward = guided
    with attention(twin, {"transformer_blocks.1.attn": toward_identity((1,), 0.6)}):
        close(got, tiny_pipelines.render(pipe, call))


def test_attention_broadcast_forgets_between_runs():
    pipe, call = _pipe("flux")
    apply_pyramid_attention_broadcast(pipe.transformer, _broadcast(every=9))
    hook = pipe.transformer.transformer_blocks[1].attn._diffusers_hook
    hooks = [vars(h).copy() for h in hook.hooks.values()]
    with attach(pipe, GUIDE) as session:
        one = tiny_pipelines.render(pipe, call)
        other = tiny_pipelines.render(pipe, call, seed=1)
        assert torch.equal(tiny_pipelines.render(pipe, call), one)
        assert not torch.equal(one, other)
    assert list(session.report().controls[0].steps.values()) == [[0]] * 3
    assert [vars(h).keys() for h in hook.hooks.values()] == [before.keys() for before in hooks]


@pytest.mark.parametrize("cache", ["first block", "attention broadcast"])
def test_rows_that_come_and_go_have_a_cache_of_their_own(cache):
    """NAG appends a row in its window: neither reads what was kept for fewer rows."""
    pipe, call = _pipe("flux")
    config = FirstBlockCacheConfig(1e9) if cache == "first block" else _broadcast(every=9)
    pipe.transformer.enable_cache(config)
    with attach(pipe, NAG(scale=3.0, window="0.5-1")) as session:
        tiny_pipelines.render(pipe, call)
    acted, _ = _steps(session.report())
    assert acted[0] == 3  # computed at its first step, whatever was kept before


def test_faster_cache_skips_the_negative_rows_of_ours_never():
    pipe, call = _pipe("sd3")
    config = diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 0),  # no attention is skipped,
        unconditional_batch_skip_range=99,  # but all negative rows after the first step
        unconditional_batch_timestep_skip_range=(-1, 1001),
        _unconditional_conditional_input_kwargs_identifiers=(  # it does not know SD3's
            "hidden_states",
            "encoder_hidden_states",
            "timestep",
            "pooled_projections",
        ),
        tensor_format="BCHW",
        current_timestep_callback=lambda: 500,
    )
    with attach(pipe, SoftPAG("L1H1", scale=1e-9)):
        plain = tiny_pipelines.render(pipe, call)
    apply_faster_cache(pipe.transformer, config)
    pipe.transformer._diffusers_hook.reset_stateful_hooks()
    cached = tiny_pipelines.render(pipe, call)
    assert (cached - plain).abs().max() > 1e-3
    pipe.transformer._diffusers_hook.reset_stateful_hooks()
    with attach(pipe, SoftPAG("L1H1", scale=1e-9)) as session:
        close(tiny_pipelines.render(pipe, call), cached, 1e-4)
    assert session.report().guided["calls"] == STEPS


@pytest.mark.parametrize(
    "control, sentence",
    [
        (SoftPAG("L1H1", scale=2.0, batched=True), "FasterCache takes the batch"),
        (NAG(scale=3.0), "FasterCache leaves the unconditional ones out"),
        (SoftPAG("L1H1", fused=True), "FasterCache leaves the unconditional ones out"),
    ],
)
def test_rows_that_faster_cache_leaves_out_are_not_controlled(control, sentence):
    pipe, call = _pipe("sd3")
    apply_faster_cache(
        pipe.transformer,
        diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ),
    )
    with pytest.raises(AttnControlError, match=sentence), attach(pipe, control):
        tiny_pipelines.render(pipe, call)


@pytest.mark.parametrize("first", ["cache", "attach"])
def test_whole_blocks_are_not_skipped_beside_a_cache_of_blocks(first):
    pipe, call = _pipe("flux")
    config, control = FirstBlockCacheConfig(threshold=0.1), SkipLayers("L1")
    if first == "cache":
        pipe.transformer.enable_cache(config)
        with pytest.raises(AttnControlError, match="cannot be skipped while the step cache"):
            with attach(pipe, control):
                tiny_pipelines.render(pipe, call)
    else:
        with attach(pipe, control), pytest.raises(ValueError):
            pipe.transformer.enable_cache(config)  # diffusers looks blocks up by class


def test_attention_is_skipped_beside_a_cache_of_blocks():
    pipe, call = _pipe("flux")
    control = SkipLayers("L1", what="attention", scale=2.0)
    with attach(pipe, control):
        expected = tiny_pipelines.render(pipe, call)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        close(tiny_pipelines.render(pipe, call), expected)


@torch.no_grad()
def test_an_attention_that_is_never_called_and_no_cache_is_an_error():
    model, call = tiny.flux(), tiny.inputs("flux")
    block = model.transformer_blocks[1]
    block.forward = lambda hidden_states, encoder_hidden_states, **rest: (
        encoder_hidden_states,
        hidden_states,
    )
    with pytest.raises(AttnControlError, match="L1.joint .* the model never called it"):
        with attach(model, HeadGate("L0-1")):
            model(**call)
