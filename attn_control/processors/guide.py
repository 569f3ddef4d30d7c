"""The base of methods that guide: by the difference to a perturbed prediction, and how it is
combined.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from attn_control.errors import AttnControlError
from attn_control.processors.control import Control, number

_COMBINE = ("scale", "parallel", "limit", "rescale", "batched")


@dataclass(frozen=True)
class Guide(Control):
    """``pred + combine(scale * (cond - perturbed))``, on top of whatever guidance the pipeline
    makes.

    Args:
        parallel: share kept of the difference's component along the prediction: 1 keeps all, 0 is
            the projection of APG (arXiv 2410.02416).
        limit: largest norm of the difference relative to the prediction's, per row; None: none.
        rescale: share of the guided prediction that is brought back to the spread of the unguided
            one (arXiv 2305.08891), 0 to 1.
        fused: perturb the negative pass of classifier-free guidance instead, so that nothing runs
            a second time: ``n' + s (cond - n')``, with the pipeline's own ``s`` in place of a scale
            and a combine. Refused in runs without a negative pass.
        batched: run the perturbed rows in the pipeline's own forward, three rows instead of two and
            then one: half as much memory again, and less time where a forward of few rows does not
            fill the machine. Changes no result but in rounding.
    """

    parallel: float = field(default=1.0, kw_only=True)
    limit: float | None = field(default=None, kw_only=True)
    rescale: float = field(default=0.0, kw_only=True)
    fused: bool = field(default=False, kw_only=True)
    batched: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = f"{type(self).__name__}(heads={self.heads!r})"
        number(owner, "parallel", self.parallel, 0.0, 1.0)
        number(owner, "rescale", self.rescale, 0.0, 1.0)
        if self.limit is not None:
            number(owner, "limit", self.limit, 0.0)
        for name in ("fused", "batched"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise AttnControlError(f"{owner}: {name} must be True or False, got {value!r}")
        if self.fused:
            self._refuse(_COMBINE, "fused=True, where the pipeline's own guidance combines")

    def _refuse(self, names: tuple[str, ...], company: str) -> None:
        """Refuse options that would be accepted and ignored."""
        defaults = {f.name: f.default for f in fields(self)}
        for name in names:
            value = getattr(self, name)
            if value != defaults[name]:
                raise AttnControlError(
                    f"{type(self).__name__}(heads={self.heads!r}): {name}={value!r} has no meaning"
                    f" with {company}"
                )

    @property
    def rides(self) -> bool:
        return self.batched

    @property
    def branch(self) -> str | None:
        return "uncond" if self.fused else super().branch

    @property
    def needs(self) -> tuple[str, ...]:
        return ("branch", *super().needs)
