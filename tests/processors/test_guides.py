"""Guidance on whole models: each option against an explicit perturbed pass and combine."""

from __future__ import annotations

import pytest
import tiny
import tiny_pipelines
import torch
from guides_shared import combine, run
from tiny_oracle import Softmax, attention, close, dense, forwards

from attn_control import AttnControlError, attach
from attn_control.processors import SEG, SoftPAG


def _perturbed(model, call, name, change):
    with attention(model, {name: change}):
        return run(model, call)


def _heads(values: dict[int, float]):
    """A' = (1 - u) A + u I with a strength for each head."""

    def change(a, v):
        out = a @ v
        for head, u in values.items():
            out[:, head] = (1 - u) * out[:, head] + u * v[:, head]
        return out

    return change


JOINT = "transformer_blocks.1.attn"


@pytest.mark.parametrize(
    "options",
    [{}, {"parallel": 0.0}, {"parallel": 0.4}, {"limit": 0.05}, {"limit": 100.0}, {"rescale": 0.7},
     {"parallel": 0.0, "limit": 0.1, "rescale": 1.0}],
)  # fmt: skip
def test_combine_options(options):
    model, call = tiny.sd3(), tiny.inputs("sd3")
    cond = run(model, call)
    perturbed = _perturbed(model, call, JOINT, _heads({1: 0.6, 2: 0.6}))
    with attach(model, SoftPAG("L1H1-2", u=0.6, scale=2.5, **options)):
        close(run(model, call), combine(cond, perturbed, 2.5, **options))


def test_strengths_by_head():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    cond = run(model, call)
    perturbed = _perturbed(model, call, JOINT, _heads({0: 0.2, 1: 0.9, 3: 0.9}))
    control = SoftPAG("L1H0-1, L1H3", u={"L1": 0.9, "L1H0": 0.2}, scale=2.0)
    with attach(model, control):
        close(run(model, call), combine(cond, perturbed, 2.0))


def test_a_negative_strength_acts_in_place_in_one_forward():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    want = _perturbed(model, call, JOINT, _heads({1: -0.3}))
    with attach(model, SoftPAG("L1H1", u=-0.3, cap=100.0)), forwards(model) as seen:
        close(run(model, call), want)
    assert len(seen) == 1


def test_the_cap_changes_a_sharpened_prediction():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    found = []
    for cap in (1.0, 1.2, 100.0):
        with attach(model, SoftPAG("L1", u=-1.0, cap=cap)):
            found.append(run(model, call))
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


def test_gates_steer_each_row_by_its_own_head():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    gates = torch.zeros(2, 3, 4)
    gates[0, 1, 2], gates[1, 1, 0] = 0.8, 0.5
    cond = run(model, call)
    first = _perturbed(model, call, JOINT, _heads({2: 0.8}))[:1]
    second = _perturbed(model, call, JOINT, _heads({0: 0.5}))[1:]
    with attach(model, SoftPAG.from_gates(gates, scale=2.0)):
        close(run(model, call), combine(cond, torch.cat([first, second]), 2.0))


def test_gradients_reach_gates_at_zero_and_equal_finite_differences():
    model, call = tiny.sd3().double(), tiny.inputs("sd3")
    call = {name: value.double() for name, value in call.items()}
    gates = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    with attach(model, SoftPAG.from_gates(gates, scale=2.0)):
        loss = model(**call, return_dict=False)[0].square().mean()
        loss.backward()
        for layer, head in ((0, 1), (1, 3), (2, 0)):
            values = []
            for step in (2e-3, -2e-3):
                with torch.no_grad():
                    gates[layer, head] = step
                    values.append(model(**call, return_dict=False)[0].square().mean())
                    gates[layer, head] = 0
            slope = (values[0] - values[1]) / 4e-3
            assert slope.abs() > 1e-6
            torch.testing.assert_close(gates.grad[layer, head], slope, rtol=1e-2, atol=1e-5)


def _blurred(call: Softmax, heads: range, sigma: float, grid: tuple[int, int, int], start: int):
    """The map with queries of a picture blurred, from scratch; rows of other tokens as they are."""
    frames, height, width = grid
    q = call.q.double().clone()
    pixels = q[:, :, start : start + frames * height * width].unflatten(2, grid)
    ys, xs = torch.arange(height).double(), torch.arange(width).double()
    out = torch.zeros_like(pixels)
    for y in range(height):
        for x in range(width):
            if sigma == float("inf"):
                out[:, :, :, y, x] = pixels.flatten(2, 4).mean(2)[:, :, None]
                continue
            wy, wx = (
                torch.exp(-((ys - y) ** 2) / (2 * sigma**2)),
                torch.exp(-((xs - x) ** 2) / (2 * sigma**2)),
            )
            w = wy[:, None] * wx[None] / (wy.sum() * wx.sum())
            out[:, :, :, y, x] = (pixels * w[None, None, None, :, :, None]).sum((3, 4))
    for head in heads:
        q[:, head, start : start + frames * height * width] = out[:, head].flatten(1, 3)
    return dense(q, call.k)


@pytest.mark.parametrize("sigma", [0.8, 3.0, float("inf")])
@pytest.mark.parametrize(
    "family, label, name, grid, start",
    [
        ("sd15", "L0", "down_blocks.0.attentions.0.transformer_blocks.0.attn1", (1, 16, 16), 0),
        ("sd15", "L2", "mid_block.attentions.0.transformer_blocks.0.attn1", (1, 8, 8), 0),
        ("sd3", "L1", JOINT, (1, 4, 4), 0),
        ("flux", "L2", "single_transformer_blocks.0.attn", (1, 4, 4), 5),
        ("wan", "L1", "blocks.1.attn1", (3, 2, 2), 0),
    ],
)
def test_seg_blurs_pictures_on_their_grid(family, label, name, grid, start, sigma):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    with attention(model) as seen:
        cond = run(model, call)
    softmax = seen[name][0]
    blurred = _blurred(softmax, range(1, 2), sigma, grid, start)
    with attention(model, {name: lambda a, v: blurred @ v}):
        perturbed = run(model, call)
    with attach(model, SEG(f"{label}H1", sigma=sigma, scale=2.0)):
        close(run(model, call), combine(cond, perturbed, 2.0))


BAD = [
    (lambda: SoftPAG("L1", u=1.5), "between -1 and 1"),
    (lambda: SoftPAG("L1", u={"L1": float("nan")}), "u\\['L1'\\]"),
    (lambda: SoftPAG("L1", u={"L1H0": 0.5, "L1H1": -0.5}), "mix signs"),
    (lambda: SoftPAG("L1", op="blur"), "op must be one of"),
    (lambda: SoftPAG("L1", op="ii_mass"), "tokens='image'"),
    (lambda: SoftPAG("L1", path="bent"), "path must be one of"),
    (lambda: SoftPAG("L1", path="slerp", op="uniform"), "leads to the identity"),
    (lambda: SoftPAG("L1", parallel=2.0), "parallel"),
    (lambda: SoftPAG("L1", limit=-1.0), "limit"),
    (lambda: SoftPAG("L1", rescale=1.1), "rescale"),
    (lambda: SoftPAG("L1", u=-1.0, cap=0.0), "cap"),
    (lambda: SoftPAG("L1", u=-1.0, scale=2.0), "scale=2.0 has no meaning"),
    (lambda: SoftPAG("L1", u=-1.0, limit=2.0), "limit=2.0 has no meaning"),
    (lambda: SoftPAG("L1", u=0.5, cap=2.0), "cap=2.0 has no meaning"),
    (lambda: SoftPAG("L1", seed=3), "seed is for op='permute'"),
    (lambda: SoftPAG("L1", op="permute", seed=-1), "whole number"),
    (lambda: SoftPAG.from_gates(torch.zeros(4)), "from_gates"),
    (lambda: SoftPAG.from_gates(torch.zeros(3, 4), u=1.0), "given by the gates"),
    (lambda: SEG("L1", sigma=0.0), "sigma"),
    (lambda: attach(tiny.sd3(), SoftPAG("L1H0", u={"L1H1": 0.5})), "none of the selected"),
    (lambda: attach(tiny.sd3(), SoftPAG("L1H0-1", u={"L1H1": 0.5})), "says nothing of"),
    (lambda: attach(tiny.sd3(), SoftPAG.from_gates(torch.zeros(5, 4))), "layer 3"),
]


@pytest.mark.parametrize("make, words", BAD)
def test_bad_values_are_named(make, words):
    with pytest.raises(AttnControlError, match=words):
        make()


def test_gates_of_another_width_are_refused():
    with pytest.raises(AttnControlError, match="gates for 5 heads, but L0.joint has 4"):
        attach(tiny.sd3(), SoftPAG.from_gates(torch.zeros(3, 5)))


def test_gates_for_another_number_of_rows_are_refused_at_the_first_call():
    model, call = tiny.sd3(), tiny.inputs("sd3")
    with pytest.raises(AttnControlError, match="gates for 3 rows, but 2 rows are perturbed"):
        with attach(model, SoftPAG.from_gates(torch.ones(3, 3, 4))):
            run(model, call)


def test_text_ops_need_text():
    model, call = tiny.unet(), tiny.inputs("unet")
    with pytest.raises(AttnControlError, match="no text"):
        with attach(model, SoftPAG("L1", op="ii_mass", tokens="image")):
            run(model, call)


def test_permuted_values_equal_a_shuffled_map_and_repeat_with_their_seed():
    """A P V with the order that the seed, the layer and the step give."""
    model, call = tiny.sd3(), tiny.inputs("sd3")
    cond = run(model, call)
    results = []
    for seed in (0, 0, 7):
        with attach(model, SoftPAG("L1H1", op="permute", tokens="image", seed=seed, scale=2.0)):
            results.append(run(model, call))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    generator = torch.Generator().manual_seed(1_000_003)  # seed 0, layer 1, step 0
    order = torch.cat([torch.randperm(16, generator=generator), torch.arange(16, 21)])

    def shuffled(a, v):
        out = a @ v
        out[:, 1, :16] = (a[:, 1] @ v[:, 1, order])[:, :16]
        return out

    perturbed = _perturbed(model, call, JOINT, shuffled)
    close(results[0], combine(cond, perturbed, 2.0))


def test_each_step_shuffles_anew_and_a_run_repeats():
    pipe, call = tiny_pipelines.sd3()
    seen = []
    with attach(pipe, SoftPAG("L1H1", op="permute", tokens="image")):
        port = pipe.transformer.transformer_blocks[1].attn._attn_control_port
        pipe.transformer.transformer_blocks[1].register_forward_hook(
            lambda *_: seen.append(port.plan and port.plan.parts[0].epilogue.target.order.tolist())
        )
        first = tiny_pipelines.render(pipe, call)
        second = tiny_pipelines.render(pipe, call)
    orders = [tuple(order) for order in seen if order]
    assert len(orders) == 8 and len(set(orders)) == 4 and orders[:4] == orders[4:]
    assert torch.equal(first, second)


def test_a_session_outlives_inference_mode():
    """Plans and counters made in one grad mode serve all others."""
    model, call = tiny.sd3(), tiny.inputs("sd3")
    with attach(model, SoftPAG("L1H1"), SEG("L0", sigma=1.0)):
        with torch.inference_mode():
            first = model(**call, return_dict=False)[0]
        assert torch.equal(first, run(model, call))
        model(**call, return_dict=False)[0].sum().backward()
