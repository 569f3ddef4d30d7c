"""Suites are data: the shipped ones load, and every mistake in one is told before rendering."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.eval.command import published_page
from attn_control.eval.groups import Where
from attn_control.eval.run import prepare_suite
from attn_control.eval.suite import load_suite, part_names, suite_names
from attn_control.zoo.prompts import spread, traits

DOCS = Path(__file__).parents[2] / "docs"

WRONG = [
    ("baseline: plain", "baseline: plane", ["paint.baseline", "'plane'", "plain, guided"]),
    ("variant: plain, share", "variant: x, share", ["planted.variant", "'x'"]),
    ("share: 0.5", "share: 0", ["suite.yaml:6", "greater than 0"]),
    ("{job: paint, variant: guided, where", "{job: p, variant: guided, where", ["bars.0", "'p'"]),
    ("against: plain", "against: cfg", ["bars.1", "'cfg'"]),
    ("objects: 1}, {obj", "object: 1}, {obj", ["suite.yaml:5", "Extra inputs"]),
    ("split: seen, spread", "split: sen, spread", ["prompts.split", "'sen'", "suite.yaml:9"]),
    (
        "{zoo: shapes-sd3, split: seen, spread: 40}\n      seeds: own",
        "[a red ring]\n      seeds: 0",
        ["suite.yaml:9", "fixed prompts of a zoo"],
    ),
    ("guidance_scale: 3.0", "guidance: 3.0", ["unknown key", "guidance_scale", "suite.yaml:14"]),
    ("target: 0.6", "target: 60", ["less than or equal to 1", "suite.yaml:16"]),
]


@pytest.mark.parametrize("old, new, words", WRONG, ids=[new for _, new, _ in WRONG])
def test_a_mistake_is_one_error_before_anything_runs(painter, suite, tmp_path, old, new, words):
    with pytest.raises(AttnControlError) as caught:
        prepare_suite(suite(old, new), tmp_path / "out", None)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not painter.calls and not (tmp_path / "out").exists()


def test_an_unknown_suite_names_the_known_ones():
    with pytest.raises(AttnControlError, match="guidance, video, zoo"):
        load_suite("gidance")


@pytest.mark.parametrize("name", suite_names())
def test_the_shipped_suites_fit_the_shipped_models(name, tmp_path):
    """Every job is checked against the real model: heads, windows, options, prompts."""
    prepared = prepare_suite(load_suite(name), tmp_path, 5)
    assert all(len(each.prompts) == 5 for each in prepared.values())


def test_the_zoo_suite_measures_every_model_on_prompts_of_every_kind():
    suite = load_suite("zoo").suite
    assert set(suite.measurements) == set(zoo.NAMES) == {bar.job for bar in suite.bars}
    for part in (part for part in part_names() if part.startswith("zoo/")):
        (name,) = load_suite(part).suite.measurements
        job, _ = load_suite(part).job(name)
        asked = job.prompts.model_dump(exclude_none=True)
        count = asked.pop("spread", None)
        assert job.seeds == "own" and asked == {"zoo": name, "offset": 0}
        # A spread that beats with the file's own periods would leave whole kinds out.
        rows = [traits(name, row) for row in zoo.load_prompts(name)]
        few = spread(rows, count)
        for key in rows[0]:
            whole, part = (Counter(row[key] for row in each) for each in (rows, few))
            for value, times in whole.items():
                assert part[value] >= 0.6 * times * len(few) / len(rows), (name, key, value)
        assert len(few) >= 35


def test_a_group_narrows_by_what_it_names():
    row = {"split": "seen", "objects": 2}
    assert Where().holds(row) and Where(split="seen", objects=2).holds(row)
    assert not Where(split="heldout").holds(row) and not Where(objects=1).holds(row)
    assert [str(Where()), str(Where(split="seen", objects=1))] == ["all", "seen, one object"]


def test_the_page_is_generated_from_the_results_and_those_from_these_suites():
    """A suite edited after it ran, or a number edited in the page, shows here."""
    import json

    assert (DOCS / "evaluation.md").read_text() == published_page(DOCS / "evaluation")
    results = sorted((DOCS / "evaluation").glob("*/result.json"))
    assert {path.parent.name for path in results} == set(suite_names())
    for path in results:
        result = json.loads(path.read_text())
        assert result["digest"] == load_suite(path.parent.name).digest and result["spread"] is None
        assert all(each["planted"]["passed"] for each in result["measurements"].values())
