"""Place: where the picture or video stands among the tokens of a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_control.call import Layout
from attn_control.errors import AttnControlError
from attn_control.masks.grid import Grid


def suited(length: int) -> int:
    """Tokens a block for so many: 128 from 16,384 up, 64 from 1,024, else 32."""
    return 128 if length >= 16384 else 64 if length >= 1024 else 32


@dataclass(frozen=True)
class Place:
    """Tokens of one picture or video, between others that every query reads and that read all.

    shape: (frames, height, width); a picture has one frame. before, after: tokens of any other kind
    (text, padding, references) in front of it and behind it.
    """

    shape: tuple[int, int, int]
    before: int = 0
    after: int = 0

    @classmethod
    def of(cls, layout: Layout) -> Place:
        """Of the largest picture or video among the tokens.

        Raises:
            AttnControlError: queries and keys are not the same tokens; no grid is known.
        """
        if not layout.is_self:
            raise AttnControlError("its queries and keys are not the same tokens")
        grids = [s for s in layout.q if s.grid is not None and s.role in ("image", "video")]
        if not grids:
            roles = ", ".join(f"{s.length} {s.role}" for s in layout.q)
            raise AttnControlError(f"no frames, rows and columns are known of its tokens ({roles})")
        found = max(grids, key=lambda segment: segment.length)
        assert found.grid is not None
        return cls(found.grid, found.start, layout.q_len - found.stop)

    @property
    def tokens(self) -> int:
        f, h, w = self.shape
        return f * h * w

    @property
    def length(self) -> int:
        return self.before + self.tokens + self.after

    @property
    def axes(self) -> tuple[int, ...]:
        """Which of frames, height and width are longer than one token; width, if none is."""
        return tuple(axis for axis, size in enumerate(self.shape) if size > 1) or (2,)

    @property
    def spatial(self) -> tuple[int, ...]:
        """Sizes of its `axes`: (frames, height, width) of a video, (height, width) of a picture."""
        return tuple(self.shape[axis] for axis in self.axes)

    def block(self, given: int | None) -> int:
        """Tokens a block: as given, or what suits the length."""
        return suited(self.length) if given is None else given

    def box(self, block: int) -> tuple[int, ...]:
        """A tile of at most ``block`` tokens, as near to a cube as powers of two allow, and no
        longer along an axis than the picture.
        """
        sizes = [1] * len(self.spatial)
        while True:
            # The shortest side that can still grow; of equal ones the last, which is a row.
            free = [
                (size, -axis, axis)
                for axis, size in enumerate(sizes)
                if 2 * size <= max(1, self.spatial[axis])
            ]
            total = 2
            for size in sizes:
                total *= size
            if not free or total > block:
                return tuple(sizes)
            sizes[min(free)[2]] *= 2

    def time_first(self) -> torch.Tensor:
        """int64 (length,): its tokens place by place, and at each place frame by frame; what is
        before and after stays where it is.
        """
        before, own, after = torch.arange(self.length).split([self.before, self.tokens, self.after])
        return torch.cat([before, own.view(self.shape).permute(1, 2, 0).flatten(), after])

    def grid(self, block: int, tile: tuple[int, ...] | None = None) -> Grid:
        """Its tokens in raster order, or in tiles."""
        return Grid(self.spatial, block, tile, before=self.before, after=self.after)
