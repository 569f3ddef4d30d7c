"""Texts in a line: their blocks, the blocks about a query's own, and selection under a mask."""

from __future__ import annotations

import pytest
import torch
from masks_by_hand import edges

from attn_control import AttnControlError
from attn_control.call import Layout, Segment
from attn_control.masks.line import Cut, Line
from attn_control.masks.selectors import (
    PerRegion,
    Sampled,
    TopK,
    TopP,
    exact_pooled,
    mean_pooled,
    min_max_bound,
    select_blocks,
)

CACHED = Line((("prompt", 20), ("response", 16), ("canvas", 16), ("pad", 7)), 36, 16)
WHOLE = Line((("prompt", 20), ("response", 12)), 0, 32)


def segments(*parts: tuple[str, int]) -> tuple[Segment, ...]:
    starts = [sum(n for _, n in parts[:at]) for at in range(len(parts))]
    return tuple(Segment(n, "text", s, t) for (n, t), s in zip(parts, starts, strict=True))


def test_a_line_is_read_off_a_layout():
    keys = segments(("prompt", 5), ("response", 4), ("canvas", 3))
    assert Line.of(Layout(keys, keys)) == Line(
        (("prompt", 5), ("response", 4), ("canvas", 3)), 0, 12
    )
    asked = Layout(segments(("canvas", 3)), keys)
    assert Line.of(asked) == Line((("prompt", 5), ("response", 4), ("canvas", 3)), 9, 3)
    assert Line.of(asked).tokens == {"prompt": 5, "response": 7}
    with pytest.raises(AttnControlError, match="not among its keys"):
        Line.of(Layout(segments(("canvas", 4)), keys))
    picture = Segment("image", "image", 0, 4, (1, 2, 2))
    assert Line.fits(asked) and not Line.fits(Layout((picture,), (picture,)))


def test_blocks_of_queries_are_some_of_the_keys():
    asking, keys = CACHED.cuts(8)
    assert asking == Cut((16,), 8) and keys == Cut((20, 16, 16, 7), 8)
    assert CACHED.runs == [("prompt", 20), ("response", 32), (None, 7)]
    asking, keys = WHOLE.cuts(8)
    assert asking == keys == Cut((20, 12), 8)


@pytest.mark.parametrize("reach", [1, 2, 3, 5, 99])
@pytest.mark.parametrize("line", [CACHED, WHOLE], ids=["cached", "whole"])
def test_near_blocks_by_definition(line, reach):
    on = line.near(8, reach).to_dense()[0, 0]
    parts = [n for name, n in line.parts if name != "pad"]
    read = edges(parts, 8)
    blocks = list(zip(read, read[1:], strict=False))
    by_hand = torch.zeros(line.queries, line.length, dtype=torch.bool)
    for query in range(line.queries):
        token = line.first + query
        own = next(n for n, (a, b) in enumerate(blocks) if a <= token < b)
        count = min(reach, len(blocks))
        first = min(max(own - count // 2, 0), len(blocks) - count)
        for a, b in blocks[first : first + count]:
            by_hand[query, a:b] = True
    assert torch.equal(on, by_hand)


def tensors(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    made = (torch.randn(2, 2, n, 8, generator=g) for n in (queries, keys))
    return tuple(made)  # type: ignore[return-value]


@pytest.mark.parametrize("score", [mean_pooled, min_max_bound, Sampled(2), exact_pooled])
@pytest.mark.parametrize("budget", [TopK(2), TopK(1.0), TopP(0.6), TopP(1.0)], ids=str)
def test_nothing_that_the_model_masks_is_selected(score, budget):
    """Row 0 is padded at the left by two blocks and a half, which leaves half a block."""
    q, k = tensors(32, 32)
    cut = Cut((20, 12), 8)
    allowed = torch.ones(2, 1, 32, 32, dtype=torch.bool).tril()
    allowed[0, :, :, :20] = False
    mask = select_blocks(q, k, budget, score=score, grid=cut, own=False, allowed=allowed)
    table = mask.table
    bounds = edges((20, 12), 8)
    for row in range(2):
        for i, j in ((i, j) for i in range(5) for j in range(5)):
            part = allowed[row, 0, bounds[i] : bounds[i + 1], bounds[j] : bounds[j + 1]]
            if not part.any():
                assert not table[row, :, i, j].any()
    for i in range(5):  # and where anything is allowed, something is
        reads = allowed[:, 0, bounds[i] : bounds[i + 1]].flatten(1).any(1)
        assert torch.equal(table[:, :, i].any(-1), reads[:, None].expand(-1, 2))


def test_exact_scores_are_of_the_allowed_attention():
    q, k = tensors(16, 32)
    allowed = torch.rand(2, 1, 1, 32, generator=torch.Generator().manual_seed(1)) < 0.5
    scores = (q @ k.mT / 8**0.5).masked_fill(~allowed, float("-inf")).softmax(-1)
    mass = scores.unflatten(-1, (4, 8)).sum(-1).unflatten(2, (2, 8)).mean(3)
    best = mass.argmax(-1)
    table = select_blocks(
        q, k, TopK(1), score=exact_pooled, grid=Cut((16,), 8), k_grid=Cut((32,), 8),
        own=False, allowed=allowed,
    ).table  # fmt: skip
    assert torch.equal(table.long().argmax(-1), best)
    assert (table.sum(-1) == 1).all()


def test_regions_have_budgets_of_their_own():
    q, k = tensors(16, 59)
    asking, keys = CACHED.cuts(8)
    budgets = {"prompt": TopK(2), "response": TopK(1), None: None}
    runs = PerRegion([(n, budgets[region]) for region, n in CACHED.runs])
    table = select_blocks(q, k, runs, grid=asking, k_grid=keys).table
    counts = [table[..., a:b].sum(-1).unique().tolist() for a, b in ((0, 3), (3, 7), (7, 8))]
    assert counts == [[2], [1], [0]]  # 3 blocks of the prompt, 4 of the response, 1 of room
