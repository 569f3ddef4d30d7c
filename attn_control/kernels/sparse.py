"""SparseSoftmax: attention under a mask, dense now and then, with what is kept between."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from attn_control.call import Call, Site, Step, heads_of
from attn_control.errors import AttnControlError
from attn_control.kernels.corrections import Correction
from attn_control.kernels.padding import keys_of, pairs_of
from attn_control.kernels.pieces import Piece, View, execute, shares
from attn_control.kernels.scores import log_mass, scale_of
from attn_control.ledger import Ledger
from attn_control.policy import DENSE, REFRESH, SHARED, SPARSE, StepPolicy
from attn_control.state import Kept, Memory

POOL = 64
"""Tokens whose mean stands for them when drift is measured."""


class Pattern(Protocol):
    """Where masks come from.

    keeps: whether they are chosen at a refresh and used until the next, or at each call. line: of
        text the numbers of queries and keys; then they stand beside any mask of the model's own.
        cost: of choosing, in dense attentions.
    """

    @property
    def keeps(self) -> bool: ...

    @property
    def line(self) -> tuple[int, int] | None: ...

    def cost(self, view: View) -> float: ...

    def pieces(self, view: View, where: Where) -> Sequence[Piece]: ...


@dataclass(frozen=True)
class Where:
    """The place of a view: its site, step and branch."""

    site: Site
    step: Step
    branch: str


@dataclass(frozen=True, eq=False)
class Fixed:
    """Masks that depend on the geometry alone."""

    made: tuple[Piece, ...]
    keeps = False
    line = None

    def cost(self, view: View) -> float:
        return 0.0

    def pieces(self, view: View, where: Where) -> Sequence[Piece]:
        return self.made


@dataclass(eq=False)
class SparseSoftmax:
    """The attention of one control at one softmax.

    Attributes:
        control: its number; who: how errors and warnings name it.
        heads: ascending; part, span: which softmax of a processor call, and its batch rows.
        gain: of the correction "rho", a level.
    """

    control: int
    who: str
    site: Site
    heads: tuple[int, ...]
    pattern: Pattern
    correction: Correction
    policy: StepPolicy
    gain: float
    memory: Memory
    ledger: Ledger
    part: int = 0
    span: tuple[int, int] | None = None
    _step: Step | None = field(default=None, init=False)

    def prepare(self, step: Step) -> None:
        """As `plan.Attention`; a run that begins forgets the last one's state."""
        self._step = step
        self.memory.begin(step.run_id)

    # Everything is decided in Python, by what was kept: there is nothing here to trace.
    @torch.compiler.disable
    def run(self, call: Call, whole: Callable[[], Tensor]) -> Tensor | None:
        """As `plan.Attention`. Under autocast as torch's own attention: what goes in is cast,
        nothing inside.
        """
        kind = call.q.device.type
        if not torch.is_autocast_enabled(kind):
            return self._run(call, whole)
        dtype = torch.get_autocast_dtype(kind)

        def stock() -> Tensor:
            with torch.autocast(kind, dtype):
                return whole()

        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (call.q, call.k, call.v))
        with torch.autocast(kind, enabled=False):
            return self._run(replace(call, q=q, k=k, v=v), stock)

    def _run(self, call: Call, whole: Callable[[], Tensor]) -> Tensor | None:
        assert self._step is not None
        groups = self._groups(call.q.shape[0], self._step)
        keys, known = self._keys(call)
        if not known:
            for branch, _ in groups:
                self._note(branch, DENSE, 1.0, 1.0)
            return None
        found = []
        for branch, rows in groups:
            out = self._branch(
                branch, self._view(call, rows, keys), lambda r=rows: self._own(whole, r)
            )
            found.append((rows, out))
        if all(out is None for _, out in found):
            return None
        if len(found) == 1:
            return found[0][1]
        parts = [self._own(whole, rows) if out is None else out for rows, out in found]
        return torch.cat(parts)

    def _own(self, whole: Callable[[], Tensor], rows: slice) -> Tensor:
        """This control's rows and heads of the stock call."""
        out = whole()[rows]
        return out if len(self.heads) == out.shape[1] else out[:, list(self.heads)]

    def _groups(self, rows: int, step: Step) -> list[tuple[str, slice]]:
        """Branches of a call, each with its rows; folded frames are rows of their picture's."""
        branch = step.branch[slice(*self.span)] if self.span else step.branch
        each, rest = divmod(rows, len(branch))
        if rest or not each:
            raise AttnControlError(
                f"{self.who}: {self.site.label} runs {rows} rows, the batch has {len(branch)};"
                " expected as many, or a multiple"
            )
        groups: list[tuple[str, slice]] = []
        for row, name in enumerate(branch):
            if groups and groups[-1][0] == name:
                groups[-1] = (name, slice(groups[-1][1].start, (row + 1) * each))
            else:
                groups.append((name, slice(row * each, (row + 1) * each)))
        return groups

    def _keys(self, call: Call) -> tuple[Tensor | None, bool]:
        """The model's mask that stands beside ours: of padding, or in text of any pairs; and
        whether it could be read.
        """
        line, lengths = self.pattern.line, (call.q.shape[2], call.k.shape[2])
        why, detail, keys = call.besides, "", None
        if not why and line is not None:
            if line == lengths:
                return pairs_of(call.mask, call.causal, *lengths, call.q), True
            why = "other queries and keys than the text that was told (a cache of one's own?)"
        elif not why and (call.causal or call.mask is not None):
            if call.mask is not None and not call.causal:
                keys = keys_of(call.mask, *lengths)
            shape = () if call.mask is None else tuple(call.mask.shape)
            why = "a mask of its own that is not padding" if keys is None else ""
            detail = " (causal)" if call.causal else f" (of shape {shape})"
        if why:
            note = f"attention has {why}; it stays dense{detail}"
            if self.ledger.note(note):
                warnings.warn(f"{self.who}: {self.site.label}: {note}", stacklevel=2)
        return keys, not why

    def _view(self, call: Call, rows: slice, keys: Tensor | None) -> View:
        total, some = call.q.shape[1], len(self.heads) < call.q.shape[1]
        q, k, v = (x[rows] for x in (call.q, call.k, call.v))
        if some or k.shape[1] != total:
            few = [heads_of(x, self.heads, total, 1) for x in (q, k, v)]
            q, k, v = (x.expand(-1, len(self.heads), -1, -1) for x in few if x is not None)
        if keys is not None:
            keys = keys[rows] if keys.shape[0] > 1 else keys
            keys = heads_of(keys, self.heads, total, 1) if some else keys
        return View(q, k, v, keys, scale_of(call.q, call.scale))

    # ---- one branch

    def _branch(self, branch: str, view: View, dense: Callable[[], Tensor]) -> Tensor | None:
        step, key = self._step, self._key(branch)
        assert step is not None
        where = Where(self.site, step, branch)
        if step.levels is not None and not self._due(step):
            # A dense step that is looked at all the same.
            cost = self.pattern.measure(view, where)  # type: ignore[attr-defined]
            self._note(branch, DENSE, 1.0, 1.0 + cost)
            return None
        kept = self.memory.get(step.run_id, key, _like(view))
        if self._refreshes(step, kept, view):
            self._refresh(key, where, view, dense)
            return None
        if self.correction.keeps and not self.correction.sparse:
            assert kept is not None
            self._note(branch, SHARED, 0.0, 0.0)
            return self.correction.apply(view.q, None, kept.tensors, 0, self.gain)
        chosen, cost = (kept.extra if kept else None), 0.0
        if chosen is None:
            chosen, cost = self.pattern.pieces(view, where), self.pattern.cost(view)
        out, lse = execute(chosen, view, self.correction.lse)
        density, computed = shares(chosen, view.q.shape[0] * view.q.shape[1])
        self._note(branch, SPARSE, density, computed + cost)
        if not self.correction.keeps:
            return out
        assert kept is not None and step.level is not None and kept.level is not None
        return self.correction.apply(out, lse, kept.tensors, step.level - kept.level, self.gain)

    def _due(self, step: Step) -> bool:
        assert step.level is not None and step.levels is not None
        return self.policy.covers(step.level, step.levels)

    def _key(self, branch: str) -> Hashable:
        return self.control, self.site.name, self.part, branch

    @property
    def _keeps(self) -> bool:
        return self.correction.keeps or self.pattern.keeps

    def _refreshes(self, step: Step, kept: Kept | None, view: View) -> bool:
        policy = self.policy
        if not self._keeps and policy.refresh is None and policy.drift is None:
            return False
        if policy.due(step.level, kept.level if kept else None):
            return True
        assert kept is not None
        if policy.drift is None:
            return False
        return drifted(kept.tensors["pooled"], pooled(view)) > policy.drift

    def _refresh(
        self, key: Hashable, where: Where, view: View, dense: Callable[[], Tensor]
    ) -> None:
        out, cost = dense(), 1.0
        kept = Kept(where.step.level, _like(view))
        with torch.no_grad():
            chosen: Sequence[Piece] = ()
            if self.correction.sparse and self._keeps:
                chosen = self.pattern.pieces(view, where)
                cost += self.pattern.cost(view)
            if self.pattern.keeps:
                kept.extra = chosen
            if self.correction.keeps:
                lse = masked = masked_lse = None
                if self.correction.lse:
                    lse = log_mass(view.q, view.k, view.scale, view.keys)
                    cost += 0.5
                if self.correction.sparse:
                    masked, masked_lse = execute(chosen, view, self.correction.lse)
                    cost += shares(chosen, view.q.shape[0] * view.q.shape[1])[1]
                kept.tensors = self.correction.begin(out, lse, masked, masked_lse)
            if self.policy.drift is not None:
                kept.tensors["pooled"] = pooled(view)
        self.memory.keep(where.step.run_id, key, kept)
        self._note(where.branch, REFRESH, 1.0, cost)

    def _note(self, branch: str, outcome: str, density: float, computed: float) -> None:
        # Extra forwards of guides are theirs: this is about what the pipeline asked for.
        if branch in ("cond", "uncond") or branch.startswith("other:"):
            assert self._step is not None
            self.ledger.add(self._step, branch, self.site, outcome, density, computed)


def _like(view: View) -> Hashable:
    shapes = tuple(view.q.shape), tuple(view.k.shape)
    return shapes, view.q.dtype, str(view.q.device)


def pooled(view: View) -> Tensor:
    """Means of runs of queries and of keys: float32 (rows, heads, runs of both, head_dim)."""
    found = []
    for x in (view.q, view.k):
        runs = x.detach().float().split(POOL, 2)
        found.append(torch.stack([run.mean(2) for run in runs], 2))
    return torch.cat(found, 2)


def drifted(before: Tensor, now: Tensor) -> float:
    """How far pooled tokens have turned away: 1 - cosine, the mean over rows, heads and runs."""
    return float(1 - torch.nn.functional.cosine_similarity(before, now, dim=-1).mean())
