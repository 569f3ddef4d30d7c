"""What makes the trainings quick changes nothing but their speed."""

import platform

import pytest
import torch
import torch.nn.functional as F

from attn_control.zoo.train import quick


def oracle(q, k, v):
    """Softmax attention in float64, row by row."""
    q, k, v = q.double(), k.double(), v.double()
    rows = [torch.softmax(k @ row / q.shape[-1] ** 0.5, 0) @ v for row in q]
    return torch.stack(rows)


def normalised(*shape):
    return F.rms_norm(torch.randn(*shape), shape[-1:])


def test_attention_is_softmax_attention_also_at_the_largest_scores_that_norms_allow():
    torch.manual_seed(0)
    q, k, v = normalised(2, 3, 70, 32), normalised(2, 3, 45, 32), torch.randn(2, 3, 45, 32)
    for scale in (1.0, 3.0):  # of queries and keys each: scores up to 51
        out = quick.attention(scale * q, scale * k, v)
        for b in range(2):
            for h in range(3):
                want = oracle(scale * q[b, h], scale * k[b, h], v[b, h])
                torch.testing.assert_close(out[b, h].double(), want, atol=2e-5, rtol=2e-5)


def test_only_plain_calls_are_written_out_and_the_fused_call_comes_back():
    fused = F.scaled_dot_product_attention
    q = normalised(1, 2, 6, 8)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    want = [fused(q, q, q), fused(q, q, q, attn_mask=mask), fused(q, q, q, is_causal=True)]
    with pytest.raises(KeyError), quick.written_out():
        assert F.scaled_dot_product_attention is not fused
        got = F.scaled_dot_product_attention(query=q, key=q, value=q, attn_mask=None)
        assert torch.equal(got, quick.attention(q, q, q))
        torch.testing.assert_close(got, want[0])
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, attn_mask=mask), want[1])
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, is_causal=True), want[2])
        raise KeyError
    assert F.scaled_dot_product_attention is fused


@pytest.mark.slow
def test_a_compiled_loss_and_its_gradients_are_the_eager_ones():
    torch.manual_seed(1)
    layer = torch.nn.Linear(16, 48, bias=False)
    x = torch.randn(3, 20, 16)

    def losses(x):
        q, k, v = layer(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        q, k = F.rms_norm(q, (8,)), F.rms_norm(k, (8,))
        return F.scaled_dot_product_attention(q, k, v).square().mean()

    (want,) = torch.autograd.grad(losses(x), layer.weight)
    run = quick.compiled(losses)
    loss = run(x)
    (got,) = torch.autograd.grad(loss, layer.weight)
    torch.testing.assert_close(loss, losses(x))
    torch.testing.assert_close(got, want)


def test_memory_is_kept_where_there_is_glibc():
    assert quick.keep_memory() == (platform.libc_ver()[0] == "glibc")
