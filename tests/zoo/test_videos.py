"""Moving shapes: the grammar, the sampler, and the scorer on videos that cv2 draws."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from attn_control.errors import AttnControlError
from attn_control.zoo import prompts
from attn_control.zoo.scenes import BACKGROUNDS, COLOURS, HELD_OUT
from attn_control.zoo.video_scorer import score_video
from attn_control.zoo.videos import (
    DIRECTIONS,
    PAIRS,
    SHAPES,
    draw_video,
    parse_video,
    sample_video,
    video_caption,
)

# Fixed before the first training step. A change here would make scores incomparable.
SHA256 = "6b905c7de60343931fee0732a109f90ffd2d6061ee3a56163a144e75ad1b0ddf"


def stamp(image, colour, shape, x, y, r):
    """One shape by cv2's own primitives, places in pixels with four fractional bits."""
    rgb = COLOURS.get(colour, colour)

    def points(*xy):
        return [np.round(np.array(xy) * 16).astype(np.int32)]

    def poly(*xy):
        cv2.fillPoly(image, points(*xy), rgb, cv2.LINE_AA, 4)

    if shape == "circle":
        centre = (round(x * 16), round(y * 16))
        cv2.circle(image, centre, round(r * 16), rgb, -1, cv2.LINE_AA, 4)
    elif shape == "square":
        poly((x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r))
    elif shape == "triangle":
        poly((x, y - r), (x + r, y + r), (x - r, y + r))
    elif shape == "cross":
        for a, b in ((r, r / 3), (r / 3, r)):
            poly((x - a, y - b), (x + a, y - b), (x + a, y + b), (x - a, y + b))


def film(mover, direction="right", still=None, front=True, ground="white", count=13, way=(20, 108)):
    """A mover (colour, shape) through the middle; a still one at the centre. uint8 frames."""
    frames = []
    for i in range(count):
        at = way[0] + (way[1] - way[0]) * i / (count - 1)
        dx, dy = DIRECTIONS[direction]
        at = at if dx + dy > 0 else 128 - at
        place = (at, 62) if dx else (62, at)
        image = np.empty((128, 128, 3), np.uint8)
        image[:] = BACKGROUNDS[ground]
        layers = [(*mover, *place, 16)]
        if still is not None:
            layers.insert(0 if front else 1, (*still, 64, 64, 16))
        for layer in layers:
            stamp(image, *layer)
        frames.append(image)
    return np.stack(frames)


@pytest.mark.parametrize("said", DIRECTIONS)
@pytest.mark.parametrize("drawn", DIRECTIONS)
def test_direction_is_right_only_where_it_is(said, drawn):
    frames = film(("red", "circle"), drawn)
    result = score_video(frames, f"a red circle moves {said} on a white background")
    assert result.frames == 1 and result.direction == result.right == (said == drawn)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("front", [True, False])
def test_crossings_tell_front_from_behind(shape, front):
    still = ("blue", "square") if shape != "square" else ("yellow", "cross")
    frames = film(("red", shape), "left", still, front, "gray")
    words = {True: "in front of", False: "behind"}
    for said in (True, False):
        caption = f"a red {shape} moves left {words[said]} a {still[0]} {still[1]}"
        result = score_video(frames, caption)
        assert result.crossing == result.right == (said == front), (caption, result)
        assert result.direction
    images = [Image.fromarray(frame) for frame in frames]
    caption = f"a red {shape} moves left {words[front]} a {still[0]} {still[1]}"
    assert score_video(images, caption) == score_video(frames, caption)


CAPTION = "a red circle moves right behind a blue square on a white background"


def good():
    return film(("red", "circle"), "right", ("blue", "square"), False)


@pytest.mark.parametrize(
    "tamper",
    ["reversed", "frozen", "shuffled", "early", "jump", "tint", "other still", "flicker", "both"],
)
def test_tampered_videos_are_wrong(tamper):
    frames = good()
    assert score_video(frames, CAPTION).right
    if tamper == "reversed":
        frames = frames[::-1]
    elif tamper == "frozen":
        frames = frames[[0] * 13]
    elif tamper == "shuffled":
        frames = frames[[0, 7, 2, 12, 4, 9, 6, 1, 8, 5, 10, 11, 3]]
    elif tamper == "early":  # ends while the circle is hidden
        frames = frames[[0, 1, 2, 3, 4, 5, 5, 5, 5, 5]]
    elif tamper == "jump":  # gone where it should be half hidden
        frames[3:10] = film(("blue", "square"), way=(64, 64))[3:10]
    elif tamper == "tint":
        frames[2:] = frames[2:][..., ::-1]
    elif tamper == "other still":
        frames = film(("red", "circle"), "right", ("blue", "triangle"), False)
    elif tamper == "flicker":
        frames[::2] = BACKGROUNDS["white"]
    elif tamper == "both":  # the square drifts along
        for i, frame in enumerate(frames):
            frames[i] = np.roll(frame, 3 * i - 18, 1)
    result = score_video(frames, CAPTION)
    assert not result.right, result
    if tamper == "jump":
        assert result.direction and not result.crossing


def test_the_share_of_right_frames_is_a_share():
    frames = film(("red", "circle"), count=10)
    frames[:4] = BACKGROUNDS["white"]
    result = score_video(frames, "a red circle moves right")
    assert result.frames == 0.6 and result.direction and not result.right
    assert score_video(frames, "a green circle moves right").frames == 0


def test_background_counts_only_where_it_is_said():
    frames = film(("red", "circle"), ground="gray")
    assert score_video(frames, "a red circle moves right").right
    assert not score_video(frames, "a red circle moves right on a black background").background


@pytest.mark.parametrize("frames", [np.zeros((4, 128, 128, 3), np.uint8), [None] * 6])
def test_other_things_than_videos_are_refused(frames):
    with pytest.raises(AttnControlError, match="wants"):
        score_video(frames, "a red circle moves right")


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "a red circle moves",
        "a red ring moves left",
        "a red circle moves right behind a red square",
        "a red circle moves right behind a blue square above a cyan cross",
        None,
    ],
)
def test_captions_outside_the_grammar_are_refused(text):
    with pytest.raises(AttnControlError, match="caption"):
        parse_video(text)


def test_sampled_videos_are_what_their_captions_say():
    kinds = set()
    for seed in range(400):
        video = sample_video(seed)
        spec = parse_video(video.caption)
        assert video_caption(spec) == video.caption and len(video.scenes) == 17
        pairs = {(o.colour, o.shape) for o in video.scenes[0].objects}
        assert pairs == {spec.mover} | ({spec.still} if spec.still else set())
        assert not pairs & set(HELD_OUT)
        kinds.add((spec.direction, spec.crossing))
    assert len(kinds) == 12
    for seed in range(8):
        video = sample_video(7_000_000 + seed)
        assert score_video(draw_video(video), video.caption).right, video.caption


def test_the_prompts_are_fixed_and_what_they_say():
    file = Path(prompts.__file__).parent / "shapes-wan.jsonl"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == SHA256
    rows = prompts.load_prompts("shapes-wan")
    assert len(rows) == 120 and len({r["seed"] for r in rows}) == 120
    counts = dict.fromkeys(DIRECTIONS, 0)
    for row in rows:
        spec = parse_video(row["prompt"])
        counts[spec.direction] += 1
        assert row["objects"] == 1 + (spec.still is not None)
        held = bool({spec.mover, spec.still} & set(HELD_OUT))
        assert held == (row["split"] == "heldout")
    assert set(counts.values()) == {30}
    assert sum(r["split"] == "heldout" for r in rows) == 23


class Backwards:
    """An autoencoder that loses nothing and runs the film the other way."""

    def encode(self, x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))

    def decode(self, z):
        return SimpleNamespace(sample=z.flip(2))


def test_the_scorer_measures_its_own_error():
    from attn_control.zoo.video_error import measure

    rows = measure(2, vae=Backwards())
    after = {kind: rows.pop(kind) for kind in list(rows) if "after the autoencoder" in kind}
    for kind, (hits, total) in rows.items():
        assert hits == (0 if kind.startswith("wrong") else total), kind
    assert measure(2, vae=Backwards(), trip_only=True) == after
    whole, frames, direction, *crossing = after.values()
    assert whole == direction == [0, 2]
    assert frames == [34, 34]  # every frame shows what it should
    specs = [parse_video(sample_video(9_000_000 + seed, PAIRS).caption) for seed in range(2)]
    assert [row[1] for row in crossing] == [sum(s.crossing is not None for s in specs)] != [0]
