"""The base of every method: a frozen wish of the user's. It never runs attention."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from attn_control.call import Layout, Site, Step
from attn_control.errors import AttnControlError
from attn_control.plan import PlanBuilder
from attn_control.select import Selector, Window, parse_heads, parse_window

TOKENS = ("all", "image", "video", "text", "reference")


@dataclass(frozen=True)
class Control:
    """What every method shares: the heads it acts on and the steps at which it acts.

    Args:
        heads: selector, e.g. ``"L7H3, L9H11-14"``; ``"L3"`` is every head of block 3.
        window: ``"0-0.25"`` (progress, half-open) or ``"sigma 14-2"``.
    """

    heads: str
    window: str = field(default="0-1", kw_only=True)

    slots: ClassVar[tuple[str, ...]] = ("joint", "self")
    """Where a selector without a slot applies."""

    allowed: ClassVar[tuple[str, ...]] = ("joint", "self", "self2")
    """The slots that a selector may name."""

    made_for: ClassVar[Any] = None
    """The preset that a control comes from (see ``catalog``): attach refuses other models."""

    def __post_init__(self) -> None:
        try:
            parse_heads(self.heads)
            parse_window(self.window)
        except AttnControlError as error:
            raise AttnControlError(f"{type(self).__name__}: {error}") from None

    @property
    def selector(self) -> Selector:
        return parse_heads(self.heads)

    @property
    def when(self) -> Window:
        return parse_window(self.window)

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs beyond its site and tensors: of "branch", "step", "layout"."""
        return () if self.when.always else ("step",)

    @property
    def idle(self) -> str | None:
        """Why it asks for nothing (say u = 0), or None. Idle controls never run and never miss."""
        return None

    @property
    def asks(self) -> str:
        """The role of the queries that it changes: "all", or as in its option ``tokens``."""
        return getattr(self, "tokens", "image")

    @property
    def by_row(self) -> bool:
        """Whether each batch row has options of its own."""
        return False

    appends: ClassVar[bool] = False
    """Whether it has the cond rows run a second time, with ``negative_text``."""

    def negative_text(self, text: Tensor) -> Tensor:
        """The other text, for the cond rows' text (rows, tokens, width)."""
        raise NotImplementedError

    @property
    def rides(self) -> bool:
        """Whether its perturbed rows run in the pipeline's own forward, behind the other rows."""
        return False

    @property
    def branch(self) -> str | None:
        """The branch of classifier-free guidance whose rows it changes in place: "cond", "uncond",
        or None for all.
        """
        return None

    sparse: ClassVar[bool] = False
    """Whether it decides which keys its heads read: one control a head then, and a ledger of every
    call.
    """

    reads_text: ClassVar[bool] = False
    """Whether it also acts in language models, whose tokens are text in a line."""

    @property
    def text_only(self) -> bool:
        """Whether it asks for something that only a text has."""
        return False

    def stays_dense(self, step: Step) -> bool:
        """Whether it leaves a step of its window alone."""
        return False

    def spares(self, sites: Iterable[Site]) -> set[Site]:
        """Of all sites those that it selects and then leaves alone."""
        return set()

    def refuse_run(self, due: Sequence[int], levels: Sequence[int]) -> None:
        """Refuse a run in which it would do nothing. due: steps of its window; levels: of all steps
        which of the distinct timesteps they are.
        """

    def sites_at(self, step: Step, sites: Iterable[Site]) -> set[Site]:
        """Of its sites on one model, those at which it acts at a step: all, unless a set is
        drawn.
        """
        return set(sites)

    @property
    def bypass(self) -> str | None:
        """What it skips instead of changing attention: "block", "attention", "feed_forward" or
        None.
        """
        return None

    @property
    def may_vanish(self) -> bool:
        """Whether a perturbation without any effect is legitimate, as with gates under search."""
        return False

    @property
    def guidance_scale(self) -> float | None:
        """The scale, for methods that steer by a perturbed prediction. None: acts in place."""
        return None

    def __str__(self) -> str:
        given = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.repr and getattr(self, f.name) != f.default
        )
        return f"{type(self).__name__}({given})"

    def select(self, sites: Iterable[Site]) -> dict[Site, tuple[int, ...]]:
        """Its sites and their heads. Raises AttnControlError for an item that matches nothing."""
        return self.selector.resolve(sites, slots=self.slots, allowed=self.allowed, who=str(self))

    def check(self, site: Site, layout: Layout) -> None:
        """Refuse a site whose tokens do not fit. Raises AttnControlError with the reason."""

    def contribute(
        self,
        builder: PlanBuilder,
        number: int,
        layout: Layout | None,
        heads: tuple[int, ...],
        rows: tuple[int, int] | None,
    ) -> None:
        """Add this control's parts to the plan of one site. Pure: depends on its arguments only.

        number: of this control among those attached; layout: None when run as a bare processor;
            heads: selected
        heads of this site; rows: half-open batch range, None for every row.
        """
        raise NotImplementedError

    def processors(self, model: Any) -> dict[str, Any]:
        """A fresh dict for diffusers' own ``model.set_attn_processor``.

        Raises:
            AttnControlError: for methods that need a branch, a Step or a Layout, which a processor
                cannot know.
        """
        if self.needs:
            raise AttnControlError(
                f"{self}: needs {' and '.join(self.needs)} information that an attention processor"
                " does not"
                f" have; use: with attach(pipe, {self}): pipe(...)"
            )
        # The one call up the import order: a Control is the user's handle, intercept knows
        # diffusers.
        from attn_control.intercept import processors_for

        return processors_for(model, self)


def number(
    owner: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf
) -> None:
    """Refuse anything but a finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AttnControlError(f"{owner}: {name} must be a number, got {value!r}")
    if not math.isfinite(value) or not low <= value <= high:
        bounds = f"between {low:g} and {high:g}" if math.isfinite(low + high) else "a finite number"
        raise AttnControlError(f"{owner}: {name} must be {bounds}, got {name}={value!r}")


def whole(owner: str, name: str, value: Any, low: int) -> None:
    """Refuse anything but a whole number from ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise AttnControlError(f"{owner}: {name} must be a whole number from {low}, got {value!r}")


def one_of(owner: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse anything but one of the choices."""
    if value not in choices:
        raise AttnControlError(
            f"{owner}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )


def require_tokens(owner: Any, tokens: str, site: Site, layout: Layout) -> None:
    """Refuse a site that has no queries of the role ``tokens``."""
    if not layout.span(tokens):
        roles = ", ".join(dict.fromkeys(s.role for s in layout.q))
        raise AttnControlError(
            f"{owner}: {site.label} has no {tokens!r} tokens among its queries; it has: {roles}"
        )


def span_of(tokens: str, layout: Layout | None) -> tuple[tuple[int, int | None], ...]:
    """Half-open query ranges of a role; "all" needs no layout, and stays valid at any length."""
    if tokens == "all":
        return ((0, None),)
    if layout is None:
        raise AttnControlError(f"tokens={tokens!r} needs a layout, which only attach() provides")
    return layout.span(tokens)
