"""The base of methods that guide: by the difference to a perturbed prediction, and how it is
combined.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from attn_control.processors.control import Control, number


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
    """

    parallel: float = field(default=1.0, kw_only=True)
    limit: float | None = field(default=None, kw_only=True)
    rescale: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = f"{type(self).__name__}(heads={self.heads!r})"
        number(owner, "parallel", self.parallel, 0.0, 1.0)
        number(owner, "rescale", self.rescale, 0.0, 1.0)
        if self.limit is not None:
            number(owner, "limit", self.limit, 0.0)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("branch", *super().needs)
