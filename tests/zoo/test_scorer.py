"""The scorer, on pictures that PIL draws (never the generator), whole and tampered with."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from attn_control.errors import AttnControlError
from attn_control.zoo.scenes import BACKGROUNDS, COLOURS, SHAPES
from attn_control.zoo.scorer import find_objects, score

FINE = 8  # drawn this much larger, then reduced: PIL's own way to smooth edges


def paint(objects, background="white", side=128):
    """A picture of (colour, shape, x, y, size) in shares of the side."""
    big = side * FINE
    image = Image.new("RGB", (big, big), BACKGROUNDS.get(background, background))
    pen = ImageDraw.Draw(image)
    for colour, shape, x, y, size in objects:
        rgb = COLOURS.get(colour, colour)
        x, y, r = x * big, y * big, size * big / 2
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=rgb)
        elif shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=rgb)
        elif shape == "triangle":
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=rgb)
        elif shape == "cross":
            pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=rgb)
            pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=rgb)
        elif shape == "ring":
            pen.ellipse((x - r, y - r, x + r, y + r), outline=rgb, width=round(0.45 * r))
        elif shape == "star":
            spokes = [(1.0, 0.45)[i % 2] * r for i in range(10)]
            at = [math.pi * i / 5 - math.pi / 2 for i in range(10)]
            tips = zip(spokes, at, strict=True)
            pen.polygon([(x + s * math.cos(a), y + s * math.sin(a)) for s, a in tips], fill=rgb)
        elif shape == "bar":
            pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=rgb)
    return image.resize((side, side), Image.Resampling.BOX)


LEFT, RIGHT = (0.28, 0.5, 0.36), (0.72, 0.52, 0.32)
TWO = [("red", "circle", *LEFT), ("blue", "square", *RIGHT)]


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_one_object_of_every_kind(colour, shape, background):
    image = paint([(colour, shape, 0.4, 0.55, 0.36)], background)
    result = score(image, f"a {colour} {shape} on a {background} background")
    assert result.right, result


@pytest.mark.parametrize("side", [64, 96, 128, 200, 512])
def test_any_size(side):
    result = score(paint(TWO, side=side), "a red circle left of a blue square")
    assert result.right, result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.27, 0.44])
def test_smallest_and_largest_objects_at_64_px(shape, size):
    result = score(paint([("purple", shape, 0.5, 0.5, size)], "gray", 64), f"a purple {shape}")
    assert result.right, result


def test_arrays_and_images_agree():
    image = paint(TWO)
    caption = "a red circle and a blue square"
    assert score(image, caption) == score(np.asarray(image), caption)


def test_where_objects_are():
    _, found = find_objects(paint(TWO))
    got = {o.shape: o for o in found}
    assert abs(got["circle"].x - 0.28) < 0.01 and abs(got["circle"].y - 0.5) < 0.01
    assert abs(got["square"].area - 0.32**2) < 0.005


def test_soft_edges_and_noise_are_tolerated():
    image = np.asarray(paint(TWO).filter(ImageFilter.GaussianBlur(1.2))).astype(float)
    image += np.random.default_rng(0).normal(0, 8, image.shape)
    image = np.clip(image, 0, 255).astype(np.uint8)
    assert score(image, "a red circle left of a blue square on a white background").right


RELATIONS = {
    "left of": ((0.25, 0.5), (0.75, 0.5)),
    "right of": ((0.75, 0.5), (0.25, 0.5)),
    "above": ((0.5, 0.25), (0.5, 0.75)),
    "below": ((0.5, 0.75), (0.5, 0.25)),
}


@pytest.mark.parametrize("said", RELATIONS)
@pytest.mark.parametrize("drawn", RELATIONS)
def test_relations_hold_only_where_they_do(said, drawn):
    (ax, ay), (bx, by) = RELATIONS[drawn]
    image = paint([("green", "ring", ax, ay, 0.35), ("yellow", "cross", bx, by, 0.35)], "black")
    result = score(image, f"a green ring {said} a yellow cross")
    assert result.relation == result.right == (said == drawn)
    assert result.bound


def test_swapped_colours_are_present_but_not_bound():
    image = paint([("blue", "circle", *LEFT), ("red", "square", *RIGHT)])
    result = score(image, "a red circle and a blue square")
    assert result.present and not result.bound and not result.right


def test_two_of_a_kind_need_two():
    caption = "a red circle and a red circle"
    assert score(paint([("red", "circle", *LEFT), ("red", "circle", *RIGHT)]), caption).right
    assert not score(paint([("red", "circle", *LEFT)]), caption).present


WRONG = {
    "blank": [],
    "missing": TWO[:1],
    "extra": [*TWO, ("green", "cross", 0.5, 0.15, 0.2)],
    "wrong shape": [("red", "triangle", *LEFT), TWO[1]],
    "wrong colour": [("purple", "circle", *LEFT), TWO[1]],
    "colour off the palette": [((255, 140, 0), "circle", *LEFT), TWO[1]],
    "star": [("red", "star", *LEFT), TWO[1]],
    "bar": [("red", "bar", *LEFT), TWO[1]],
    "touching": [("red", "circle", 0.35, 0.5, 0.36), ("blue", "square", 0.66, 0.52, 0.32)],
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_pictures_are_wrong(kind):
    assert not score(paint(WRONG[kind]), "a red circle left of a blue square").right


@pytest.mark.parametrize("tamper", ["half", "stripe", "cut", "fleck", "tint", "noise", "blur"])
def test_tampered_pictures_are_wrong(tamper):
    image = paint(TWO).copy()
    pen = ImageDraw.Draw(image)
    if tamper == "half":  # half the circle in another colour
        pixels = np.asarray(image).copy()
        part = pixels[:, :36]
        part[(part[..., 0] > 200) & (part[..., 1] < 80)] = COLOURS["green"]
        image = Image.fromarray(pixels)
    elif tamper == "stripe":
        pen.rectangle((0, 100, 128, 108), fill=COLOURS["cyan"])
    elif tamper == "cut":
        pen.rectangle((0, 0, 128, 60), fill=BACKGROUNDS["white"])
    elif tamper == "fleck":
        pen.ellipse((60, 8, 70, 18), fill=COLOURS["green"])
    elif tamper == "tint":
        image = Image.blend(image, Image.new("RGB", image.size, (255, 200, 0)), 0.5)
    elif tamper == "noise":
        noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3))
        image = Image.fromarray(noise.astype(np.uint8))
    elif tamper == "blur":
        image = image.filter(ImageFilter.GaussianBlur(12))
    assert not score(image, "a red circle left of a blue square on a white background").right


def test_background_is_checked_only_where_it_is_said():
    image = paint(TWO, "gray")
    assert score(image, "a red circle left of a blue square").right
    result = score(image, "a red circle left of a blue square on a black background")
    assert result.bound and not result.background and not result.right
    assert not score(paint(TWO, (250, 180, 120)), "a red circle on a white background").background


@pytest.mark.parametrize(
    "image",
    [
        None,
        "picture.png",
        np.zeros((128, 128), np.uint8),
        np.zeros((128, 128, 4), np.uint8),
        np.zeros((128, 128, 3), np.float32),
        np.zeros((63, 128, 3), np.uint8),
    ],
)
def test_other_things_than_pictures_are_refused(image):
    with pytest.raises(AttnControlError, match="score wants"):
        score(image, "a red circle")


def test_the_scorer_measures_its_own_error():
    from attn_control.zoo.scorer_error import measure

    rows = measure(40, sizes=(64, 128))
    for kind, (hits, total) in rows.items():
        if kind.startswith("right"):
            assert hits >= 0.99 * total, kind
        elif "hexagon" not in kind:  # near enough to a circle to pass now and then; see docs/zoo.md
            assert hits <= 0.02 * total, kind


def test_only_the_round_trip_needs_an_autoencoder(capsys):
    from attn_control.zoo.scorer_error import main

    with pytest.raises(SystemExit):
        main(["--count", "1", "--trip-only"])
    assert "--trip-only needs --vae" in capsys.readouterr().err
