"""How dense a sparse control's run will be, step by step, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.kernels.corrections import CORRECTIONS
from attn_control.masks.line import Line
from attn_control.masks.place import Place
from attn_control.policy import DENSE, REFRESH
from attn_control.processors.sparse import SparseControl

_SPATIAL = (
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
    "vae_spatial_scale_factor",
    "vae_scale_factor",
)
_TEMPORAL = (
    "vae_scale_factor_temporal",
    "vae_temporal_compression_ratio",
    "vae_temporal_scale_factor",
)


@dataclass(frozen=True)
class Expected:
    """What a sparse control will come to.

    Attributes:
        control: its name; outcomes: of each step, as ``policy`` calls them.
        mask: its density, and the share of pairs that it computes; None where that is not known
            beforehand.
        sites: attention modules it selects; spared: those of them that its policy keeps dense.
        refresh_cost: of a refresh beyond dense attention, where ``mask`` is known.
        bound: what may make it denser than this.
    """

    control: str
    outcomes: list[str]
    mask: tuple[float, float] | None
    sites: int
    spared: int
    shares: bool
    refresh_cost: float
    bound: str = ""

    @property
    def densities(self) -> list[float | None]:
        """Of each step, the mean over layers."""
        return [
            self._mean(1.0 if o in (DENSE, REFRESH) else self._sparse(0)) for o in self.outcomes
        ]

    def _sparse(self, which: int) -> float | None:
        if self.shares:
            return 0.0
        return None if self.mask is None else self.mask[which]

    def _mean(self, density: float | None) -> float | None:
        if density is None:
            return None
        return (self.spared + density * (self.sites - self.spared)) / self.sites

    @property
    def amortised(self) -> float | None:
        """Mean density over all steps and layers."""
        return _mean(self.densities)

    @property
    def computed(self) -> float | None:
        """Work over that of dense attention, with what refreshes compute beside it."""
        extra = {DENSE: 1.0, REFRESH: 1.0 + self.refresh_cost}
        return _mean([self._mean(extra.get(o, self._sparse(1))) for o in self.outcomes])

    def lines(self) -> list[str]:
        from attn_control.report import ranges

        at = {o: [n for n, each in enumerate(self.outcomes) if each == o] for o in self.outcomes}
        known = {n: d for n, d in enumerate(self.densities) if d is not None}
        found = [f"{self.control}: {self.sites} sites, {self.spared} of them always dense"]
        for outcome, steps in at.items():
            density = known.get(steps[0])
            told = "density not known beforehand" if density is None else f"density {density:.3f}"
            found.append(f"  {outcome} at {ranges(steps)}: {told}")
        if self.amortised is None or self.computed is None:
            found.append("  amortised density: not known beforehand")
        else:
            found.append(
                f"  amortised density {self.amortised:.3f}, computed {self.computed:.3f} of dense"
            )
        return [*found, *([f"  {self.bound}"] if self.bound else [])]


def expected(
    control: SparseControl,
    due: Sequence[int],
    levels: Sequence[int],
    place: Place | Line | None,
    sites: int,
    spared: int,
) -> Expected:
    """What a control will come to.

    due: steps of its window; levels: of each step, which of the distinct timesteps it is; place:
    its tokens, None where they are not known; sites, spared: as in `Expected`.
    """
    policy, correction = control.policy, CORRECTIONS[control.correction]
    outcomes = policy.outcomes(levels[-1] + 1, control.keeps, steps=levels, due=due)
    mask = None
    if place is not None:
        small = place.length < policy.min_tokens
        mask = (1.0, 1.0) if small else control.expect(place)
    extra = 0.5 if correction.lse else 0.0
    if correction.keeps and correction.sparse and mask is not None:
        extra += mask[1]
    bounds = ["more refreshes where attention drifts"] if policy.drift is not None else []
    if place is not None and not control.fixed:
        bounds.append("about so much: its masks are chosen while it runs")
    bound = "; ".join(bounds)
    return Expected(
        str(control),
        outcomes,
        mask,
        sites,
        spared,
        correction.keeps and not correction.sparse,
        extra,
        bound,
    )


def place_of(
    pipe: Any, model: Any, height: int | None, width: int | None, num_frames: int | None
) -> Place:
    """The tokens of a picture or video of so many pixels, without text.

    Raises:
        AttnControlError: a size is missing, or the pipeline does not tell its factors.
    """
    if height is None or width is None:
        raise AttnControlError(
            f"preview: expected height and width, got height={height!r}, width={width!r}"
        )
    spatial = _first(pipe, _SPATIAL)
    patch = getattr(model.config, "patch_size", None)
    if spatial is None or patch is None:
        raise AttnControlError(
            "preview: this pipeline does not say how many pixels a token has; expected"
            " grid=(frames, height, width) in tokens instead"
        )
    if isinstance(patch, int):
        patch = (getattr(model.config, "patch_size_t", None) or 1, patch, patch)
    t, h, w = (1, *patch)[-3:]
    latent = getattr(getattr(getattr(pipe, "vae", None), "config", None), "latent_channels", None)
    if latent and getattr(model.config, "in_channels", None) == 4 * latent and (h, w) == (1, 1):
        h = w = 2  # latents are packed before the denoiser sees them
    frames = 1
    if num_frames is not None:
        frames = -(-((num_frames - 1) // (_first(pipe, _TEMPORAL) or 1) + 1) // t)
    return Place((frames, height // spatial // h, width // spatial // w))


def _first(owner: Any, names: Sequence[str]) -> int | None:
    found = (getattr(owner, name, None) for name in names)
    return next((int(value) for value in found if value), None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
