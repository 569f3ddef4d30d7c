"""Language models: against explicit attention maps masked by hand, and against the stock pipeline.

The oracle is an attention function of its own, registered with transformers' interface and named in
the config, which is another mechanism than the package's.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_language as tiny
import tiny_pipelines
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from attn_control import AttnControlError, attach
from attn_control.families import LANGUAGE
from attn_control.interface import Watched
from attn_control.policy import StepPolicy
from attn_control.processors import (
    NAG,
    SEG,
    SPARSE,
    HeadGate,
    SelectedAttention,
    SkipLayers,
    SoftPAG,
)

BLOCK, STEPS = 8, 3
EACH_STEP = {
    "policy": StepPolicy(first=0, refresh=None),
    "correction": "none",
    "select_at": "step",
    "score": "exact",
    "block": BLOCK,
}
REGIONS = {"prompt": 0.4, "response": 0.3}
RUN = {"llada2": tiny.run_llada2, "gemma": tiny.run_gemma}
MAKE = {"llada2": tiny.llada2, "gemma": tiny.gemma}


# ---- what is believed


def blocks(*regions: int) -> list[list[int]]:
    """Tokens of each block: every region begins a new one."""
    found, start = [], 0
    for tokens in regions:
        for first in range(start, start + tokens, BLOCK):
            found.append(list(range(first, min(first + BLOCK, start + tokens))))
        start += tokens
    return found


def selected(a: Tensor, regions: dict[str, list[int]], own: int, keep: Any) -> Tensor:
    """bool, as ``a`` (rows, heads, queries, keys): what is read, block after block.

    regions: region -> lengths of its runs of keys; own: the key that is query 0's token.
    """
    on = torch.zeros(a.shape, dtype=torch.bool)
    asking = [b for b in blocks(*sum(regions.values(), [])) if own <= b[0] < own + a.shape[2]]
    for row, head in ((r, h) for r in range(a.shape[0]) for h in range(a.shape[1])):
        for queries in asking:
            rows, start = [token - own for token in queries], 0
            for region, lengths in regions.items():
                keys = [[t + start for t in block] for block in blocks(*lengths)]
                start += sum(lengths)
                mass = [float(a[row, head][rows][:, block].sum()) for block in keys]
                count = math.ceil(keep.get(region, 1.0) * len(keys) - 1e-9)
                best = sorted(range(len(keys)), key=lambda n: -mass[n])[:count]
                for n in best:
                    if mass[n] > 0:
                        on[row, head, rows[0] : rows[-1] + 1, keys[n][0] : keys[n][-1] + 1] = True
            on[row, head, rows[0] : rows[-1] + 1, queries[0] : queries[-1] + 1] = True
    return on


class Oracle:
    """An attention function that selects by hand. ``regions(module, q, k)`` says how the keys are
    cut, and which of them is query 0's; None leaves a call as it is.
    """

    def __init__(self, regions: Callable[..., Any], keep: Any) -> None:
        self.regions, self.keep = regions, keep

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        cut = self.regions(module, q.shape[2], k.shape[2])
        if cut is None:
            return sdpa_attention_forward(module, q, k, v, mask, **kwargs)
        each = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
        scores = q @ k.mT * kwargs["scaling"]
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        a = scores.softmax(-1).nan_to_num(0.0)
        on = selected(a, *cut, self.keep)
        a = a * on
        a = a / a.sum(-1, keepdim=True).clamp(min=1e-300)
        return (a @ v).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def named(pipe: Any, name: str, function: Any) -> Iterator[None]:
    """The model runs its attention through ``function``."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    before = pipe.model.config._attn_implementation
    pipe.model.config._attn_implementation = name
    try:
        yield
    finally:
        pipe.model.config._attn_implementation = before
        del AttentionInterface._global_mapping[name]
        del AttentionMaskInterface._global_mapping[name]


def logits(run: Callable[[], Any], pipe: Any) -> list[Tensor]:
    """Of every denoiser call of a run."""
    found: list[Tensor] = []
    hook = pipe.model.register_forward_hook(lambda m, a, out: found.append(out.logits.clone()))
    try:
        run()
    finally:
        hook.remove()
    return found


def llada2_cut(prompt: int) -> Callable[..., Any]:
    def cut(module: Any, queries: int, keys: int) -> Any:
        return {"prompt": [prompt], "response": [keys - prompt]}, 0

    return cut


def gemma_cut(prompt: int, window: int, pad: Callable[[int], int] = lambda w: 0) -> Any:
    """Counts the calls of each layer: a canvas has ``STEPS`` of them."""
    calls: dict[Any, int] = {}

    def cut(module: Any, queries: int, keys: int) -> Any:
        if module.is_causal:
            return None  # the encoder
        number = calls[module] = calls.get(module, -1) + 1
        written = prompt + 16 * (number // STEPS)
        cached = min(written, window - 1) if module.is_sliding else written
        assert keys == cached + 16
        asked = max(0, cached - (written - prompt))
        return {"prompt": [asked], "response": [cached - asked, 16]}, cached

    return cut


# ---- exactness


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llada2": (lambda: tiny.llada2(), lambda: llada2_cut(20), {}),
    "llada2, causal": (lambda: tiny.llada2("causal"), lambda: llada2_cut(20), {}),
    "llada2, block-causal": (lambda: tiny.llada2("blocks"), lambda: llada2_cut(20), {}),
    "llada2, eager": (lambda: tiny.llada2(attention="eager"), lambda: llada2_cut(20), {}),
    "llada2, a tail": (lambda: tiny.llada2(), lambda: llada2_cut(20), {"gen_length": 17}),
    "gemma": (lambda: tiny.gemma(), lambda: gemma_cut(20, 14), {}),
    "gemma, wide": (lambda: tiny.gemma(window=30), lambda: gemma_cut(20, 30), {}),
    "gemma, padded": (
        lambda: tiny.gemma(),
        lambda: gemma_cut(20, 14),
        {"prompt": [tiny.PROMPT, "a short one"]},
    ),
}


@pytest.mark.parametrize(
    ("case", "keep"),
    [
        *((case, REGIONS) for case in CASES),
        *((case, keep) for case in ("llada2", "gemma") for keep in (0.3, {"prompt": 0.3})),
    ],
    ids=str,
)
def test_selected_attention_is_what_the_map_masked_by_hand_gives(case, keep):
    make, cut, given = CASES[case]
    pipe, run = make(), RUN[case.split(",")[0]]
    wanted = keep if isinstance(keep, dict) else {"prompt": keep, "response": keep}
    reference = make()
    with named(reference, "by_hand", Oracle(cut(), wanted)):
        hand = logits(lambda: run(reference, STEPS, **given), reference)
    stock = logits(lambda: run(pipe, STEPS, **given), pipe)
    with attach(pipe, SelectedAttention(keep=keep, **EACH_STEP), strict=True):
        ours = logits(lambda: run(pipe, STEPS, **given), pipe)
    assert len(ours) == len(hand)
    for mine, theirs in zip(ours, hand, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(ours, stock, strict=False))


def test_a_cache_of_a_fixed_size_changes_nothing():
    """Behind the canvas it has room that nobody reads."""
    control = SelectedAttention(keep=REGIONS, **EACH_STEP)
    found = []
    for kind in (None, "static"):
        pipe = tiny.gemma(window=60)
        with attach(pipe, control, strict=True):
            given = {"cache_implementation": kind}
            found.append(logits(lambda p=pipe, g=given: tiny.run_gemma(p, STEPS, **g), pipe))
    for dynamic, static in zip(*found, strict=True):
        torch.testing.assert_close(static, dynamic, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads", ["L0H1", "L0H2-3", "L0H0, L0H3"])
@pytest.mark.parametrize("kind", MAKE)
def test_other_heads_keep_their_bits(kind, heads):
    """Two heads share one key head, in whole groups or not."""
    pipe, seen = MAKE[kind](), []
    control = SelectedAttention(heads, keep=0.2, **EACH_STEP)
    with attach(pipe, control, strict=True) as session:
        module = session.sites[0].module
        end = module.dense if kind == "llada2" else module.o_proj
        with pytest.MonkeyPatch.context() as patch:
            inputs: list[Any] = []
            patch.setattr(
                Watched, "__call__", _spied(Watched.__call__, module, inputs), raising=True
            )
            hook = end.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
            RUN[kind](pipe, STEPS)
            hook.remove()
    chosen = next(iter(control.select(session.sites).values()))
    others = [head for head in range(4) if head not in chosen]
    assert len(seen) == len(inputs) >= STEPS
    changed = 0
    for out, (args, kwargs) in zip(seen, inputs, strict=True):
        stock = sdpa_attention_forward(module, *args, **kwargs)[0]
        out = out.unflatten(-1, (4, 8))
        torch.testing.assert_close(out[:, :, others], stock[:, :, others], rtol=0, atol=1e-15)
        changed += not torch.allclose(out[:, :, chosen], stock[:, :, chosen], atol=1e-4)
    assert changed


def _spied(call: Any, module: Any, inputs: list[Any]) -> Any:
    def spy(self: Any, which: Any, *args: Any, **kwargs: Any) -> Any:
        if which is module:
            inputs.append((args, kwargs))
        return call(self, which, *args, **kwargs)

    return spy


# ---- steps


class Counted:
    """The stock function, by its name; its outputs by module."""

    __name__ = "sdpa_attention_forward"

    def __init__(self) -> None:
        self.outputs: dict[Any, list[Tensor]] = {}

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        out = sdpa_attention_forward(module, *args, **kwargs)
        self.outputs.setdefault(module, []).append(out[0].clone())
        return out


@pytest.mark.parametrize("correction", ["none", "share", "residual", "rho", "lse"])
@pytest.mark.parametrize("kind", MAKE)
def test_dense_and_refresh_steps_are_the_stock_function_and_sparse_ones_never_call_it(
    kind, correction
):
    pipe, stock, seen = MAKE[kind](), Counted(), []
    policy = StepPolicy(first=1, last=1, refresh=2)
    control = SelectedAttention(
        keep=REGIONS, block=BLOCK, policy=policy, correction=correction, score="exact"
    )
    plain = logits(lambda: RUN[kind](pipe, 6), pipe)
    with named(pipe, "counted", stock), attach(pipe, control, strict=True) as session:
        module = session.sites[0].module
        end = module.dense if kind == "llada2" else module.o_proj
        hook = end.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
        ours = logits(lambda: RUN[kind](pipe, 6), pipe)
        hook.remove()
        rows = [r for e in session._entries[0] for r in e.ledger.rows]
    rows = [r for r in rows if r.layer.endswith("L0.self")]
    assert {r.outcome for r in rows} >= {"dense", "refresh"}
    assert [r.outcome for r in rows if r.run == rows[-1].run] == [
        "dense", "refresh", "shared" if correction == "share" else "sparse",
        "refresh", "shared" if correction == "share" else "sparse", "dense",
    ]  # fmt: skip
    kept = iter(stock.outputs[module])
    assert len(rows) == len(seen) == len(ours)
    for row, out in zip(rows, seen, strict=True):
        if row.outcome in ("dense", "refresh"):
            assert torch.equal(next(kept).flatten(2), out)
    assert next(kept, None) is None
    for n in range(2):  # nothing has been sparse before
        assert torch.equal(ours[n], plain[n])
    sparse = next(n for n, row in enumerate(rows) if row.outcome in ("sparse", "shared"))
    assert not torch.equal(ours[sparse], plain[sparse])


@pytest.mark.parametrize("kind", MAKE)
def test_each_block_is_a_run_whose_first_due_step_is_a_refresh(kind):
    pipe = MAKE[kind]()
    control = SelectedAttention(keep=0.5, policy=StepPolicy(first=2, refresh=None), block=BLOCK)
    with attach(pipe, control) as session:
        RUN[kind](pipe, 6)
        rows = [r for e in session._entries[0] for r in e.ledger.rows]
    runs: dict[int, list[tuple[int, str]]] = {}
    for row in rows:
        if row.layer.endswith("L0.self"):
            runs.setdefault(row.run, []).append((row.index, row.outcome))
    whole = [(0, "dense"), (1, "dense"), (2, "refresh"), *((n, "sparse") for n in (3, 4, 5))]
    found = list(runs.values())
    # LLaDA 2's first block holds 4 words of the prompt: 4 steps write the rest.
    assert len(found) == (3 if kind == "llada2" else 2)
    assert found[-1] == whole and all(run == whole[: len(run)] for run in found)


def test_corrector_sweeps_are_at_the_level_of_their_step():
    pipe = tiny.gemma()
    pipe.scheduler = diffusers.DiscreteDDIMScheduler(corrector_steps=1)
    policy = StepPolicy(first=1, refresh=2)
    with attach(pipe, SelectedAttention(keep=0.5, policy=policy, block=BLOCK)) as session:
        tiny.run_gemma(pipe, 7, gen_length=16)
        rows = [r for e in session._entries[0] for r in e.ledger.rows]
    found = [(r.index, r.outcome) for r in rows if r.layer.endswith("L0.self")]
    # Seven calls: three of the four steps have two.
    steps = [(0, "dense"), (1, "refresh"), (2, "sparse"), (3, "refresh")]
    assert found == [each for step in steps for each in [step] * (1 if step[0] == 3 else 2)]


def test_edits_of_a_finished_block_stay_at_one_step():
    """Two steps write the four words of the only block, the rest are edits."""
    pipe = tiny.llada2()
    control = SelectedAttention(keep=0.5, policy=StepPolicy(first=0), block=BLOCK)
    given = {"editing_threshold": 1e-9, "max_post_steps": 3}
    ids = tiny.Processor().apply_chat_template([{"content": tiny.PROMPT}])["input_ids"]
    with attach(pipe, control, strict=True) as session:
        pipe(
            input_ids=ids, gen_length=4, block_length=8, num_inference_steps=4, threshold=0.999,
            sampling_method="greedy", eos_early_stop=False, output_type="seq", **given,
        )  # fmt: skip
        rows = [r for e in session._entries[0] for r in e.ledger.rows]
    indices = [r.index for r in rows if r.layer.endswith("L0.self")]
    assert len(indices) >= 4 and indices == [0, 1, *[2] * (len(indices) - 2)]


@pytest.mark.parametrize("kind", MAKE)
def test_a_second_call_gives_the_bits_of_the_first(kind):
    pipe = MAKE[kind]()
    control = SelectedAttention(keep=REGIONS, block=BLOCK, policy=StepPolicy(first=1, refresh=3))
    with attach(pipe, control):
        first = logits(lambda: RUN[kind](pipe, 5), pipe)
        second = logits(lambda: RUN[kind](pipe, 5), pipe)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_longer_prompt_is_told_from_a_longer_response_of_the_same_length():
    """The shapes of a call agree, the regions do not."""
    pipe, other = tiny.llada2(), tiny.llada2()
    control = SelectedAttention(keep={"prompt": 1, "response": 1}, **EACH_STEP)
    ids = tiny.Processor().apply_chat_template([{"content": tiny.PROMPT}])["input_ids"]
    short, longer = {"input_ids": ids[:, :10]}, {"input_ids": ids[:, :12]}
    with attach(pipe, control):
        tiny.run_llada2(pipe, STEPS, gen_length=6, **short)
        after = logits(lambda: tiny.run_llada2(pipe, STEPS, gen_length=4, **longer), pipe)
    with attach(other, control):
        alone = logits(lambda: tiny.run_llada2(other, STEPS, gen_length=4, **longer), other)
    assert all(torch.equal(a, b) for a, b in zip(after, alone, strict=True))


@pytest.mark.parametrize("family", LANGUAGE, ids=lambda family: family.name)
def test_the_pipelines_still_have_the_variables_that_tell_where_they_are(family):
    pipeline = {
        "LLaDA 2": diffusers.LLaDA2Pipeline,
        "DiffusionGemma": diffusers.DiffusionGemmaPipeline,
    }[family.name]
    names = inspect.unwrap(pipeline.__call__).__code__.co_varnames
    assert {family.loop.step, family.loop.block, family.loop.prompt} <= set(names)


@pytest.mark.parametrize("kind", MAKE)
def test_the_code_of_the_page_runs(kind, capsys):
    page = (Path(__file__).parents[2] / "docs" / "language.md").read_text(encoding="utf-8")
    pipe = MAKE[kind]()
    call = {"gen_length": 16, "num_inference_steps": 8}
    call |= {"threshold": 0.999} if kind == "llada2" else {"confidence_threshold": None}
    names = {"pipe": pipe, "prompt": tiny.PROMPT, "call": call}
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(block, "docs/language.md", "exec"), names)
    told = capsys.readouterr().out
    assert "amortised density" in told and "of dense;" in told
    assert len(names["text"]) == 1


# ---- budgets


def test_density_is_what_the_budgets_come_to():
    """A canvas of 2 blocks reads itself and some of 16 tokens of prompt and 16 written before."""
    pipe, prompt = tiny.gemma(window=100), tiny.PROMPT[:16]
    found = {}
    for keep in (1.0, {"prompt": 1}, {"response": 1}, {"prompt": 1, "response": 1}, {"prompt": 2}):
        control = SelectedAttention(keep=keep, **EACH_STEP)
        with attach(pipe, control, strict=True) as session:
            tiny.run_gemma(pipe, 1, prompt=prompt)
            rows = [r for e in session._entries[0] for r in e.ledger.rows]
        found[str(keep)] = [r.density for r in rows if r.layer.endswith("L2.self")]
    assert found["1.0"] == [1.0, 1.0] and found["{'prompt': 2}"] == [1.0, 1.0]
    assert found["{'prompt': 1}"] == pytest.approx([24 / 32, 40 / 48])
    # Own blocks come on top of those that score best, and may be them.
    low, high = (16 + 8) / 32, (16 + 16) / 32
    assert low <= found["{'response': 1}"][0] <= high
    both = found["{'prompt': 1, 'response': 1}"]
    assert 16 / 32 <= both[0] <= 24 / 32 and 16 / 48 <= both[1] <= 24 / 48


def test_near_blocks_are_read_in_any_case():
    pipe = tiny.gemma(window=100)
    few = SelectedAttention(keep=1, near=None, **EACH_STEP)
    more = SelectedAttention(keep=1, near=3, **EACH_STEP)
    found = []
    for control in (few, more):
        with attach(pipe, control, strict=True) as session:
            tiny.run_gemma(pipe, 1, prompt=tiny.PROMPT[:16], gen_length=16)
            found.append(session.report().to_dict()["controls"][0]["density"])
    assert found[0] < found[1] and found[1] >= 3 * BLOCK / 32


def test_preview_knows_the_length_from_the_user_or_from_the_last_run():
    pipe = tiny.gemma()
    policy = StepPolicy(first=2, refresh=None)
    control = SelectedAttention(keep=0.25, block=BLOCK, policy=policy, correction="none")
    with attach(pipe, control) as session:
        assert "not known" in str(session.preview(8))
        told = session.preview(8, text_tokens=256).sparse[0]
        assert told.outcomes == ["dense"] * 2 + ["refresh"] + ["sparse"] * 5
        assert told.amortised == pytest.approx((3 + 5 * 0.25) / 8)
        with pytest.raises(AttnControlError, match="language model.*text_tokens"):
            session.preview(8, height=64, width=64)
        tiny.run_gemma(pipe, 8)
        assert "not known" not in str(session.preview(8))


# ---- leaving no trace


def trace(pipe: Any) -> dict[str, Any]:
    """All that attach could have left behind."""
    modules = {type(module).__module__ for module in pipe.model.modules()}
    names = ("ALL_ATTENTION_FUNCTIONS", "eager_attention_forward")
    return {
        "names": {m: [id(vars(sys.modules[m]).get(name)) for name in names] for m in modules},
        "classes": [type(module) for module in pipe.model.modules()],
        "dicts": [sorted(vars(module)) for module in pipe.model.modules()],
        "config": pipe.model.config.to_dict(),
        "attention": pipe.model.config._attn_implementation,
        "interface": dict(AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MAKE)
def test_idle_is_bit_neutral_and_the_end_leaves_no_trace(kind, attention):
    pipe = MAKE[kind](attention=attention)
    before, plain = trace(pipe), logits(lambda: RUN[kind](pipe, STEPS), pipe)
    with attach(pipe):
        assert pipe.model.config._attn_implementation == attention
        idle = logits(lambda: RUN[kind](pipe, STEPS), pipe)
    with attach(pipe, SelectedAttention(keep=0.3, **EACH_STEP)):
        sparse = logits(lambda: RUN[kind](pipe, STEPS), pipe)
    with pytest.raises(RuntimeError, match="mine"), attach(pipe, HeadGate("L0")):
        RUN[kind](pipe, STEPS, callback_on_step_end=_fails)
    assert trace(pipe) == before
    after = logits(lambda: RUN[kind](pipe, STEPS), pipe)
    assert all(torch.equal(a, b) for a, b in zip(plain, idle, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, sparse, strict=False))


def _fails(*_: Any) -> Any:
    raise RuntimeError("mine")


@pytest.mark.parametrize("kind", MAKE)
def test_the_implementation_may_be_changed_while_attached(kind):
    pipe, control = MAKE[kind](), SelectedAttention(keep=REGIONS, **EACH_STEP)
    with attach(pipe, control):
        sdpa = logits(lambda: RUN[kind](pipe, STEPS), pipe)
        pipe.model.config._attn_implementation = "eager"
        eager = logits(lambda: RUN[kind](pipe, STEPS), pipe)
    assert pipe.model.config._attn_implementation == "eager"
    near = 1e-4 if kind == "gemma" else 1e-9  # whose encoder's own eager softmax is of float32
    for a, b in zip(sdpa, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=near)


def test_a_part_of_the_model_may_be_wrapped_for_the_compiler():
    """As diffusers' own page of this pipeline does; nothing is compiled here."""
    pipe, plain = tiny.gemma(), tiny.gemma()
    control = SelectedAttention(keep=REGIONS, **EACH_STEP)
    pipe.model.model.decoder = torch.compile(pipe.model.model.decoder)
    with torch.compiler.set_stance("force_eager"), attach(pipe, control, strict=True):
        wrapped = logits(lambda: tiny.run_gemma(pipe, STEPS), pipe)
    with attach(plain, control):
        bare = logits(lambda: tiny.run_gemma(plain, STEPS), plain)
    assert all(torch.equal(a, b) for a, b in zip(wrapped, bare, strict=True))


@pytest.mark.parametrize("kind", MAKE)
def test_a_copy_of_an_attached_model_is_the_plain_model(kind):
    pipe, other = MAKE[kind](), MAKE[kind]()
    plain = logits(lambda: RUN[kind](pipe, STEPS), pipe)
    before = type(pipe.model)
    with attach(pipe, SelectedAttention(keep=REGIONS, **EACH_STEP)):
        other.model = copy.deepcopy(pipe.model)
        assert type(other.model) is before is not type(pipe.model)
        copied = logits(lambda: RUN[kind](other, STEPS), other)
        RUN[kind](pipe, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(plain, copied, strict=True))


def test_two_models_of_one_class_are_told_apart():
    mine, other = tiny.llada2(), tiny.llada2()
    plain = logits(lambda: tiny.run_llada2(other, STEPS), other)
    with attach(mine, SelectedAttention(keep=0.3, **EACH_STEP)):
        again = logits(lambda: tiny.run_llada2(other, STEPS), other)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_head_gate_acts_on_text():
    pipe = tiny.llada2()
    with attach(pipe, HeadGate("L1H2", gain=0.0), strict=True):
        ours = logits(lambda: tiny.run_llada2(pipe, STEPS), pipe)
    with torch.no_grad():
        pipe.model.model.layers[1].attention.dense.weight[:, 16:24] = 0
    hand = logits(lambda: tiny.run_llada2(pipe, STEPS), pipe)
    for a, b in zip(ours, hand, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---- what is refused, and what stays dense


GRIDS = [cls for cls in SPARSE if cls is not SelectedAttention]
REFUSED = [
    *((cls(), "text in a line.*SelectedAttention") for cls in GRIDS),
    (SoftPAG("L0"), "predicts words"),
    (SEG("L0"), "predicts words"),
    (SkipLayers("L0"), "predicts words"),
    (NAG(), "made for pictures"),
]


@pytest.mark.parametrize(("control", "why"), REFUSED, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("kind", MAKE)
def test_controls_of_pictures_are_refused_when_they_are_attached(kind, control, why):
    pipe = MAKE[kind]()
    before = trace(pipe)
    with pytest.raises(AttnControlError, match=f"is a language model: .*{why}"):
        attach(pipe, control)
    assert trace(pipe) == before


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        ({"canvas": 0.5}, "'prompt', 'response'"),
        ({}, "'prompt', 'response'"),
        ({"prompt": 1.5}, r"keep\['prompt'\]"),
        ({"prompt": 0}, r"keep\['prompt'\]"),
        ({"prompt": True}, r"keep\['prompt'\]"),
    ],
)
def test_bad_budgets_are_refused(keep, why):
    with pytest.raises(AttnControlError, match=why):
        SelectedAttention(keep=keep)


def test_budgets_by_region_are_of_texts_and_of_known_prompts():
    wan, _ = tiny_pipelines.wan()
    with pytest.raises(AttnControlError, match="regions of a text, but Wan"):
        attach(wan, SelectedAttention(keep=REGIONS))
    pipe = tiny.llada2()
    ids = torch.arange(24)[None]
    call = {"attention_mask": torch.ones_like(ids), "position_ids": ids}
    with attach(pipe.model, SelectedAttention(keep=REGIONS, **EACH_STEP)):
        with pytest.raises(AttnControlError, match="where the prompt ends"):
            pipe.model(ids, **call)
    with attach(pipe.model, SelectedAttention(keep=0.3, **EACH_STEP), strict=True):
        pipe.model(ids, **call)
    with attach(pipe.model, SelectedAttention(keep=0.3)):
        with pytest.raises(AttnControlError, match="sampler is not"):
            pipe.model(ids, **call)
    with attach(pipe.model, SelectedAttention(keep=0.3, near=(3, 3), **EACH_STEP)):
        with pytest.raises(AttnControlError, match="one axis"):
            pipe.model(ids, **call)


def test_attention_that_does_not_ask_the_interface_is_refused(monkeypatch):
    pipe = tiny.llada2()
    monkeypatch.setattr(tiny.LLaDA2MoeAttention, "__module__", "math")
    with pytest.raises(AttnControlError, match="does not run its attention through transformers"):
        attach(pipe, HeadGate("L0"))
    assert "_attn_control" not in pipe.model.__dict__


def test_a_model_without_a_row_is_refused():
    pipe = tiny.llada2()
    pipe.model = torch.nn.Linear(2, 2)
    with pytest.raises(AttnControlError, match="Linear is not a model that attn_control knows"):
        attach(pipe, HeadGate("L0"))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"dropout": 0.1}, "dropout"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
    ],
)
def test_what_no_mask_says_stays_dense_with_one_warning(more, why, monkeypatch):
    pipe = tiny.llada2()
    plain = logits(lambda: tiny.run_llada2(pipe, STEPS), pipe)

    def function(module: Any, *args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, *args, scaling=kwargs["scaling"])

    watched = Watched.__call__
    monkeypatch.setattr(Watched, "__call__", lambda self, *a, **k: watched(self, *a, **k | more))
    with named(pipe, "odd", function), attach(pipe, SelectedAttention(**EACH_STEP)) as session:
        with pytest.warns(UserWarning, match=why) as caught:
            ours = logits(lambda: tiny.run_llada2(pipe, STEPS), pipe)
        assert len([w for w in caught if why in str(w.message)]) == 1
        assert why in session.report().to_dict()["controls"][0]["reason"]
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_a_cache_that_nobody_was_told_of_stays_dense_with_one_warning(monkeypatch):
    """Keys of earlier calls, ahead of those of this one."""
    pipe = tiny.llada2()
    watched = Watched.__call__

    def cached(
        self: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, *a: Any, **more: Any
    ) -> Any:
        k, v = (torch.cat([x[:, :, :8], x], 2) for x in (k, v))
        return watched(self, module, q, k, v, *a, **more)

    with pytest.MonkeyPatch.context() as patch, attach(pipe):
        patch.setattr(Watched, "__call__", cached)
        plain = logits(lambda: tiny.run_llada2(pipe, STEPS), pipe)
    monkeypatch.setattr(Watched, "__call__", cached)
    with attach(pipe, SelectedAttention(**EACH_STEP)):
        with pytest.warns(UserWarning, match="other queries and keys than the text") as caught:
            ours = logits(lambda: tiny.run_llada2(pipe, STEPS), pipe)
        assert len([w for w in caught if "stays dense" in str(w.message)]) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
