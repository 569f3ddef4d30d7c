"""The base of methods that let queries read some of the keys: when, how corrected, and where."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attn_control.call import Layout, Site, Step
from attn_control.errors import AttnControlError
from attn_control.kernels.corrections import CORRECTIONS
from attn_control.kernels.pieces import shares
from attn_control.kernels.sparse import Fixed, Pattern, SparseSoftmax
from attn_control.masks.block import BlockMask
from attn_control.masks.check import TileError
from attn_control.masks.place import Place
from attn_control.plan import Part, PlanBuilder
from attn_control.policy import StepPolicy
from attn_control.processors.control import Control, number, one_of, whole
from attn_control.select import parse_heads

RHO_GAIN = 0.04
QUARTER = 0.25
"""Share of the pairs that is computed where nothing is said of it."""


@dataclass(frozen=True)
class SparseControl(Control):
    """Queries of a picture or video read a part of its keys. Text, references and padding read all
    and are read by all; the model's own mask of padding stays in force.

    Args:
        heads: selector of self- or joint-attention heads.
        policy: a `StepPolicy`, or a dict of its options: dense steps and layers, refreshes.
        correction: what stands for the keys that are left out: "none", "share" (between refreshes
            nothing is computed at all and the mask decides nothing: the baseline), "residual",
            "rho" or "lse"; see ``kernels.corrections``.
        rho_gain: by how much "rho" lets the sparse part's share grow a level.
        block: tokens a block, a multiple of 32 where the mask cuts through blocks; None: 128 from
            16,384 tokens up, 64 from 1,024, else 32.

    Raises:
        AttnControlError: a value out of range, tokens without a known grid.
    """

    heads: str = "all"
    policy: StepPolicy = field(default=StepPolicy(), kw_only=True)
    correction: str = field(default="residual", kw_only=True)
    rho_gain: float = field(default=RHO_GAIN, kw_only=True)
    block: int | None = field(default=None, kw_only=True)

    sparse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = self.owner
        object.__setattr__(self, "policy", StepPolicy.of(owner, self.policy))
        one_of(owner, "correction", self.correction, tuple(CORRECTIONS))
        number(owner, "rho_gain", self.rho_gain, 0.0, 1.0)
        if self.rho_gain != RHO_GAIN and self.correction != "rho":
            raise AttnControlError(
                f"{owner}: rho_gain={self.rho_gain!r} has no meaning with"
                f" correction={self.correction!r}; expected correction='rho'"
            )
        if self.block is not None:
            whole(owner, "block", self.block, 8)
        if self.policy.layers and any(t.heads for t in parse_heads(self.policy.layers).terms):
            raise AttnControlError(
                f"{owner}: policy.layers={self.policy.layers!r} names heads; expected layers, such"
                " as 'L0-1'"
            )

    @property
    def owner(self) -> str:
        """How errors about its options name it."""
        return f"{type(self).__name__}(heads={self.heads!r})"

    # ---- what a method says

    @abstractmethod
    def pattern(self, place: Place, device: torch.device) -> Pattern:
        """Its masks for a geometry. Raises AttnControlError where it has none."""

    def built(self, place: Place, device: torch.device) -> Pattern:
        """`pattern`, with errors of the functions that make masks told as this control's."""
        try:
            return self.pattern(place, device)
        except TileError as error:
            raise AttnControlError(
                f"{self}: block={self.block} does not fit {place.shape} tokens, whose mask cuts"
                f" through blocks; expected a multiple of {error.unit}, or None"
            ) from error
        except AttnControlError as error:
            if str(error).startswith(type(self).__name__):
                raise
            raise AttnControlError(f"{self}: {error}") from error

    @property
    def fixed(self) -> bool:
        """Whether its masks depend on the geometry alone."""
        return True

    @property
    def selects(self) -> bool:
        """Whether its masks are chosen at refreshes, from queries and keys."""
        return False

    def expect(self, place: Place) -> tuple[float, float] | None:
        """Density of its mask, and share of pairs that it computes; None where they are not known
        before queries and keys are. About so much where those have a say.
        """
        pattern = self.built(place, torch.device("cpu"))
        if not isinstance(pattern, Fixed):
            return None
        return shares(pattern.made, 1)

    # ---- what all share

    @property
    def keeps(self) -> bool:
        """Whether something is kept from one step to the next."""
        return self.selects or CORRECTIONS[self.correction].keeps

    @property
    def needs(self) -> tuple[str, ...]:
        step = ("step",) if self.keeps or self.policy.counts or not self.when.always else ()
        return ("branch", *step, "layout")

    def select(self, sites: Iterable[Site]) -> dict[Site, tuple[int, ...]]:
        """As `Control.select`, without the layers that its policy keeps dense."""
        sites = list(sites)
        chosen = super().select(sites)
        if self.policy.layers:
            layers = parse_heads(self.policy.layers)
            layers.resolve(sites, slots=self.allowed, who=f"{self}: policy.layers")
        spared = self.spares(sites)
        left = {site: heads for site, heads in chosen.items() if site not in spared}
        if not left:
            raise AttnControlError(
                f"{self}: policy.layers={self.policy.layers!r} keeps every selected layer dense"
            )
        return left

    def spares(self, sites: Iterable[Site]) -> set[Site]:
        if not self.policy.layers:
            return set()
        layers = parse_heads(self.policy.layers)
        return {
            site
            for site in sites
            if layers.heads_of(site, self.allowed) and self.selector.heads_of(site, self.slots)
        }

    def stays_dense(self, step: Step) -> bool:
        if self.keeps and step.level is None:
            raise AttnControlError(
                f"{self}: keeps what it computed from one step to the next, but the sampler is not"
                " known here; attach to the whole pipeline, or use correction='none' and a mask of"
                " its own at each step"
            )
        return self.policy.stays_dense(step, str(self))

    def refuse_run(self, due: Sequence[int], levels: Sequence[int]) -> None:
        self.policy.refuse_empty(levels[-1] + 1, str(self))
        total = levels[-1] + 1
        if self.policy.counts and not any(self.policy.covers(levels[n], total) for n in due):
            raise AttnControlError(
                f"{self}: its policy keeps every step of window {self.window!r} dense"
            )

    def place(self, layout: Layout) -> Any:
        """The geometry that its methods are given. Raises AttnControlError if there is none."""
        return Place.of(layout)

    def check(self, site: Site, layout: Layout) -> None:
        try:
            place = self.place(layout)
        except AttnControlError as error:
            raise AttnControlError(f"{self}: cannot act at {site.label}: {error}") from None
        self.check_place(site, place)

    def check_place(self, site: Site, place: Place) -> None:
        """Refuse a geometry that the method does not fit."""

    def contribute(
        self,
        builder: PlanBuilder,
        number: int,
        layout: Layout | None,
        heads: tuple[int, ...],
        rows: tuple[int, int] | None,
    ) -> None:
        assert layout is not None
        place, records = self.place(layout), builder.records
        ledger = records.ledgers[number]
        ledger.place = place
        if place.length < self.policy.min_tokens:
            ledger.spared.add(builder.site)
            ledger.note(
                f"calls of {place.length} tokens, fewer than min_tokens={self.policy.min_tokens};"
                " they stay dense"
            )
            return
        ledger.spared.discard(builder.site)
        key = (number, place, str(builder.device))
        pattern = records.memory.shared(key, lambda: self.built(place, builder.device))
        softmax = SparseSoftmax(
            number,
            str(self),
            builder.site,
            heads,
            pattern,
            CORRECTIONS[self.correction],
            self.policy,
            self.rho_gain,
            records.memory,
            ledger,
            builder.part,
            builder.span,
        )
        builder.add(Part(number, attention=softmax))


def share(owner: str, name: str, value: object) -> None:
    """Refuse anything but a share in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise AttnControlError(
            f"{owner}: {name} must be a share above 0 and up to 1, got {name}={value!r}"
        )


def target(
    owner: str, density: float | None, name: str, value: object, default: object = None
) -> None:
    """Refuse a ``target_density`` that is no share, or that stands beside what it is instead of."""
    if density is None:
        return
    share(owner, "target_density", density)
    if value != default:
        raise AttnControlError(
            f"{owner}: give {name}={value!r} or target_density={density!r}, not both"
        )


def video(control: object, site: Site, place: Place) -> None:
    """Refuse a picture."""
    if place.shape[0] < 2:
        raise AttnControlError(
            f"{control}: {site.label} sees a picture; expected a video of two latent frames or more"
        )


def sizes(
    owner: str, name: str, value: object, low: int, optional: bool = False
) -> tuple[int, ...] | int | None:
    """A whole number from ``low``, or two or three of them, one an axis; lists become tuples."""
    given = tuple(value) if isinstance(value, (list, tuple)) else value
    each = given if isinstance(given, tuple) else (given,)
    right = all(type(n) is int and n >= low for n in each) and len(each) in (1, 2, 3)
    if (given is None and optional) or right:
        return given  # type: ignore[return-value]
    raise AttnControlError(
        f"{owner}: {name} must be a whole number from {low}, or one an axis, got {name}={value!r}"
    )


def along(owner: object, name: str, value: int | tuple[int, ...], place: Place) -> tuple[int, ...]:
    """One value for each of a geometry's axes that are longer than one token, none larger than the
    axis. Three values are of frames, height and width, two of height and width.
    """
    return tuple(min(n, place.shape[a]) for n, a in values(owner, name, value, place))


def values(
    owner: object, name: str, value: int | tuple[int, ...], place: Place
) -> list[tuple[int, int]]:
    """As `along`, each value with its axis, however large."""
    given = value if isinstance(value, tuple) else (value,) * 3
    if len(given) == 1:
        given = given * 3
    first = 3 - len(given)
    if first and 0 in place.axes:
        raise AttnControlError(
            f"{owner}: {name}={value!r} has {len(given)} values; expected one, or one for each of"
            " frames, height and width"
        )
    return [(given[axis - first], axis) for axis in place.axes]


def unmasked(mask: BlockMask) -> BlockMask:
    """The mask, after a look at what its lists hold: no query may be left without keys."""
    return mask.validate(own=False)
