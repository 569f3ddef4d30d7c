"""The contact sheet's geometry, measured on flat pictures whose colours cannot be mistaken."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from attn_control.render import sheet

COLOURS = [(200, 30, 30), (30, 160, 30), (30, 30, 200), (200, 160, 30), (120, 30, 160), (0, 0, 0)]


def draw(tmp_path, variants=("one", "two"), prompts=("a", "b"), seeds=(0,), right=None, **options):
    """A sheet of flat pictures; returns it and the colour of every cell."""
    (tmp_path / "images").mkdir(exist_ok=True)
    rows, colours = [], {}
    for variant in variants:
        for prompt in prompts:
            for seed in seeds:
                colour = COLOURS[len(rows) % len(COLOURS)]
                name = f"{len(rows)}.png"
                Image.new("RGB", options.get("size", (16, 16)), colour).save(
                    tmp_path / "images" / name
                )
                score = None if right is None else {"right": right}
                rows.append(
                    {
                        "file": name,
                        "variant": variant,
                        "prompt": prompt,
                        "seed": seed,
                        "score": score,
                    }
                )
                colours[variant, prompt, seed] = colour
    rows = rows[: len(rows) - options.get("missing", 0)]
    paths = sheet.make_sheets(
        rows,
        tmp_path,
        variants=variants,
        seeds={(prompt, None): seeds for prompt in prompts},
        title="Title",
    )
    return paths, colours


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def places(picture, colour):
    """Bounding box (left, top, right, bottom) of one exact colour."""
    rows, columns = np.nonzero((picture == colour).all(axis=2))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_variants_go_across_and_prompts_down(tmp_path):
    (path,), colours = draw(tmp_path)
    picture = pixels(path)
    box = {key: places(picture, colour) for key, colour in colours.items()}
    assert box["one", "a", 0][1] == box["two", "a", 0][1] < box["one", "b", 0][1]
    assert box["one", "a", 0][0] == box["one", "b", 0][0] < box["two", "a", 0][0]
    tile = sheet.Look.of(2, 1).tile
    for left, top, right, bottom in box.values():
        # The frame of one pixel covers the outermost ring.
        assert right - left + 1 == bottom - top + 1 == tile - 2


def test_seeds_stand_side_by_side_closer_than_variants(tmp_path):
    (path,), colours = draw(tmp_path, prompts=("a",), seeds=(0, 1, 2))
    box = [places(pixels(path), colour) for colour in colours.values()]
    look = sheet.Look.of(2, 3)
    gaps = [after[0] - before[2] - 3 for before, after in zip(box, box[1:], strict=False)]
    assert gaps == [look.gap, look.gap, look.group, look.gap, look.gap]


def test_margins_are_empty_and_even(tmp_path):
    (path,), _ = draw(tmp_path, prompts=("a very long prompt " * 12, "b"))
    picture = pixels(path)
    margin = sheet.Look.of(2, 1).margin
    rows, columns = np.nonzero((picture != 255).any(axis=2))
    height, width = picture.shape[:2]
    assert columns.min() >= margin and width - 1 - columns.max() == margin
    assert rows.min() >= margin and height - 1 - rows.max() == margin


def test_a_long_caption_stays_in_its_column_and_makes_room_below(tmp_path):
    prompt = "supercalifragilisticexpialidocious" * 2 + " and many more words" * 20
    (path,), colours = draw(tmp_path, prompts=(prompt, "b"))
    picture = pixels(path)
    look = sheet.Look.of(2, 1)
    first, second = places(picture, COLOURS[0]), places(picture, COLOURS[1])
    lines = sheet.wrap(prompt, look.text, look.caption - look.group)
    assert second[1] - first[1] == len(lines) * sheet.line_height(look.text) + look.group
    between = picture[
        first[1] : second[1] - look.group, look.margin + look.caption - 15 : first[0] - 1
    ]
    assert (between == 255).all(), "text runs into the pictures"


def test_wrapping_keeps_every_word_and_every_width():
    words = "a red circle left of a blue square on a white background"
    lines = sheet.wrap(words, 22, 200)
    assert " ".join(lines) == words and len(lines) > 1
    assert all(sheet.font(22).getlength(line) <= 200 for line in lines)
    assert "".join(sheet.wrap("x" * 100, 22, 90)) == "x" * 100
    assert sheet.wrap("", 22, 100) == [] and sheet.wrap("ab", 22, 1) == ["a", "b"]


@pytest.mark.parametrize("right,colour", [(True, sheet.RIGHT), (False, sheet.WRONG)])
def test_the_badge_tells_right_from_wrong_by_shape_and_colour(right, colour):
    badge = np.asarray(sheet._badge(right, 24)).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    inside = badge[6:18, 6:18, :3]
    assert (abs(inside - wanted).max(axis=2) < 30).any(), "its colour"
    assert (inside.min(axis=2) > 225).any(), "its white stroke"
    # Both diagonals of the cross are white in the middle; of the check neither is, up left.
    assert (badge[9, 9, :3].min() > 200) == (not right)


def test_scored_pictures_carry_a_badge_and_others_none(tmp_path):
    for right, name in [(None, "none"), (True, "right")]:
        (tmp_path / name).mkdir()
        (path,), colours = draw(tmp_path / name, variants=("one",), prompts=("a",), right=right)
        left, top, end, bottom = places(pixels(path), COLOURS[0])
        tile = pixels(path)[top : bottom + 1, left : end + 1]
        assert (tile == COLOURS[0]).all() == (right is None)


def test_a_missing_picture_is_an_empty_tile(tmp_path):
    (path,), _ = draw(tmp_path, missing=1)
    left, top, right, bottom = places(pixels(path), (0xF4, 0xF5, 0xF7))
    assert right - left + 1 == bottom - top + 1 == sheet.Look.of(2, 1).tile


def test_a_wide_picture_keeps_its_proportions(tmp_path):
    (path,), _ = draw(tmp_path, variants=("one",), prompts=("a",), size=(32, 16))
    left, top, right, bottom = places(pixels(path), COLOURS[0])
    assert right - left + 3 == pytest.approx(2 * (bottom - top + 1), abs=2)


def test_a_long_job_gets_pages_and_a_shorter_one_removes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "ROWS_A_PAGE", 2)
    paths, _ = draw(tmp_path, variants=("one",), prompts=("a", "b", "c", "d", "e"))
    assert [path.name for path in paths] == ["sheet-01.png", "sheet-02.png", "sheet-03.png"]
    draw(tmp_path, variants=("one",), prompts=("a",))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["sheet.png"]


def test_many_variants_make_smaller_tiles():
    sizes = [sheet.Look.of(columns, 3).tile for columns in (1, 3, 5, 10)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 320 and sizes[-1] == 96
