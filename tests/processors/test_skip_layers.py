"""Skipped layers against blocks replaced by hand."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import tiny
import tiny_pipelines
import torch
from guides_shared import combine, run
from tiny_oracle import close, forwards

from attn_control import AttnControlError, attach
from attn_control.bypass import BypassPlan
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


def _drawn(seed: int, step: int, layers: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return sorted(torch.randperm(layers, generator=generator)[:count].tolist())


def _draws(seed: int, count: int, steps: int = 4) -> list[list[int]]:
    """The layers that acted at each step of a run, by the session's own counters."""
    pipe, call = tiny_pipelines.sd3()
    found = []
    with attach(pipe, SkipLayers("all", stochastic=count, seed=seed)) as session:

        def note(pipe, step, t, kwargs):
            sites = session.report().controls[0].sites.values()
            found.append({site["label"][1]: site["calls"] for site in sites})
            return kwargs

        call |= {"num_inference_steps": steps, "callback_on_step_end": note}
        with forwards(pipe.transformer) as rows:
            tiny_pipelines.render(pipe, call)
    assert rows == [2, 1] * steps
    before = [dict.fromkeys(found[0], 0), *found]
    return [
        [int(n) for n in now if now[n] > was[n]] for was, now in zip(before, found, strict=False)
    ]


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (5, 1), (5, 2)])
def test_a_stochastic_set_is_drawn_by_seed_and_step(seed, count):
    assert _draws(seed, count) == [_drawn(seed, step, 3, count) for step in range(4)]


def test_draws_differ_by_step_and_seed():
    by_step = {tuple(_drawn(0, step, 3, 1)) for step in range(8)}
    assert len(by_step) > 1
    assert _draws(0, 1, 6) != _draws(1, 1, 6)


def test_each_step_is_guided_by_its_own_layer():
    """The whole run, by a window for each step and the layer that was drawn there."""
    pipe, call = tiny_pipelines.sd3()
    drawn = [_drawn(2, step, 3, 1)[0] for step in range(4)]
    assert len(set(drawn)) > 1
    windows = [
        SkipLayers(f"L{layer}", u=0.7, window=f"{step / 4}-{(step + 1) / 4}")
        for step, layer in enumerate(drawn)
    ]
    with attach(pipe, *windows):
        want = tiny_pipelines.render(pipe, call)
    with attach(pipe, SkipLayers("all", u=0.7, stochastic=1, seed=2), strict=True):
        close(tiny_pipelines.render(pipe, call), want)


def test_a_window_does_not_shift_the_draws():
    pipe, call = tiny_pipelines.sd3()
    with attach(pipe, SkipLayers("all", stochastic=1, seed=2, window="0.5-1")) as session:
        tiny_pipelines.render(pipe, call)
    calls = {s["label"][1]: s["calls"] for s in session.report().controls[0].sites.values()}
    late = [_drawn(2, step, 3, 1)[0] for step in (2, 3)]
    assert calls == {str(n): late.count(n) for n in range(3)}


def test_draws_add_no_graph():
    torch._dynamo.reset()
    pipe, call = tiny_pipelines.sd3(tiny.sd3(layers=2))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=count)
    with attach(pipe, SkipLayers("all", stochastic=1), strict=True):
        tiny_pipelines.render(pipe, call)
    drawn = {tuple(_drawn(0, step, 2, 1)) for step in range(4)}
    assert len(drawn) > 1 and len(graphs) == 2  # the plain forward's and the perturbed one's
    torch._dynamo.reset()


def test_two_attentions_of_one_block_are_one_block():
    model, call = tiny.sd3(dual=(0, 1)), tiny.inputs("sd3")
    with attach(model, SkipLayers("L0.joint", u=0.5)):
        want = run(model, call)
    for what in ("L0.joint, L0.self2", "L0.self2"):
        with attach(model, SkipLayers(what, u=0.5)):
            close(run(model, call), want)
    both = SkipLayers("L0.joint", u=0.5), SkipLayers("L0.self2", u=0.5, scale=1.0)
    cond = run(model, call)
    with attach(model, *both):
        close(run(model, call), cond + (want - cond) * (3.8 / 2.8))


BAD = [
    (lambda: SkipLayers("L0-2", stochastic=0), "stochastic must be a whole number from 1"),
    (lambda: SkipLayers("L0-2", stochastic=True), "stochastic must be a whole number"),
    (lambda: SkipLayers("L0-2", stochastic=0.5), "stochastic must be a whole number"),
    (lambda: SkipLayers("L0-2", stochastic=1, seed=-1), "seed must be a whole number from 0"),
    (lambda: SkipLayers("L0-2", seed=1), "seed=1 has no meaning without stochastic"),
    (
        lambda: attach(tiny.sd3(), SkipLayers("L0-1", stochastic=2)),
        "fewer than the 2 selected layers of transformer, got stochastic=2",
    ),
]


@pytest.mark.parametrize(("make", "words"), BAD)
def test_bad_draws_are_named(make, words):
    with pytest.raises(AttnControlError, match=words):
        make()


@pytest.mark.parametrize("rows", [None, (0, 1), (1, 3), (3, 4)])
def test_only_the_rows_of_a_branch_are_led_away(rows):
    y, x = torch.randn(2, 4, 5, 3).unbind()
    plan = BypassPlan("block", torch.tensor(0.4), False, torch.zeros(1), 0.4, rows)
    led, silenced = y.clone(), y.clone()
    for row in range(*(rows or (0, 4))):
        led[row], silenced[row] = 0.6 * y[row] + 0.4 * x[row], 0.6 * y[row]
    torch.testing.assert_close(plan.mix(y, x), led)
    torch.testing.assert_close(plan.mix(y, None), silenced)
