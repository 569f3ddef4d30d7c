"""Heads that look around in their frame, and heads that look along time (Sparse VideoGen, arXiv
2502.01776, which finds out head by head which of the two a head is).
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_control.errors import AttnControlError
from attn_control.masks import relations
from attn_control.masks.block import BlockMask
from attn_control.masks.combine import per_head
from attn_control.masks.grid import Grid
from attn_control.masks.products import product
from attn_control.masks.say import at_least, each


def spatial_mask(shape: Grid | Sequence[int], frames: int = 0) -> BlockMask:
    """A query's own frame, whole, and ``frames`` on either side."""
    grid = _video("spatial_mask", shape)
    at_least("spatial_mask", "frames", frames, 0)
    return product(grid, {0: relations.within(grid.shape[0], frames)})


def temporal_mask(shape: Grid | Sequence[int], reach: int | Sequence[int] = 0) -> BlockMask:
    """A query's place in all frames, and what is within ``reach`` of it along each axis of a
    frame.
    """
    grid = _video("temporal_mask", shape)
    reaches = each("temporal_mask", "reach", reach, len(grid.shape) - 1)
    for given in reaches:
        at_least("temporal_mask", "reach", given, 0)
    return product(
        grid, {a: relations.within(grid.shape[a], r) for a, r in enumerate(reaches, start=1)}
    )


def spatial_temporal_mask(
    shape: Grid | Sequence[int],
    heads: Sequence[str],
    *,
    frames: int = 1,
    reach: int | Sequence[int] = 1,
) -> BlockMask:
    """One mask a head: "spatial", "temporal", or "both" for their union.

    Args:
        shape: (frames, ...), or a `Grid`.
        heads: what each head is.
        frames: of spatial heads, frames on either side of the own one.
        reach: of temporal heads, tokens on either side along each axis of a frame, one or one an
            axis.

    Raises:
        AttnControlError: no heads, another word, a single axis, a negative size.
    """
    spatial, temporal = spatial_mask(shape, frames), temporal_mask(shape, reach)
    kinds = {"spatial": spatial, "temporal": temporal}
    if "both" in heads:
        kinds["both"] = spatial | temporal
    for head, kind in enumerate(heads):
        if kind not in kinds:
            raise AttnControlError(
                f"spatial_temporal_mask: head {head} is {kind!r}; a head is spatial, temporal or "
                "both"
            )
    return per_head([kinds[kind] for kind in heads])


def _video(owner: str, shape: Grid | Sequence[int]) -> Grid:
    grid = Grid.of(shape)
    if len(grid.shape) < 2:
        raise AttnControlError(f"{owner}: shape={grid.shape} has no frames, only one axis")
    return grid


def main() -> None:
    from attn_control.masks.draw import command

    command(__doc__, lambda grid: spatial_temporal_mask(grid, ["both"]))


if __name__ == "__main__":
    main()
