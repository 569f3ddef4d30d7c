"""Place: where a picture stands among other tokens, and how it is cut."""

from __future__ import annotations

import math

import pytest
import torch

from attn_control import AttnControlError
from attn_control.call import Layout
from attn_control.masks.place import Place
from attn_control.processors import SPARSE, ReshapedAttention, TileAttention
from attn_control.processors.sparse import along


def test_what_is_no_picture_stands_before_and_after():
    video = ("video", 24, (2, 3, 4))
    layout = Layout.joint(("text", 5, None), video, ("reference", 7, (1, 1, 7)), ("pad", 3, None))
    assert Place.of(layout) == Place((2, 3, 4), before=5, after=10)
    two = Layout.joint(("image", 4, (1, 2, 2)), ("image", 9, (1, 3, 3)))
    assert Place.of(two) == Place((1, 3, 3), before=4)
    with pytest.raises(AttnControlError, match="are not the same tokens"):
        Place.of(Layout.cross(layout, two))
    with pytest.raises(AttnControlError, match="no frames, rows and columns are known.*8 text"):
        Place.of(Layout.joint(("text", 8, None)))


@pytest.mark.parametrize("shape", [(21, 30, 52), (1, 64, 64), (3, 2, 2), (5, 1, 9), (1, 1, 7)])
@pytest.mark.parametrize("block", [8, 32, 64, 128])
def test_a_box_fills_the_block_as_far_as_the_picture_goes(shape, block):
    place = Place(shape)
    box = place.box(block)
    assert len(box) == len(place.spatial) and math.prod(box) <= block
    assert all(b <= n for b, n in zip(box, place.spatial, strict=True))
    could = [2 * b <= n for b, n in zip(box, place.spatial, strict=True)]
    assert 2 * math.prod(box) > block or not any(could)
    assert Place((21, 30, 52)).box(64) == (4, 4, 4)


def test_values_are_of_frames_height_and_width():
    video, picture, column = Place((4, 6, 8)), Place((1, 6, 8)), Place((4, 6, 1))
    assert along("X", "n", 5, video) == (4, 5, 5)
    assert along("X", "n", (1, 2, 3), video) == (1, 2, 3)
    assert along("X", "n", (1, 2, 3), picture) == along("X", "n", (2, 3), picture) == (2, 3)
    assert along("X", "n", (1, 2, 3), column) == (1, 2)
    with pytest.raises(AttnControlError, match="X: n=.2, 3. has 2 values"):
        along("X", "n", (2, 3), video)


@pytest.mark.parametrize("shape", [(4, 7, 1), (9, 1, 11), (5, 3, 17), (13, 19, 5)])
@pytest.mark.parametrize("cls", SPARSE, ids=lambda cls: cls.__name__)
def test_any_size_has_masks_that_leave_no_query_without_keys(cls, shape):
    place = Place(shape, before=3, after=6)
    control = cls(**({"target_density": 1.0} if hasattr(cls, "target_density") else {}))
    pattern = control.pattern(place, "cpu")
    made = [*getattr(pattern, "made", ()), *getattr(pattern, "candidates", ())]
    for piece in [*made, *getattr(pattern, "fixed", ())]:
        piece.mask.validate(own=False)
        assert piece.mask.q_len == place.length


@pytest.mark.parametrize("shape, block", [((32, 16, 16), 32), ((9, 16, 16), 32), ((5, 7, 6), 64)])
def test_a_band_of_every_frame_is_laid_so_that_blocks_fill(shape, block):
    """The pairs are those of the definition, token by token; what is computed is little more."""
    frames, height, width = shape
    place = Place(shape, before=3, after=2)
    (piece,) = ReshapedAttention(width=0.125, block=block).pattern(place, torch.device("cpu")).made
    own = torch.arange(frames * height * width)
    within = own % (height * width)
    reach = height * width // 8 // 2
    expected = torch.ones(place.length, place.length, dtype=torch.bool)
    expected[3:-2, 3:-2] = (within[:, None] - within[None]).abs() <= reach
    found = torch.zeros_like(expected)
    found[piece.order[:, None], piece.order[None]] = piece.mask.to_dense()[0, 0]
    assert torch.equal(found, expected)
    if frames >= 9:
        assert piece.computed < 1.2 * piece.density


def test_the_densest_that_fits_is_found():
    place = Place((8, 24, 24))
    for target in (0.05, 0.2, 0.6, 1.0):
        (piece,) = TileAttention(target_density=target).pattern(place, "cpu").made
        assert piece.computed <= target
    found = [TileAttention(target_density=t).pattern(place, "cpu").made[0].computed
             for t in (0.05, 0.2, 0.6, 1.0)]  # fmt: skip
    assert found == sorted(set(found)) and found[-1] == 1
