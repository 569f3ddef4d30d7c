"""The text encoder of shapes-flux begins by reading the words around each word."""

from __future__ import annotations

import torch

from attn_control.zoo.train import flux


def test_heads_begin_at_neighbours():
    """Shares of a head's attention by how far the word read stands behind the one that reads."""
    torch.manual_seed(0)
    encoder = flux.build_t5(40).eval()
    encoder.set_attn_implementation("eager")
    ids = torch.randint(2, 40, (64, 12))
    with torch.no_grad():
        maps = encoder(ids, output_attentions=True).attentions
    assert len(maps) == 2
    for probabilities in maps:
        mean = probabilities.mean(0)[:, 4:8]  # words that have all of these neighbours
        by_distance = torch.stack(
            [mean[:, torch.arange(4), torch.arange(4, 8) + apart].mean(1) for apart in range(-4, 5)]
        )
        before, behind, further, free = by_distance.unbind(1)
        assert before.argmax() == 3 and before.max() > 0.5
        assert behind.argmax() == 5 and behind.max() > 0.5
        assert set(further.topk(2).indices.tolist()) == {1, 2} and further[1:3].sum() > 0.5
        assert free.max() < 0.3


def test_the_order_of_words_is_seen():
    """One relation for the other changes more than the words' own places."""
    torch.manual_seed(0)
    encoder = flux.build_t5(40).eval()
    first, second = torch.tensor([[3, 4, 5, 6, 3, 7]]), torch.tensor([[3, 7, 5, 6, 3, 4]])
    with torch.no_grad():
        a, b = encoder(first)[0], encoder(second)[0]
    # The pair of objects changed places; the words between them tell.
    assert (a[:, 2:4] - b[:, 2:4]).norm() > 0.3 * a[:, 2:4].norm()
