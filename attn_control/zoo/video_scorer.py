"""The exact scorer of MovingShapes: what every frame shows, where the mover goes, what is in front.

Frames in which the two objects are apart are judged by the pictures' own scorer. Where they meet,
in one run of frames between two that show them apart, the one in front must be whole and the other
cut. The numbers below were frozen before any model was trained; `video_error.py` measures their
error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_control.errors import AttnControlError
from attn_control.zoo.scenes import BACKGROUNDS, COLOURS
from attn_control.zoo.scorer import FoundObject, as_array, find_objects, shape_of
from attn_control.zoo.videos import DIRECTIONS, VideoSpec, parse_video

_WORK = 256  # pixels a side while scoring
_TRAVEL = 0.25  # least way of a mover along its direction (share of the side)
_STRAIGHT = 2.0  # the way along the direction, over the way across it
_STILL = 0.12  # most that what stands still may wander (share of the side)
_MOST = 0.7  # share of the frames for what must hold in most of them
_WHOLE = 0.8  # least overlap of the one in front with its ideal shape
_CUT = (0.05, 0.85)  # the share of itself that the one behind shows in some frame: cut, not gone
_MET = 0.7  # least share of a meeting's foreground in one of the two colours
_COLOUR = 60.0  # largest RGB distance to a palette colour


@dataclass(frozen=True)
class VideoScore:
    """How a video answers a caption.

    frames: share of the frames whose objects have the right colours and shapes (frames in which
    the two meet: the right colours, and the one in front whole); direction: the mover goes where
    it should, and only it moves; crossing: it passes behind or in front as asked (true where the
    caption says nothing); background: in most frames; right: all of it, in most frames.
    """

    frames: float
    direction: bool
    crossing: bool
    background: bool
    right: bool


def score_video(frames: Any, caption: str) -> VideoScore:
    """Score frames (a list of PIL images, or uint8 (frames, H, W, 3)) against a caption.

    Raises AttnControlError for captions outside the grammar, fewer than five frames, other arrays.
    """
    spec = parse_video(caption)
    if len(frames) < 5:
        raise AttnControlError(f"score_video wants at least 5 frames, got {len(frames)}")
    pictures = [as_array(frame) for frame in frames]
    seen = [find_objects(picture) for picture in pictures]
    wanted = [spec.mover] + ([spec.still] if spec.still is not None else [])
    apart = [_exactly(found, wanted) for _, found in seen]
    meeting = _meeting(apart) if spec.still is not None else []
    met = {i: _meet(pictures[i], spec) for i in meeting}
    shares = [a is not None or (i in met and met[i][0]) for i, a in enumerate(apart)]
    paths = {
        k: [(i, a[k]) for i, a in enumerate(apart) if a is not None] for k in range(len(wanted))
    }
    direction = _goes(paths[0], spec.direction)
    if spec.still is not None:
        direction = direction and _stays(paths[1])
    crossing = spec.still is None or _crosses(spec, apart, meeting, met)
    grounds = [ground == spec.background for ground, _ in seen]
    background = spec.background is None or float(np.mean(grounds)) >= _MOST
    share = float(np.mean(shares))
    right = share >= _MOST and direction and crossing and background
    return VideoScore(share, direction, crossing, background, right)


def _exactly(
    found: tuple[FoundObject, ...], wanted: list[tuple[str, str] | None]
) -> list[FoundObject] | None:
    """The objects in the order of `wanted` where a frame shows just these, else None."""
    if len(found) != len(wanted):
        return None
    by_pair = {(o.colour, o.shape): o for o in found}
    got = [by_pair.get(pair) for pair in wanted]  # type: ignore[arg-type]
    return [o for o in got if o is not None] if all(got) else None


def _meeting(apart: list[list[FoundObject] | None]) -> list[int]:
    """The longest run of frames between two that show the objects apart, on the mover's way."""
    shown = [i for i, a in enumerate(apart) if a is not None]
    runs = [list(range(a + 1, b)) for a, b in zip(shown, shown[1:], strict=False)]
    return max(runs, key=len, default=[])


def _meet(picture: np.ndarray, spec: VideoSpec) -> tuple[bool, float]:
    """Of a frame where the two meet: whether it is as asked, and the hind one's area (shares)."""
    import cv2

    rgb = cv2.resize(picture, (_WORK, _WORK), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    names = [*COLOURS, *BACKGROUNDS]
    palette = np.asarray([*COLOURS.values(), *BACKGROUNDS.values()], np.float32)
    distances = np.linalg.norm(rgb[:, :, None] - palette, axis=-1)
    nearest = np.where(distances.min(-1) <= _COLOUR, distances.argmin(-1), -1)
    mover, still = spec.mover, spec.still or spec.mover
    front, behind = (still, mover) if spec.crossing == "behind" else (mover, still)
    masks = [nearest == names.index(pair[0]) for pair in (front, behind)]
    others = (nearest < len(COLOURS)) & (nearest >= 0) & ~masks[0] & ~masks[1]
    kernel = np.ones((5, 5), np.uint8)  # blends at edges are near other colours, but thin
    others = cv2.erode(others.astype(np.uint8), kernel)
    foreground = masks[0].sum() + masks[1].sum()
    pure = foreground >= _MET * (foreground + 4 * others.sum())
    piece = _largest(masks[0])
    ys, xs = np.nonzero(piece)
    if not len(ys):
        return False, 0.0
    shape, iou = shape_of(piece[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])
    whole = shape == front[1] and iou >= _WHOLE
    return bool(pure and whole), float(masks[1].sum()) / _WORK**2


def _largest(mask: np.ndarray) -> np.ndarray:
    import cv2

    # Antialiased edges leave a rim that belongs to no colour: close it.
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(closed, connectivity=4)
    if count < 2:
        return np.zeros_like(mask)
    return labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())


def _goes(path: list[tuple[int, FoundObject]], direction: str) -> bool:
    """Whether a path leads along a direction: far, straight, and forward in most of its steps."""
    if len(path) < 3:
        return False
    xy = np.array([(o.x, o.y) for _, o in path])
    along = np.array(DIRECTIONS[direction], float)
    way, side = xy @ along, xy @ np.abs(along[::-1])
    total = way[-1] - way[0]
    forward = float((np.diff(way) > 0).mean())
    return bool(total >= _TRAVEL and total >= _STRAIGHT * np.ptp(side) and forward >= _MOST)


def _stays(path: list[tuple[int, FoundObject]]) -> bool:
    xy = np.array([(o.x, o.y) for _, o in path])
    return len(xy) > 0 and float(np.ptp(xy, 0).max()) <= _STILL


def _crosses(
    spec: VideoSpec,
    apart: list[list[FoundObject] | None],
    meeting: list[int],
    met: dict[int, tuple[bool, float]],
) -> bool:
    """Whether the mover is on one side before the meeting and on the other after it, and whether
    the meeting shows in most frames the one in front whole and at some time the other cut."""
    if not meeting:
        return False
    along = np.array(DIRECTIONS[spec.direction], float)
    ends = [apart[meeting[0] - 1], apart[meeting[-1] + 1]]
    assert ends[0] is not None and ends[1] is not None  # by the meaning of a meeting
    before, after = ((np.array([a.x - b.x, a.y - b.y]) @ along) for a, b in ends)
    hind = 0 if spec.crossing == "behind" else 1
    full = float(np.median([a[hind].area for a in apart if a is not None]))
    ordered = float(np.mean([met[i][0] for i in meeting])) >= _MOST
    cut = any(_CUT[0] * full <= met[i][1] <= _CUT[1] * full for i in meeting)
    return bool(before < 0 < after and ordered and cut)
