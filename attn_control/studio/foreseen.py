"""What a sparse control would do at a size, before anything runs: its mask, its density by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_control.errors import AttnControlError
from attn_control.foresight import expected
from attn_control.masks.block import BlockMask
from attn_control.masks.draw import draw
from attn_control.masks.place import Place
from attn_control.processors import build_control
from attn_control.processors.sparse import SparseControl
from attn_control.studio.facts import Facts
from attn_control.studio.page import Page
from attn_control.studio.settings import Refused


@dataclass(frozen=True)
class Foreseen:
    """One sparse control of the page.

    Attributes:
        mask: None where queries and keys decide it while it runs, or where `place` is None.
        place: the tokens, without text; None where those of layers differ, as a U-Net's do.
        outcomes, densities: of each step, as in ``StepPolicy``, and the mean density over layers.
        amortised: the mean over all steps; None where it is not known.
    """

    control: str
    mask: BlockMask | None
    place: Place | None
    outcomes: Sequence[str]
    densities: Sequence[float | None]
    amortised: float | None
    bound: str

    def picture(self, width: int = 420) -> Any:
        """The mask drawn as PIL RGB; queries downwards, white is off."""
        return None if self.mask is None else draw(self.mask, width=width)


def check(page: Page, facts: Facts) -> None:
    """Refuse sparse controls that cannot act at this size or on this model, before any run.

    Raises:
        Refused: at the control's section.
    """
    for _ in _sparse(page, facts):
        pass


def foresee(page: Page, facts: Facts) -> list[Foreseen]:
    """Every sparse control of a page, in its order.

    Raises:
        Refused: at the control's section, where it cannot act at this size or on this model.
    """
    found = []
    for name, control, place, due, sites in _sparse(page, facts):
        try:
            found.append(_foresee(name, control, place, due, page.steps, sites))
        except AttnControlError as error:
            raise Refused(name, str(error)) from None
    return found


def _sparse(page: Page, facts: Facts) -> Iterator[tuple[str, SparseControl, Any, list[int], Any]]:
    """Name, control, tokens, steps of its window, and how many sites it chooses and spares."""
    tokens = facts.tokens(page.height, page.width, page.frames)
    place = None if tokens is None else Place(tokens)
    for name, options in page.controls:
        control = build_control(name, options)
        if not isinstance(control, SparseControl):
            continue
        try:
            chosen, spared = control.select(facts.sites), control.spares(facts.sites)
            if place is not None:
                control.check_place(next(iter(chosen)), place)
            due = [
                step
                for step in range(page.steps)
                if control.when.kind == "sigma" or control.when.contains(step / page.steps)
            ]
            control.refuse_run(due, list(range(page.steps)))
        except AttnControlError as error:
            raise Refused(name, str(error)) from None
        yield name, control, place, due, (len(chosen), len(spared))


def _foresee(
    name: str,
    control: SparseControl,
    place: Place | None,
    due: list[int],
    steps: int,
    sites: tuple[int, int],
) -> Foreseen:
    chosen, spared = sites
    plan = expected(control, due, list(range(steps)), place, chosen + spared, spared)
    made = None
    if place is not None:
        made = getattr(control.pattern(place, torch.device("cpu")), "made", None)
    return Foreseen(
        control=name,
        mask=made[0].mask if made else None,
        place=place,
        outcomes=plan.outcomes,
        densities=plan.densities,
        amortised=plan.amortised,
        bound=plan.bound,
    )
