"""Closed forms on random problems against maps written out in float64, query by query.

Text before, after or absent; texts of another length in each row; masks of every shape that models
give; grouped keys; every selector of tokens; strengths from -1 to 1 a head, with and without a cap;
float32 within 2e-5, half precisions within the error of attention itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import dense
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_control.call import Call, Step
from attn_control.kernels import PATHS, TARGETS, Blend, Blur, Permute, Region, gaussian

QUICK = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
STEP = Step(1, 3, 8, None, ("cond",))


@dataclass(frozen=True)
class Problem:
    """A call's tensors, and which tokens are what."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    grid: tuple[int, int, int]
    image: slice
    text: slice
    tokens: slice
    u: tuple[float, ...]
    heads: tuple[int, ...]
    cap: float | None

    @property
    def pictures(self) -> int:
        return self.image.stop - self.image.start

    def cast(self, dtype: torch.dtype) -> Problem:
        q, k, v = (x.to(dtype) for x in (self.q, self.k, self.v))
        mask = self.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(dtype)
        return replace(self, q=q, k=k, v=v, mask=mask)

    def call(self) -> Call:
        mask = self.mask[:, None, None] if self.mask is not None and self.mask.ndim == 2 else None
        mask = self.mask if mask is None else mask

        def original() -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                self.q, self.k, self.v, mask, scale=self.scale, enable_gqa=True
            )

        return Call(None, "main", self.q, self.k, self.v, self.mask, self.scale, original)  # type: ignore[arg-type]


@st.composite
def problems(draw, text: bool = False, tokens=("all", "image", "text"), sign: int = -1) -> Problem:
    batch, kv_heads, groups = (draw(st.integers(1, n)) for n in (3, 3, 3))
    heads, dim = kv_heads * groups, draw(st.integers(1, 8))
    grid = tuple(draw(st.integers(1, n)) for n in (2, 4, 4))
    image = grid[0] * grid[1] * grid[2]
    words = draw(st.integers(1 if text else 0, 5))
    first = draw(st.booleans())
    total = image + words
    spans = {
        "all": slice(0, total),
        "image": slice(words, total) if first else slice(0, image),
        "text": slice(0, words) if first else slice(image, total),
    }
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    q = torch.randn(batch, heads, total, dim, generator=g)
    k, v = (torch.randn(batch, kv_heads, total, dim, generator=g) for _ in range(2))
    chosen = tuple(sorted(draw(st.sets(st.integers(0, heads - 1), min_size=1))))
    strength = st.floats(sign, 1, width=32).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
    where = draw(st.sampled_from([t for t in tokens if t != "text" or words]))
    return Problem(
        q, k, v,
        _mask(draw, g, batch, heads, total, spans["text"], words),
        draw(st.sampled_from([None, 0.3, 1.2])),
        grid, spans["image"], spans["text"], spans[where],
        tuple(draw(strength) for _ in chosen), chosen,
        draw(st.sampled_from([None, 0.8, 1.5])),
    )  # fmt: skip


def _mask(draw, g, batch, heads, total, text, words) -> Tensor | None:
    """None; or each row's text cut to a length of its own, as booleans or as scores, by key or by
    query and key; or a bias of every query and key.
    """
    kind = draw(st.sampled_from(["none", "none", "2d", "keys", "scores", "square", "bias"]))
    if kind == "none":
        return None
    if kind == "bias":
        return torch.randn(batch, heads, total, total, generator=g)
    keep = torch.ones(batch, total, dtype=torch.bool)
    for row in range(batch if words else 0):
        keep[row, text.start + draw(st.integers(1, words)) : text.stop] = False
    if kind == "2d":
        return keep
    keep = keep[:, None, None]
    if kind == "scores":
        return torch.zeros(keep.shape).masked_fill(~keep, -1e4)
    return keep.expand(-1, 1, total, -1) if kind == "square" else keep


def _by_hand(p: Problem, op: str, path: str = "linear", sigma: float = 1.0) -> Tensor:
    """Row-stochastic maps in float64, then their outputs; (batch, heads, tokens, head_dim)."""
    repeats = p.q.shape[1] // p.k.shape[1]
    q = p.q.double()
    k = torch.stack([p.k[:, h // repeats] for h in range(q.shape[1])], 1).double()
    v = torch.stack([p.v[:, h // repeats] for h in range(q.shape[1])], 1).double()
    scale = q.shape[-1] ** -0.5 if p.scale is None else p.scale
    mask = p.mask[:, None, None] if p.mask is not None and p.mask.ndim == 2 else p.mask
    a = dense.attention_map(q, k, scale, mask)
    out = a @ v
    eye = torch.eye(a.shape[-1], dtype=torch.float64).expand_as(a)
    target = _target(p, op, a, q, k, scale, mask, sigma)
    values = v
    if op == "permute":
        target, values = a, v.clone()
        generator = torch.Generator().manual_seed((7 * 1_000_003 + 2) * 1_000_003 + STEP.index)
        picture = torch.arange(v.shape[2])[p.tokens]
        values[:, :, picture] = v[:, :, picture[torch.randperm(len(picture), generator=generator)]]
    for head, u in zip(p.heads, p.u, strict=True):
        if path == "linear":
            new = (1 - u) * out[:, head] + u * (target[:, head] @ values[:, head])
        else:
            rows = dense.slerp_rows if path == "slerp" else dense.chord_rows
            led = rows(a[:, head], u)
            alone = (a[:, head] * eye[:, head]).sum(-1, keepdim=True) > 1 - 1e-9
            new = torch.where(alone, eye[:, head], led) @ v[:, head]
        if p.cap is not None and u < 0:
            size = new.norm(dim=-1, keepdim=True) / out[:, head].norm(dim=-1, keepdim=True)
            new = torch.where(size > p.cap, new / size * p.cap, new)
        out[:, head, p.tokens] = new[:, p.tokens]
    return out


def _target(p: Problem, op, a, q, k, scale, mask, sigma) -> Tensor:
    n = a.shape[-1]
    if op == "uniform":
        return dense.attention_map(torch.zeros_like(q), k, scale, mask)
    if op in ("mean_query", "blur"):
        q = q.clone()
        part = q[:, :, p.tokens]
        q[:, :, p.tokens] = (
            part.mean(2, keepdim=True) if op == "mean_query" else dense.blurred(part, p.grid, sigma)
        )
        return dense.attention_map(q, k, scale, mask)
    if op == "ii_softmax":
        inside = torch.zeros(n, n, dtype=torch.bool)
        inside[p.image, p.image] = True
        hidden = torch.zeros(n, n, dtype=torch.float64).masked_fill(
            inside & ~torch.eye(n, dtype=torch.bool), -torch.inf
        )
        if mask is not None:
            scores = torch.zeros(mask.shape, dtype=torch.float64)
            given = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
            hidden = hidden + given
        return dense.attention_map(q, k, scale, hidden)
    return dense.perturbed_map(op if op != "permute" else "identity", a, q, k, scale, p.image,
                               p.text)  # fmt: skip


def _ours(p: Problem, op: str, path: str = "linear", sigma: float = 1.0) -> Tensor:
    call, span = p.call(), (p.tokens.start, p.tokens.stop)
    target = TARGETS.get(op)
    if op == "permute":
        target = Permute(torch.arange(span[1] - span[0]), 7, 2)
    elif op == "blur":
        target = Blur(p.grid[0], gaussian(p.grid[1], sigma), gaussian(p.grid[2], sigma))
    text = ((p.text.start, p.text.stop),) if p.text.stop > p.text.start else ()
    blend = Blend(Region(None, p.heads, (span,)), torch.tensor(p.u), target, path, text, p.cap)
    blend.prepare(STEP)
    return blend(call.original(), call)


def _agree(p: Problem, op: str, path: str = "linear", **options) -> None:
    plain, got, want = (
        p.call().original(),
        _ours(p, op, path, **options),
        _by_hand(p, op, path, **options),
    )
    inside = torch.zeros(got.shape[:3], dtype=torch.bool)
    inside[:, list(p.heads), p.tokens] = True
    assert torch.equal(got[~inside], plain[~inside])
    assert torch.isfinite(got).all()
    largest = max(1.0, want.abs().max().item())
    assert (got.double() - want).abs().max() <= 2e-5 * largest


@pytest.mark.parametrize("op", ["identity", "uniform", "mean_query", "permute"])
@given(problem=problems())
@QUICK
def test_ops_of_all_tokens(op, problem):
    _agree(problem, op)


@pytest.mark.parametrize("op", ["ii_softmax", "ii_mass"])
@given(problem=problems(text=True, tokens=("image",)))
@QUICK
def test_ops_of_image_tokens(op, problem):
    _agree(problem, op)


@given(problem=problems(tokens=("image",)), sigma=st.floats(0.3, 5))
@QUICK
def test_blur(problem, sigma):
    _agree(problem, "blur", sigma=sigma)


@pytest.mark.parametrize("path", [p for p in PATHS if p != "linear"])
@given(problem=problems(sign=0))
@QUICK
def test_paths(path, problem):
    _agree(problem, "identity", path)


def _half(p: Problem, op: str, path: str, dtype: torch.dtype) -> None:
    """The error is that of attention in this precision, times what the blend multiplies it by."""
    p = p.cast(dtype)
    alone = replace(p, u=(0.0,) * len(p.u))
    eps, largest = torch.finfo(dtype).eps, p.v.abs().max().double()
    exact = _by_hand(alone, op)
    attention = (p.call().original().double() - exact).abs().max()
    attention = torch.maximum(attention, eps / 2 * largest)  # it rounds its output at least
    got, want = _ours(p, op, path), _by_hand(p, op, path)
    assert got.dtype == dtype
    for head, u in zip(p.heads, p.u, strict=True):
        weight = abs(1 - u) + abs(u) * 2  # the target is an attention of rounded queries or values
        error = (got[:, head] - want[:, head]).abs().max()
        assert error <= weight * attention + eps * want[:, head].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["identity", "uniform", "mean_query", "permute", "blur"])
@given(data=st.data())
@QUICK
def test_half_precisions_of_ops(op, dtype, data):
    tokens = ("image",) if op == "blur" else ("all", "image", "text")
    problem = replace(data.draw(problems(tokens=tokens)), cap=None)
    _half(problem, op, "linear", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["ii_softmax", "ii_mass", "slerp", "chord"])
@given(data=st.data())
@QUICK
def test_half_precisions_of_ops_that_read_scores(op, dtype, data):
    if op.startswith("ii"):
        _half(
            replace(data.draw(problems(text=True, tokens=("image",))), cap=None),
            op,
            "linear",
            dtype,
        )
    else:
        _half(replace(data.draw(problems(sign=0)), cap=None), "identity", op, dtype)
