"""ShapeScenes: determinism, the grammar and its errors, layouts, held-out pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_control.errors import AttnControlError
from attn_control.zoo.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    PAIRS,
    RELATIONS,
    SEEN_PAIRS,
    SHAPES,
    CaptionSpec,
    caption_of,
    draw,
    parse_caption,
    sample_scene,
)

pairs = st.tuples(st.sampled_from(list(COLOURS)), st.sampled_from(SHAPES))
grounds = st.sampled_from([None, *BACKGROUNDS])
specs = st.one_of(
    st.builds(lambda p, g: CaptionSpec((p,), None, g), pairs, grounds),
    st.builds(
        lambda a, b, r, g: CaptionSpec((a, b), r, g),
        pairs, pairs, st.sampled_from([None, *RELATIONS]), grounds,
    ),
)  # fmt: skip


@given(specs)
def test_every_spec_survives_its_caption(spec):
    assert parse_caption(caption_of(spec)) == spec


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red dog",
        "red circle",
        "a red circle left of",
        "a red circle beside a blue square",
        "a red circle on a pink background",
        "a red circle and a blue square and a green ring",
        "a red circle, a blue square",
    ],
)
def test_text_outside_the_grammar_is_refused_with_the_grammar(text):
    with pytest.raises(AttnControlError, match="grammar"):
        parse_caption(text)


def test_a_caption_must_be_text():
    with pytest.raises(AttnControlError, match="string"):
        parse_caption(None)


def test_case_and_spaces_do_not_matter():
    assert parse_caption("  A Red  circle. ").objects == (("red", "circle"),)


def test_a_seed_fixes_the_scene_and_its_pixels():
    for seed in (0, 5, 123456):
        assert sample_scene(seed) == sample_scene(seed)
        np.testing.assert_array_equal(draw(sample_scene(seed)), draw(sample_scene(seed)))
    assert len({sample_scene(seed).caption for seed in range(50)}) > 30


def test_pictures_are_what_the_trainer_expects():
    image = draw(sample_scene(3))
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8


def test_training_never_draws_a_held_out_pair_and_covers_all_others():
    drawn = {(o.colour, o.shape) for seed in range(3000) for o in sample_scene(seed).objects}
    assert drawn == set(SEEN_PAIRS)
    assert not drawn & set(HELD_OUT) and len(PAIRS) == 30 and len(HELD_OUT) == 5
    for shape in SHAPES:
        assert sum(s == shape for _, s in SEEN_PAIRS) == 5
    assert all(sum(c == colour for c, _ in SEEN_PAIRS) >= 4 for colour in COLOURS)


def test_shares_of_the_grammar():
    scenes = [sample_scene(seed) for seed in range(2000)]
    two = [s for s in scenes if len(s.objects) == 2]
    specs = [parse_caption(s.caption) for s in scenes]
    assert 0.6 < len(two) / len(scenes) < 0.7
    assert 0.12 < np.mean([s.background is None for s in specs]) < 0.18
    bare = np.mean([s.relation is None for s in specs if len(s.objects) == 2])
    assert 0.16 < bare < 0.24


def test_objects_lie_inside_apart_and_as_the_caption_says():
    for seed in range(500):
        scene = sample_scene(seed)
        spec = parse_caption(scene.caption)
        for o in scene.objects:
            assert 34 <= o.size <= 56
            assert o.size / 2 + 4 < min(o.x, o.y) and max(o.x, o.y) < 128 - o.size / 2 - 4
        if len(scene.objects) == 1:
            continue
        a, b = scene.objects
        dx, dy = b.x - a.x, b.y - a.y
        assert max(abs(dx), abs(dy)) >= (a.size + b.size) / 2 + 4
        if spec.relation:
            along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[spec.relation]
            assert along > 34 and along >= max(abs(dx), abs(dy))
