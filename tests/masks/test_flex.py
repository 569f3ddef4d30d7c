"""To flex_attention and back: what it attends to is what the mask says, compiled or not."""

from __future__ import annotations

import pytest
import torch
from masks_by_hand import listed, random_dense
from torch.nn.attention.flex_attention import (
    create_block_mask,
    create_mask,
    flex_attention,
    noop_mask,
)

from attn_control import AttnControlError
from attn_control.masks import BlockMask, Grid, neighborhood_mask

GRIDS = [
    dict(q_block=32, k_block=64, q_regions=(70,), k_regions=(130,)),
    dict(q_block=32, k_block=32, q_regions=(40, 7), k_regions=(70, 33)),  # no uniform grid
    dict(q_block=32, k_block=32, q_regions=(64, 7), k_regions=(32, 64, 5)),  # uniform all the same
]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 3)])
def test_there_and_back(grid, batch, heads):
    dense = random_dense(5, **grid, batch=batch, heads=heads)
    flex = listed(dense, **grid).to_flex()
    assert flex.seq_lengths == dense.shape[2:]
    said = create_mask(flex.mask_mod, batch, heads, *dense.shape[2:], device="cpu")
    assert torch.equal(said, dense)
    back = BlockMask.from_flex(flex).validate(rows=False, own=False)
    assert torch.equal(back.to_dense(), dense)
    # Compiled, it adds up what both lists name: no block may be in both.
    assert flex.kv_num_blocks.sum() + flex.full_kv_num_blocks.sum() == back.count.sum()


def test_masks_that_flex_made():
    def banded(b, h, q, k):
        return (q >= k) & (q - k < 100 + 50 * h)

    q, k = torch.arange(300)[:, None], torch.arange(300)
    flex = create_block_mask(banded, None, 3, 300, 300, device="cpu")
    mask = BlockMask.from_flex(flex).validate()
    for head in range(3):
        assert torch.equal(mask.to_dense()[0, head], banded(0, head, q, k))
    assert mask.density() < mask.visited_density() < 1
    everything = BlockMask.from_flex(
        create_block_mask(noop_mask, None, None, 300, 140, device="cpu")
    )
    assert everything.density() == 1 and everything.is_fully_block_sparse()
    with pytest.raises(AttnControlError, match="Tensor is no flex BlockMask"):
        BlockMask.from_flex(q)


def both(mask: BlockMask, call) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of flex, and of a softmax under the dense mask in float64."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, mask.heads, mask.q_len, 16, generator=g)
    k, v = torch.randn(2, 2, mask.heads, mask.k_len, 16, generator=g)
    scores = (q.double() @ k.double().mT / 4).masked_fill(~mask.to_dense(), -torch.inf)
    return call(q, k, v, block_mask=mask.to_flex()), scores.softmax(-1) @ v.double()


def spread(dense: torch.Tensor) -> torch.Tensor:
    dense[..., 0] = True  # no row without a key: flex and softmax say different things of it
    return dense


@pytest.mark.parametrize("grid", GRIDS)
def test_not_compiled(grid):
    mask = listed(spread(random_dense(6, **grid)), **grid)
    out, expected = both(mask, flex_attention)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_compiled():
    grid = dict(q_block=128, k_block=128, q_regions=(300,), k_regions=(300,))
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = listed(spread(random_dense(7, **grid)), **grid)
    out, expected = both(mask, compiled)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


def test_neighborhoods_of_many_regions_not_compiled():
    mask = neighborhood_mask(Grid((3, 16, 16), block=32, after=5), (2, 5, 7))
    assert len(mask.q_regions) == 4  # frames and text: not flex's grid
    out, expected = both(mask, flex_attention)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
