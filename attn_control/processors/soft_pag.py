"""SoftPAG: guidance by softly perturbing attention heads (arXiv 2506.10978, Eq. 7)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_control.call import Layout, Site
from attn_control.errors import AttnControlError
from attn_control.kernels import PATHS, TARGETS, Blend, Gates, Permute, Region, Target
from attn_control.plan import Part, PlanBuilder
from attn_control.processors.control import (
    TOKENS,
    number,
    one_of,
    require_tokens,
    span_of,
    whole,
)
from attn_control.processors.guide import Guide
from attn_control.select import parse_heads

OPS = (*TARGETS, "permute")
_TEXT_OPS = ("ii_softmax", "ii_mass")


@dataclass(frozen=True)
class SoftPAG(Guide):
    """Guide away from a prediction in which chosen heads attend only to themselves.

    Per selected head the perturbed pass uses ``A' = (1 - u) A + u I``, computed as ``O' = (1 - u) O
    + u V`` (no map of tokens by tokens), and the guided prediction is ``pred + scale * (cond -
    perturbed)``, where ``pred`` is whatever classifier-free guidance the pipeline makes. All heads
    of a layer at ``u=1`` are PAG (arXiv 2403.17377).

    With ``u`` below 0 the heads are sharpened in place instead, ``O' = O + |u| (O - V)``: no extra
    forward, and no option of guidance may be given.

    Args:
        heads: selector of self- or joint-attention heads, e.g. ``"L7H3, L9H11-14"``.
        u: strength, 0 (none, and no extra forward) to 1 (all of the perturbation), or below 0 to
            -1; or a mapping from selectors to strengths that covers the selected heads, e.g.
            ``{"L7H3": 0.4, "L9": 1}``; of two selectors that hold a head the later counts.
        scale: guidance scale ``w``; the papers use 3 for SD3. 0 asks for nothing; not with
            ``fused``.
        op: what attention is blended with. "identity"; "uniform" (every key alike); "mean_query"
            (SEG's limit, arXiv 2408.00760); "ii_softmax" (image-to-image scores cut, as in
            diffusers' PAG for SD3) and "ii_mass" (image-to-image mass moved onto the diagonal),
            both for image tokens of joint attention; "permute" (shuffled values, anew at each
            step: TPG by head, arXiv 2506.10036).
        tokens: whose queries are perturbed: "all" (as in the paper), "image" (or "video"), "text"
            or "reference".
        path: from attention to identity: "linear", "slerp" (the Fisher-Rao geodesic) or "chord".
        seed: of the shuffles of op "permute".
        cap: for u < 0, the largest norm of a head's new output relative to the old, per token.

    Raises:
        AttnControlError: a value out of range, or a selector that does not parse.
    """

    u: float | Mapping[str, float] = 1.0
    scale: float = 3.0
    op: str = "identity"
    tokens: str = "all"
    path: str = field(default="linear", kw_only=True)
    seed: int = field(default=0, kw_only=True)
    cap: float = field(default=2.5, kw_only=True)
    gates: Tensor | None = field(default=None, kw_only=True, repr=False, compare=False)

    @classmethod
    def from_gates(cls, gates: Tensor, **options: Any) -> SoftPAG:
        """Strengths of all heads as one tensor, (layers, heads) or (batch, layers, heads); may
        require grad.

        Layers of fewer heads than the widest use the first columns of their row. With a batch
        dimension, row b of the cond rows is perturbed by ``gates[b]``. Heads of
        strength 0 are computed, and stay unchanged. This is the low-level door for head search:
        gradients flow from the guided prediction to ``gates``. The tensor may change between steps;
        while every gate is 0 and no gradient is asked for, no extra forward runs (one look at the
        values a step, for which a GPU has to wait).
        """
        _require_gates("SoftPAG.from_gates", gates)
        for name in ("heads", "u"):
            if name in options:
                raise AttnControlError(f"SoftPAG.from_gates: {name!r} is given by the gates")
        return cls(f"L0-{gates.shape[-2] - 1}", gates=gates, **options)

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = f"SoftPAG(heads={self.heads!r})"
        if self.gates is not None:
            _require_gates(owner, self.gates)
        for text in filter(None, self._strengths()):
            parse_heads(text)
        for name, value in self._strengths().items():
            number(owner, f"u[{name!r}]" if name else "u", value, -1.0, 1.0)
        signs = {math.copysign(1, value) for value in self._strengths().values() if value}
        if len(signs) > 1:
            raise AttnControlError(
                f"{owner}: u must not mix signs (below 0 acts in place), got {self.u!r}"
            )
        number(owner, "scale", self.scale)
        number(owner, "cap", self.cap, 1e-3, 1e6)
        one_of(owner, "op", self.op, OPS)
        one_of(owner, "tokens", self.tokens, TOKENS)
        one_of(owner, "path", self.path, tuple(PATHS))
        self._check_company(owner)
        if self.path != "linear" and (self.op != "identity" or self.in_place):
            raise AttnControlError(
                f"{owner}: path {self.path!r} leads to the identity; expected op='identity', u >= 0"
            )
        if self.op in _TEXT_OPS and self.tokens not in ("image", "video"):
            raise AttnControlError(
                f"{owner}: op {self.op!r} needs tokens='image', got {self.tokens!r}"
            )

    def _check_company(self, owner: str) -> None:
        """Refuse options that would be accepted and ignored."""
        whole(owner, "seed", self.seed, 0)
        if self.seed and self.op != "permute":
            raise AttnControlError(f"{owner}: seed is for op='permute', got op={self.op!r}")
        if self.in_place:
            combine = ("scale", "parallel", "limit", "rescale", "fused", "batched")
            self._refuse(combine, "u below 0, which acts in place")
        else:
            self._refuse(("cap",), "u from 0, which guides")

    def _strengths(self) -> dict[str, float]:
        return dict(self.u) if isinstance(self.u, Mapping) else {"": self.u}

    @property
    def in_place(self) -> bool:
        return any(value < 0 for value in self._strengths().values())

    @property
    def needs(self) -> tuple[str, ...]:
        layout = () if self.tokens == "all" and self.op != "permute" else ("layout",)
        inherited = tuple(n for n in super().needs if n != "branch" or not self.in_place)
        return (*inherited, *layout)

    @property
    def idle(self) -> str | None:
        if self.gates is None and not any(self._strengths().values()):
            return "u is 0"
        if self.gates is not None and not self._open(self.gates):
            return "every gate is 0"
        return "scale is 0" if self.scale == 0 and not self.in_place else None

    @staticmethod
    def _open(gates: Tensor) -> bool:
        """Whether gates ask for anything now: they may change, and at 0 they may want gradients."""
        return (gates.requires_grad and torch.is_grad_enabled()) or bool(gates.any())

    @property
    def may_vanish(self) -> bool:
        return self.gates is not None

    @property
    def guidance_scale(self) -> float | None:
        return None if self.in_place or self.fused else self.scale

    @property
    def by_row(self) -> bool:
        return self.gates is not None and self.gates.ndim == 3

    def check(self, site: Site, layout: Layout) -> None:
        if not layout.is_self:
            raise AttnControlError(
                f"{self}: {site.label} attends from {layout.q_len} queries to {layout.k_len} other"
                " keys; the identity needs query i and key i to be the same token"
            )
        require_tokens(self, self.tokens, site, layout)
        if self.op in _TEXT_OPS and not layout.span("text"):
            raise AttnControlError(
                f"{self}: {site.label} has no text among its keys; op {self.op!r} needs it"
            )

    def contribute(
        self,
        builder: PlanBuilder,
        number: int,
        layout: Layout | None,
        heads: tuple[int, ...],
        rows: tuple[int, int] | None,
    ) -> None:
        region = Region(rows, heads, span_of(self.tokens, layout))
        text = layout.span("text") if layout is not None else ()
        target: Target = TARGETS.get(self.op) or self._shuffle(builder, region, layout)
        blend = Blend(
            region,
            self._u(builder, heads, builder.rows if rows is None else rows[1] - rows[0]),
            target,
            self.path,
            text,
            self.cap if self.in_place else None,
        )
        builder.add(Part(number, blend))

    def _shuffle(self, builder: PlanBuilder, region: Region, layout: Layout | None) -> Permute:
        (start, stop), *others = region.spans
        if layout is None or others:
            raise AttnControlError(f"{self}: op 'permute' needs one known run of tokens")
        length = (layout.q_len if stop is None else stop) - start
        order = torch.arange(length, device=builder.device)
        return Permute(order, self.seed, builder.site.layer)

    def _check_gates(self, site: Site, gates: Tensor, rows: int | None) -> None:
        if gates.ndim == 3 and rows is not None and gates.shape[0] != rows:
            raise AttnControlError(
                f"{self}: gates for {gates.shape[0]} rows, but {rows} rows are perturbed at"
                f" {site.label}"
            )

    def _u(self, builder: PlanBuilder, heads: tuple[int, ...], count: int | None) -> Tensor | Gates:
        """Strengths of the heads of one site, and of ``count`` rows where each has its own."""
        if self.gates is not None:
            self._check_gates(builder.site, self.gates, count)
            return Gates(self.gates, builder.site.layer, heads[0], heads[-1] + 1)
        values = [self._strength(builder.site, head) for head in heads]
        return torch.tensor(values, dtype=torch.float32, device=builder.device)

    def _strength(self, site: Site, head: int) -> float | None:
        value: float | None = None
        for text, strength in self._strengths().items():
            if not text or head in parse_heads(text).heads_of(site, self.slots):
                value = float(strength)
        return value

    def select(self, sites: Iterable[Site]) -> dict[Site, tuple[int, ...]]:
        chosen = super().select(sites)
        widest = max(chosen, key=lambda site: site.heads)
        if self.gates is not None and self.gates.shape[-1] != widest.heads:
            raise AttnControlError(
                f"{self}: gates for {self.gates.shape[-1]} heads, but {widest.label} has"
                f" {widest.heads}"
            )
        for text in filter(None, self._strengths()):
            selector = parse_heads(text)
            if not any(
                set(selector.heads_of(site, self.slots)) & set(heads)
                for site, heads in chosen.items()
            ):
                raise AttnControlError(
                    f"{self}: u[{text!r}] names none of the selected heads {self.heads!r}"
                )
        for site, heads in chosen.items():
            for head in heads:
                if self._strength(site, head) is None:
                    raise AttnControlError(
                        f"{self}: u says nothing of {site.label} head {head}, which is selected"
                    )
        return chosen


def _require_gates(owner: str, gates: Any) -> None:
    if not isinstance(gates, Tensor) or gates.ndim not in (2, 3) or not gates.is_floating_point():
        shape = tuple(gates.shape) if isinstance(gates, Tensor) else gates
        raise AttnControlError(
            f"{owner}: gates must be a float tensor (layers, heads) or (batch, layers, heads), got"
            f" {shape!r}"
        )
