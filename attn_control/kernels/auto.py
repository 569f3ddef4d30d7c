"""Which mask for which head: measured once, then shared out over all heads of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_control.kernels.by_head import Selected, parted
from attn_control.kernels.pieces import Piece, View
from attn_control.kernels.sampled import errors
from attn_control.kernels.sparse import Where


def allocate(errors: Tensor, costs: Tensor, budget: float) -> Tensor:
    """For each head the candidate that makes the sum of errors least, at a mean cost of at most
    ``budget``: int64 (heads,).

    One price for all heads (Lagrange): each takes the candidate of least error + price x cost, and
    the price is halved down to the budget. Where even the cheapest are too dear, those.

    errors, costs: float (heads, candidates).
    """
    errors, costs = errors.double(), costs.double()
    low, high = 0.0, 1.0

    def choice(price: float) -> Tensor:
        # Of equals the cheaper.
        return (errors + price * costs + 1e-12 * costs).argmin(-1)

    def spent(chosen: Tensor) -> float:
        return float(costs.gather(-1, chosen[:, None]).mean())

    found = choice(low)
    if spent(found) <= budget:
        return found
    while spent(choice(high)) > budget:
        high *= 2
        if high > 1e12:
            return costs.argmin(-1)
    for _ in range(60):
        middle = (low + high) / 2
        if spent(choice(middle)) <= budget:
            high = middle
        else:
            low = middle
    return choice(high)


@dataclass(eq=False)
class Auto:
    """Fixed masks and shares of selected blocks, head by head.

    Attributes:
        fixed: masks of the geometry, in the selectors' order of tokens; selectors: of several
            budgets; queries: int64, sampled places in raster order; budget: mean share of pairs
            that all heads together compute.
        seen: by run and branch, then by site: errors and costs, each (heads, candidates).
    """

    fixed: tuple[Piece, ...]
    selectors: tuple[Selected, ...]
    queries: Tensor
    budget: float
    keeps: bool = True
    line: None = None
    seen: dict[tuple[int, str], dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    chosen: dict[tuple[int, str], dict[str, Tensor]] = field(default_factory=dict)

    def cost(self, view: View) -> float:
        """As `sparse.Pattern`: of choosing blocks; measuring is counted where it happens."""
        return max(selector.cost(view) for selector in self.selectors)

    def measure(self, view: View, where: Where) -> float:
        """Errors of all candidates at one site, in a step that is dense anyway. Returns its cost,
        in dense attentions.
        """
        run = where.step.run_id
        for kept in (self.seen, self.chosen):
            for key in [key for key in kept if key[0] != run]:
                del kept[key]
        self.chosen.pop((run, where.branch), None)
        made = [selector.pieces(view, where)[0] for selector in self.selectors]
        candidates = (*self.fixed, *made)
        lost = errors(view, self.queries, candidates).mean(0)
        costs = torch.stack([_by_head(p, view.q.shape[1]) for p in candidates], -1)
        self.seen.setdefault((run, where.branch), {})[where.site.name] = (
            lost.cpu(),
            costs.cpu(),
        )
        share = len(self.queries) / view.q.shape[2] * (1 + len(candidates) / 2)
        return share + len(made) * self.cost(view)

    def pieces(self, view: View, where: Where) -> Sequence[Piece]:
        """As `sparse.Pattern`, by what was measured. A site that was not is measured now, and
        shares the budget with nobody.
        """
        key = where.step.run_id, where.branch
        if where.site.name not in self.seen.get(key, {}):
            self.measure(view, where)
            lost, costs = self.seen[key].pop(where.site.name)
            best = allocate(lost, costs, self.budget)
        else:
            if key not in self.chosen:
                self.chosen[key] = self._allocate(self.seen[key])
            best = self.chosen[key][where.site.name]
        return self._pieces(view, where, best.to(view.q.device))

    def _allocate(self, seen: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        lost, costs = (torch.cat([pair[n] for pair in seen.values()]) for n in (0, 1))
        best = allocate(lost, costs, self.budget)
        return dict(zip(seen, best.split([len(e) for e, _ in seen.values()]), strict=True))

    def _pieces(self, view: View, where: Where, best: Tensor) -> Sequence[Piece]:
        rows = view.q.shape[0]
        fixed, every = len(self.fixed), best.repeat(rows)
        found = parted(self.fixed, every)
        for number, selector in enumerate(self.selectors):
            which = (every == fixed + number).nonzero().flatten()
            if len(which):
                (piece,) = selector.pieces(view.flat(which), where)
                found.append(piece.of(which))
        return found


def _by_head(piece: Piece, heads: int) -> Tensor:
    """Share computed, (heads,), the mean over rows."""
    pairs = piece.mask.q_len * piece.mask.k_len
    return (piece.mask.visited().float().mean(0) / pairs).expand(heads)
