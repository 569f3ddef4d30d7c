"""Which keys a query reads along one axis: intervals for each place, so that axes may be long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attn_control.errors import AttnControlError


@dataclass(frozen=True, eq=False)
class Relation:
    """Query place x reads key place y if an interval of x holds y, and y is on x's raster.

    Attributes:
        start, stop: int64 (intervals, places of queries): half-open; may reach past the ends.
        keys: places of keys.
        step: y counts only if ``y % step == phase[x]``.
        phase: int64 (places of queries,).
    """

    start: np.ndarray
    stop: np.ndarray
    keys: int
    step: int = 1
    phase: np.ndarray | None = None

    @property
    def queries(self) -> int:
        return self.start.shape[1]

    @property
    def moves(self) -> bool:
        """Whether every place reads the same distances: a pair of places is as any other so far
        apart.
        """
        x = np.arange(self.queries)
        edges = np.concatenate([self.start, self.stop]) - x
        return self.phase is None and bool((edges == edges[:, :1]).all())

    def reads(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """bool, of places that broadcast."""
        found = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
        for start, stop in zip(self.start, self.stop, strict=True):
            found |= (y >= start[x]) & (y < stop[x])
        if self.phase is not None:
            found &= y % self.step == self.phase[x]
        return found

    def table(self) -> np.ndarray:
        """bool (queries, keys): for short axes."""
        return self.reads(np.arange(self.queries)[:, None], np.arange(self.keys))


def everything(places: int, keys: int | None = None) -> Relation:
    """Every key."""
    keys = places if keys is None else keys
    return Relation(np.zeros((1, places), np.int64), np.full((1, places), keys), keys)


def within(places: int, reach: int) -> Relation:
    """Keys at most ``reach`` away, fewer at the borders."""
    x = np.arange(places)[None]
    return Relation(x - reach, x + reach + 1, places)


def first(places: int, count: int) -> Relation:
    """The first ``count`` keys."""
    stop = np.full((1, places), min(count, places))
    return Relation(np.zeros((1, places), np.int64), stop, places)


def anchors(places: int, step: int, offset: int) -> Relation:
    """Each ``step``-th key, from ``offset`` on."""
    whole = everything(places)
    return Relation(whole.start, whole.stop, places, step, np.full(places, offset % step))


def natten(places: int, kernel: int, stride: int, dilation: int, causal: bool) -> Relation:
    """The neighbourhood of NATTEN (Generalized Neighborhood Attention, arXiv 2504.16922): always
    ``kernel`` keys, the window moved inwards at the borders; ``stride`` queries share one.

    A causal window ends at its query; near the beginning it holds fewer.
    """
    x = np.arange(places)
    group, place = x % dilation, x // dilation
    length = places // dilation + (group < places % dilation)  # of the query's dilation group
    begin = place // stride * stride
    if causal:
        leader = np.minimum(begin + stride - 1, length - 1)
        start, last = np.maximum(leader - kernel + 1, 0), place
    else:
        leader = begin + stride // 2  # perhaps past the end, where windows are moved inwards
        start = np.clip(leader - kernel // 2, 0, length - kernel)
        last = start + kernel - 1
    bounds = (group + dilation * start)[None], (group + dilation * last + 1)[None]
    return Relation(*bounds, places, dilation, group if dilation > 1 else None)


def tiles(places: int, extent: int, window: int) -> Relation:
    """The ``window`` tiles of ``extent`` keys around the query's own, moved inwards at the borders
    (Sliding Tile Attention, arXiv 2502.04507).
    """
    count = -(-places // extent)
    own = np.arange(places) // extent
    start = np.clip(own - window // 2, 0, max(count - window, 0))
    stop = np.minimum((start + min(window, count)) * extent, places)
    return Relation((start * extent)[None], stop[None], places)


def powers(places: int, unit: int, near: int) -> Relation:
    """Keys whose distance in units is 0, a power of two, or at most ``near``, on either side
    (PowerAttention, arXiv 2503.03588, which is causal).
    """
    units = -(-places // unit)
    own = np.arange(places) // unit
    spans = [(-near, near)]
    reach = 1
    while reach < units:
        spans += [(-reach, -reach), (reach, reach)]
        reach *= 2
    low, high = np.array(spans)[:, 0, None], np.array(spans)[:, 1, None]
    start = np.clip((own + low) * unit, 0, places)
    stop = np.clip((own + high + 1) * unit, 0, places)
    return Relation(start, stop, places)


def check_natten(
    owner: str, places: int, kernel: int, stride: int, dilation: int, axis: int
) -> None:
    """What NATTEN refuses, refused."""
    where = f"{owner}: axis {axis} of {places} tokens: "
    if kernel < 2:
        raise AttnControlError(f"{where}kernel_size={kernel} has to be at least 2")
    if not 1 <= stride <= kernel:
        raise AttnControlError(f"{where}stride={stride} is not in 1..kernel_size={kernel}")
    if dilation < 1:
        raise AttnControlError(f"{where}dilation={dilation} has to be at least 1")
    if kernel * dilation > places:
        raise AttnControlError(
            f"{where}kernel_size={kernel} x dilation={dilation} is longer than the axis"
        )
