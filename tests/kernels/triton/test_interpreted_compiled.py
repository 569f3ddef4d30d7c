"""What torch sees of the kernels: operators that keep their promises, and one graph."""

from __future__ import annotations

import torch
from attend_oracle import case

from attn_control.kernels import attend
from attn_control.kernels.triton.op import block_sparse
from attn_control.kernels.triton.prepare import prepared

SMALL = {"q_regions": (40,), "k_regions": (50,)}


def test_the_operator_keeps_its_promises():
    x = case(0, **SMALL)
    inputs = tuple(t.requires_grad_() for t in (x.q, x.k, x.v))
    made = prepared(x.plan, x.q, 1, needs_grad=True)
    torch.library.opcheck(block_sparse, (*inputs, made.lists, made.numbers, 0.25, [None] * 6))


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
