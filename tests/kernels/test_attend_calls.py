"""How attend treats the process, its arguments and bad requests."""

from __future__ import annotations

import threading

import pytest
import torch
from attend_oracle import blocks_of, case, softmax, worst

from attn_control.errors import AttnControlError
from attn_control.kernels import attend
from attn_control.kernels.tiles.workers import work


@pytest.fixture
def two_workers():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def step(x, plan=None):
    """Output, lse and gradients."""
    inputs = tuple(t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v))
    out, lse = attend(*inputs, plan or x.plan, impl="torch")
    loss = out.square().sum() + lse[lse.isfinite()].sum()
    return out, lse, *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("heads", [1, 3])
def test_two_workers_give_the_same_bits_each_time_and_as_one_does(two_workers, heads):
    x = case(0, heads=heads, kv_heads=1, q_regions=(700,), k_regions=(500,), dim=32)
    found = step(x)
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(found, step(x), strict=True))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    for mine, alone in zip(found, step(x), strict=True):
        assert torch.equal(mine, alone)


def test_the_threads_setting_is_restored_also_after_an_error(two_workers):
    ran = []

    def do(unit, scratch):
        ran.append((unit, threading.current_thread(), torch.get_num_threads()))
        if unit == 3:
            raise RuntimeError("unit 3")

    with pytest.raises(RuntimeError, match="unit 3"):
        work(range(6), lambda unit: float(unit), do)
    assert torch.get_num_threads() == 2
    assert sorted(unit for unit, _, _ in ran) == list(range(6))
    assert {threads for _, _, threads in ran} == {1}
    assert threading.main_thread() not in {thread for _, thread, _ in ran}


def test_the_costliest_comes_first():
    order = []
    torch.set_num_threads(before := torch.get_num_threads())
    work([3], float, lambda unit, _: order.append(unit))  # one unit: no pool
    assert order == [3] and torch.get_num_threads() == before


def test_one_worker_takes_the_costliest_first():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        order = []
        work([1, 3, 2], float, lambda unit, _: order.append(unit))
    finally:
        torch.set_num_threads(before)
    assert order == [3, 2, 1]


def test_calls_from_two_threads_at_once(two_workers):
    cases = [case(seed, q_regions=(400,), k_regions=(300,)) for seed in (1, 2)]
    alone = [step(x) for x in cases]
    found: dict[int, list] = {0: [], 1: []}

    def run(number):
        for _ in range(3):
            found[number].append(step(cases[number]))

    threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        assert len(found[number]) == 3
        for again in found[number]:
            assert all(torch.equal(a, b) for a, b in zip(again, alone[number], strict=True))
    assert torch.get_num_threads() == 2


def test_two_geometries_in_one_process():
    a, b = case(0), case(0, q_regions=(333,), k_regions=(77, 100), dim=40, heads=4, kv_heads=2)
    for _ in range(2):
        for x in (a, b):
            out, _ = attend(x.q, x.k, x.v, x.plan, impl="torch")
            assert worst(out, softmax(x.q, x.k, x.v, x.dense, x.q.shape[-1] ** -0.5)[0]) <= 2e-6


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_what_lies_in_padding_does_not_matter(kv_heads):
    """Keys that no query of the head may read, and queries that may read none, inside blocks too,
    may hold anything; their own gradients are 0.
    """
    shape = {"k_regions": (50, 210), "kv_heads": kv_heads}
    x = case(1, **shape)
    dense = x.dense.clone()
    dense[..., 37:50] = False  # the end of a text, inside a block
    dense[..., 200:] = False  # whole blocks and a part
    dense[..., 140:, :] = False
    plan = blocks_of(dense, 32, 32, x.plan.q_regions, x.plan.k_regions)
    clean = step(x, plan)
    for dirt in (float("nan"), float("inf"), 1e30):
        soiled = case(1, **shape)
        soiled.q[:, :, 140:] = dirt
        for t in (soiled.k, soiled.v):
            t[:, :, 37:50], t[:, :, 200:] = dirt, dirt
        found = step(soiled, plan)
        assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))
    dq, dk, dv = clean[2:]
    assert (dq[:, :, 140:] == 0).all()
    assert all((t[:, :, 37:50] == 0).all() and (t[:, :, 200:] == 0).all() for t in (dk, dv))


def test_nothing_is_written_to_the_inputs():
    x = case(4, k_regions=(700,))
    mask = torch.rand(1, 1, 1, 700) < 0.7
    given = [x.q, x.k, x.v, mask, x.plan.count, x.plan.index, x.plan.tile, x.plan.pool]
    before = [t.clone() for t in given]
    inputs = tuple(t.requires_grad_() for t in given[:3])
    out, lse = attend(*inputs, x.plan, mask=mask, impl="torch")
    torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


def test_views_in_any_layout():
    x = case(5, k_regions=(700,), density=0.3, heads=4, kv_heads=4)
    plain, _ = attend(x.q, x.k, x.v, x.plan, impl="torch")
    joined = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v)]
    turned = [t.mT.contiguous().mT for t in (x.q, x.k, x.v)]
    for views in (joined, turned):
        assert worst(attend(*views, x.plan, impl="torch")[0], plain) <= 1e-6
    with torch.inference_mode():
        assert torch.equal(attend(x.q, x.k, x.v, x.plan, impl="torch")[0], plain)
    with torch.no_grad():
        out, _ = attend(x.q.requires_grad_(), x.k, x.v, x.plan, impl="torch")
    assert not out.requires_grad and torch.equal(out, plain)


def test_joined_heads_are_a_view():
    x = case(6)
    out, _ = attend(x.q, x.k, x.v, x.plan, impl="torch")
    assert out.transpose(1, 2).is_contiguous()


def test_inside_a_compiled_function():
    x = case(7)

    @torch.compile(backend="eager")
    def half(q):
        return attend(q + 0, x.k, x.v, x.plan, impl="torch")[0] / 2

    plain, _ = attend(x.q, x.k, x.v, x.plan, impl="torch")
    assert torch.equal(half(x.q), plain / 2)


WRONG = {
    "q as a tensor": lambda x: dict(q=x.q[0]),
    "k as a tensor": lambda x: dict(k=[1, 2]),
    "v of q's": lambda x: dict(v=x.v.double()),
    "q of one of": lambda x: dict(q=x.q.int()),
    "one shape": lambda x: dict(v=x.v[:, :, 1:]),
    "head_dim 16": lambda x: dict(k=x.k[..., :8], v=x.v[..., :8]),
    "batch 1": lambda x: dict(k=x.k.repeat(2, 1, 1, 1), v=x.v.repeat(2, 1, 1, 1)),
    "multiple of": lambda x: dict(q=x.q.repeat(1, 2, 1, 1)[:, :3]),
    "a BlockMask, a GroupMask or None": lambda x: dict(plan=x.dense),
    "plan is for 150 queries and 210 keys": lambda x: dict(q=x.q[:, :, 1:]),
    "plan.heads of 1 or 4": lambda x: dict(q=x.q.repeat(1, 2, 1, 1)),
    "plan.batch of 1 or 3": lambda x: dict(
        plan=case(0, batch=2, shared=(False, True)).plan,
        **{name: getattr(x, name).repeat(3, 1, 1, 1) for name in "qkv"},
    ),
    "a tensor as mask": lambda x: dict(mask=[True]),
    "mask as bool or float": lambda x: dict(mask=torch.ones(210, dtype=torch.int64)),
    r"= \(1, 2, 150, 210\), got \(1, 209\)": lambda x: dict(mask=torch.ones(1, 209)),
    "broadcastable": lambda x: dict(mask=torch.ones(1, 1, 1, 1, 210)),
    "mask requires grad": lambda x: dict(mask=torch.ones(210, requires_grad=True)),
    "finite number as scale": lambda x: dict(scale=float("nan")),
    "as scale, got '1'": lambda x: dict(scale="1"),
    "impl='triton'": lambda x: dict(impl="triton"),
    "'torch', 'flex', 'triton' as impl, got 'cuda'": lambda x: dict(impl="cuda"),
    "no backward on a CPU": lambda x: dict(impl="flex", q=x.q.clone().requires_grad_()),
    "no float64": lambda x: dict(impl="flex", q=x.q.double(), k=x.k.double(), v=x.v.double()),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_requests_are_told_what_was_expected(message):
    x = case(0)
    given = {"q": x.q, "k": x.k, "v": x.v, "plan": x.plan, **WRONG[message](x)}
    with pytest.raises(AttnControlError, match=message):
        attend(**given)


@pytest.mark.slow
def test_flex_agrees():
    """Compiled: heads of their own, grouped keys, ragged ends, empty rows, the model's mask."""
    x = case(8, batch=2, heads=4, kv_heads=2, block=(64, 64), density=0.6)
    mask = torch.rand(2, 1, 1, 210) < 0.7
    out, lse = attend(x.q, x.k, x.v, x.plan, mask=mask, impl="flex")
    expected, mass = softmax(x.q, x.k, x.v, x.dense & mask, 0.25)
    assert worst(out, expected) <= 2e-6 and worst(lse, mass) <= 4e-6
    assert attend(x.q, x.k, x.v, x.plan, mask=mask, impl="flex", need_lse=False)[1] is None
