"""What torch sees of the kernels: operators that keep their promises, and one graph."""

from __future__ import annotations

import pytest
import torch
from attend_oracle import case
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from attn_control.kernels import attend, probe
from attn_control.kernels.triton.op import PARTS, block_sparse, block_sparse_backward
from attn_control.kernels.triton.prepare import prepared
from attn_control.kernels.triton.run import attend_triton
from attn_control.masks import GroupMask

SMALL = {"q_regions": (40,), "k_regions": (50,)}


def grouped(x):
    """The case's blocks, and of the keys odd ones for odd queries alone."""
    sides = (torch.arange(n, dtype=torch.int16) % 2 for n in (40, 50))
    return x.plan & GroupMask(*sides, torch.tensor([1, 3]))


@pytest.mark.parametrize("groups", [False, True])
def test_the_operators_keep_their_promises(groups):
    x = case(0, dim=8, **SMALL)
    plan = grouped(x) if groups else x.plan
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, x.v))
    lists, numbers, *extras = prepared(plan, x.q, 1, needs_grad=True)
    extras.insert(2, None)
    given = lists, numbers, 0.25, extras
    torch.library.opcheck(block_sparse, (*inputs, *given))
    out, lse = (t.detach() for t in block_sparse(*inputs, *given))
    inputs = tuple(t.detach() for t in inputs)
    given = lists[PARTS:], numbers[len(numbers) // 3 :], 0.25, extras
    torch.library.opcheck(
        block_sparse_backward, (out, torch.zeros_like(lse), *inputs, out, lse, *given)
    )


def test_one_graph_for_all_masks_of_a_shape():
    cases = [case(seed, **SMALL) for seed in range(3)]
    for x in cases:
        attend(x.q, x.k, x.v, x.plan, impl="triton")  # its lists are made here
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()

    @torch.compile(backend=count, fullgraph=True)
    def twice(q, k, v, plan):
        return attend(q + 0, k, v, plan, impl="triton")[0] * 2

    for x in cases:
        expected = attend(x.q, x.k, x.v, x.plan, impl="triton")[0] * 2
        assert torch.equal(twice(x.q, x.k, x.v, x.plan), expected)
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("block_sparse" in name for name in names) == 1
    assert len(graphs) == 1


def test_one_graph_forward_and_one_backward():
    """Groups within blocks, another attention to go on from, and a probe, all differentiable."""
    x = case(1, dim=8, **SMALL)
    plan = grouped(x)
    seen = {"forward": [], "backward": []}

    def keep(way):
        def compiler(graph, _):
            seen[way].append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
            return make_boxed_func(graph.forward)

        return compiler

    def loss(q, k, v):
        onto = attend_triton(q, k, v, x.plan, None, 0.3)
        out, lse = attend_triton(q, k, v, plan, None, 0.3, onto=onto)
        return (out**2).sum() + probe(q, k, lse, [3, 7], plan, scale=0.3, impl="triton").sum()

    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, x.v))
    expected = torch.autograd.grad(loss(*inputs), inputs)  # lists are made here
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    found = torch.autograd.grad(
        torch.compile(loss, backend=backend, fullgraph=True)(*inputs), inputs
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    for way, name in (("forward", "block_sparse"), ("backward", "block_sparse_backward")):
        (graph,) = seen[way]
        assert sum(target.startswith(f"attn_control.{name}.") for target in graph) == 2
