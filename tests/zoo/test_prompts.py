"""The 200 fixed prompts: byte-fixed, within the grammar, held-out pairs where claimed."""

import hashlib
from pathlib import Path

import pytest

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.zoo import prompts, references
from attn_control.zoo.scenes import HELD_OUT, SEEN_PAIRS, parse_caption, sample_scene
from attn_control.zoo.texture_scorer import reference_texture

# Fixed before the first training step. A change here would make scores incomparable.
SHA256 = "f0bcbba9f7c6831f90267d634df080d94be62b90dc67eb830bba82a153d37335"


def test_the_file_never_changes():
    file = Path(prompts.__file__).parent / "shapes-sd3.jsonl"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == SHA256


def test_counts_and_claims():
    rows = zoo.load_prompts("shapes-sd3")
    kinds = [(r["objects"], r["split"]) for r in rows]
    want = {(1, "seen"): 80, (2, "seen"): 80, (1, "heldout"): 20, (2, "heldout"): 20}
    assert {kind: kinds.count(kind) for kind in set(kinds)} == want
    assert len({r["prompt"] for r in rows}) == len({r["seed"] for r in rows}) == 200
    related = 0
    for row in rows:
        spec = parse_caption(row["prompt"])
        assert len(spec.objects) == row["objects"]
        assert any(p in HELD_OUT for p in spec.objects) == (row["split"] == "heldout")
        related += spec.relation is not None
    assert related >= 80  # of the hundred with two objects


def test_held_out_prompts_are_disjoint_from_training():
    held = {r["prompt"] for r in zoo.load_prompts("shapes-sd3") if r["split"] == "heldout"}
    assert not held & {sample_scene(seed).caption for seed in range(5000)}
    assert not set(HELD_OUT) & set(SEEN_PAIRS)


def test_unknown_names():
    with pytest.raises(AttnControlError, match="no built-in model"):
        zoo.load_prompts("shapes-sd4")
    with pytest.raises(AttnControlError, match="shapes-sd3"):
        prompts.load_prompts("nothing")


def test_a_few_prompts_are_spread_over_all_kinds():
    rows = zoo.load_prompts("shapes-sd3")
    few = prompts.spread(rows, 10)
    assert few == rows[::20] and {r["objects"] for r in few} == {1, 2}
    assert prompts.spread(rows, 3) == [rows[0], rows[66], rows[133]]
    assert prompts.spread(rows, None) == prompts.spread(rows, 10_000) == rows


def test_traits_are_those_that_the_captions_say():
    assert prompts.traits("shapes-sd15", zoo.load_prompts("shapes-sd15")[0]) == {
        "objects": 1, "split": "seen",
    }  # fmt: skip
    for row in zoo.load_prompts("shapes-wan"):
        found = prompts.traits("shapes-wan", row)
        assert f" moves {found['direction']}" in row["prompt"]
        how = found["crossing"]
        assert (how is None) == (row["objects"] == 1) and (
            how is None or f" {how} a" in row["prompt"]
        )
    for row in zoo.load_prompts("shapes-flux"):
        found = prompts.traits("shapes-flux", row)
        assert found["reference"] == ("of the reference" in row["prompt"])
        assert found["reference"] == references.asks_for_reference(row["prompt"])
        assert found["texture"] == (row["reference"] or {}).get("texture")


def test_the_drawn_reference_shows_the_texture_it_is_drawn_for():
    for row in zoo.load_prompts("shapes-flux")[:100:10]:
        picture = references.draw_reference(**row["reference"])
        assert reference_texture(picture) == row["reference"]["texture"]


def test_a_pipeline_without_references_says_so():
    with pytest.raises(AttnControlError, match="object takes no reference pictures"):
        references.with_references(object())
