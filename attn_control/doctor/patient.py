"""One denoiser with a call of it: what the checks share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attn_control import attach
from attn_control.call import Layout, Site, sample_of
from attn_control.doctor.finding import Skipped
from attn_control.doctor.subject import copied
from attn_control.doctor.watch import Softmax, softmaxes
from attn_control.families import EVERY, Family, unwrap
from attn_control.processors import Control, SoftPAG


@dataclass
class Patient:
    """A denoiser, its family's row, and the arguments of one call at a small size.

    Attributes:
        sites: as attach names them.
        seen: softmaxes by module in a plain call, in order of execution; shapes alone.
        plain: the prediction of that call; steady: whether a second call gives the same bits, in
            how many seconds.
    """

    component: str
    model: nn.Module
    family: Family
    call: dict[str, Any]
    sites: list[Site] = field(default_factory=list)
    seen: dict[str, list[Softmax]] = field(default_factory=dict)
    plain: Tensor = field(default_factory=lambda: torch.empty(0))
    steady: bool = True
    seconds: float = 0.0

    @torch.no_grad()
    def predict(self, call: dict[str, Any] | None = None) -> Tensor:
        """The prediction, on the CPU."""
        output = self.model(**copied(self.call if call is None else call))
        return sample_of(output).detach().to("cpu", copy=True)

    def under(self, *controls: Control) -> Tensor:
        """The prediction under controls."""
        with attach(self.model, *controls, strict=True):
            return self.predict()

    def watched(
        self,
        *controls: Control,
        keep: tuple[str, ...] = (),
        call: dict[str, Any] | None = None,
        attached: bool = True,
    ) -> dict[str, list[Softmax]]:
        """All softmaxes of a call, under controls if there are any."""
        session: AbstractContextManager[Any] = (
            attach(self.model, *controls, strict=True) if attached else nullcontext()
        )
        with session, softmaxes(unwrap(self.model), keep) as seen:
            self.predict(call)
        return seen

    def layout(self, site: Site) -> Layout | None:
        """The tokens of a site, as the package believes them to stand; None where it makes
        several softmaxes a call.
        """
        if self.family.layout is None:
            return None
        found = self.family.layout(site, self.call, self.model)
        return found if isinstance(found, Layout) else None

    def main(self, site: Site) -> list[int]:
        """Which of a site's softmaxes in one forward a control changes."""
        parts = self.family.parts(site)
        count = len(self.seen.get(site.name, ()))
        if parts == EVERY:
            return list(range(count))
        return [parts.index("main")] if count else []

    def guides(self, site: Site) -> bool:
        """Whether SoftPAG can guide at a site: rows are the batch's, and attend to themselves."""
        calls = [self.seen[site.name][index] for index in self.main(site)]
        own = all(call.q.shape[2] == call.k.shape[2] for call in calls)
        return site.slot in SoftPAG.allowed and bool(calls) and own and not self.family.folded

    def same(self, got: Tensor, what: str) -> str | None:
        """What is wrong if a prediction has not the bits of the plain one.

        Raises:
            Skipped: two plain predictions differ already, so that bits cannot be compared.
        """
        if not self.steady:
            raise Skipped("two plain calls of this model give different bits here")
        if got.shape == self.plain.shape and torch.equal(got, self.plain):
            return None
        if got.shape != self.plain.shape:
            return f"{what}: the shape is {tuple(got.shape)}, plain {tuple(self.plain.shape)}"
        apart = (got.double() - self.plain.double()).abs().max().item()
        return f"{what}: differs from the plain prediction by up to {apart:.3g}"


Check = Callable[[Patient], Any]
