"""Smoothed energy guidance (B5, B6): diffusers' guider runs a forward more and changes nothing."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from diffusers.guiders import SmoothedEnergyGuidance
from diffusers.hooks import SmoothedEnergyGuidanceConfig
from diffusers.hooks.smoothed_energy_guidance_utils import _gaussian_blur_2d
from tiny_guiders import (
    CFG,
    SCALE,
    costs_a_forward,
    judge,
    pushed_by,
    pushed_by_guider,
    pushed_by_hand,
    run,
    upstream,
)
from tiny_oracle import attention, close, dense

from attn_control.processors import SEG

SITE = "transformer_blocks.1.attn"
PICTURES = {"sd3": slice(0, 16), "flux": slice(5, 21)}


def model_of(name):
    """SD3 without norms of queries, so that a blur before them and one after are the same."""
    model = tiny.sd3(qk_norm=None) if name == "sd3" else tiny.flux()
    return model, tiny.inputs(name)


def blurred(model, call, picture, blur):
    """Attention with the picture's queries blurred, as an explicit map."""
    with attention(model) as seen:
        run(model, call)
    softmax = seen[SITE][-1]
    q = softmax.q.double().clone()
    q[:, :, picture] = blur(q[:, :, picture])
    a = dense(q, softmax.k)
    return attention(model, {SITE: lambda _, v: a @ v})


def mean(q):
    return q.mean(2, keepdim=True).expand_as(q)


@pytest.mark.parametrize("name", PICTURES)
def test_b5_the_mean_query(name):
    model, call = model_of(name)
    got = pushed_by(SEG("L1", scale=SCALE), model, call)
    close(got, pushed_by_hand(model, call, blurred(model, call, PICTURES[name], mean)), 2e-5)


@upstream("B5", "the SEG guider never counts its batches, and so perturbs none of them")
@pytest.mark.parametrize("name", PICTURES)
def test_b5_the_guider(name):
    model, call = model_of(name)
    guider = SmoothedEnergyGuidance(
        guidance_scale=CFG, seg_guidance_scale=SCALE, seg_blur_sigma=math.inf,
        seg_guidance_config=SmoothedEnergyGuidanceConfig([1], fqn="transformer_blocks"),
    )  # fmt: skip
    got = pushed_by_guider(guider, model, call)
    costs_a_forward(guider)
    right = pushed_by_hand(model, call, blurred(model, call, PICTURES[name], mean))
    judge(got, right, wrong=torch.zeros_like(got))


def weights(size, at, sigma):
    found = torch.exp(-((torch.arange(size) - at) ** 2).double() / (2 * sigma**2))
    return found / found.sum()


def gaussian(q):
    """A blur of sigma 1 on the 4 x 4 grid, token by token, its weights summing to 1."""
    out = torch.empty_like(q)
    for token in range(16):
        row, column = divmod(token, 4)
        kernel = weights(4, row, 1.0)[:, None] * weights(4, column, 1.0)
        out[:, :, token] = torch.einsum("t,bhtd->bhd", kernel.flatten(), q)
    return out


@pytest.mark.parametrize("name", PICTURES)
def test_b6_a_finite_sigma(name):
    model, call = model_of(name)
    got = pushed_by(SEG("L1", sigma=1.0, scale=SCALE), model, call)
    right = pushed_by_hand(model, call, blurred(model, call, PICTURES[name], gaussian))
    close(got, right, 2e-5)


QUERY = torch.randn(1, 81, 2, generator=torch.Generator().manual_seed(3))
MIDDLE = 40  # of 9 x 9, which no border of the kernel of 7 x 7 reaches


@upstream("B6", "the branches of finite and infinite sigma are the wrong way round")
def test_b6_the_hooks_blur_of_a_finite_sigma():
    got = _gaussian_blur_2d(QUERY.clone(), 7, 1.0, 9999.9)[:, MIDDLE]
    kernel = weights(9, 4, 1.0)
    kernel[[0, 8]] = 0
    kernel = kernel / kernel.sum()
    right = torch.einsum("t,btd->bd", (kernel[:, None] * kernel).flatten().float(), QUERY)
    judge(got, right, wrong=QUERY.mean(1))


@upstream("B6", "the branches of finite and infinite sigma are the wrong way round")
def test_b6_the_hooks_blur_of_an_infinite_sigma():
    got = _gaussian_blur_2d(QUERY.clone(), 7, 1e6, 9999.9)[:, MIDDLE]
    box = QUERY.unflatten(1, (9, 9))[:, 1:8, 1:8].mean((1, 2))
    judge(got, right=QUERY.mean(1), wrong=box)
