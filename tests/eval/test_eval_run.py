"""A whole suite on a painter whose hits are known: every number against plain counting."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
from eval.conftest import is_right
from PIL import Image

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.eval import costs, measure
from attn_control.eval.command import evaluate, published_page
from attn_control.eval.power import detectable
from attn_control.eval.run import plan_of, prepare_suite, run_suite
from attn_control.render.media import Made
from attn_control.render.store import read_record, save


def chosen(objects=None):
    rows = [row for row in zoo.load_prompts("shapes-sd3") if row["split"] == "seen"]
    rows = [rows[i * len(rows) // 40] for i in range(40)]
    return [row for row in rows if objects is None or row["objects"] == objects]


def test_shares_and_differences_are_those_of_plain_counting(painter, suite, tmp_path):
    result = run_suite(suite(), tmp_path / "out").result
    variants = result["measurements"]["paint"]["variants"]
    for label, objects in (("one object", 1), ("two objects", 2), ("all", None)):
        rows = chosen(objects)
        plain = statistics.mean(is_right(row["seed"], 1.0) for row in rows)
        guided = statistics.mean(is_right(row["seed"], 3.0) for row in rows)
        for name, want in (("plain", plain), ("guided", guided)):
            found = variants[name]["groups"][label]["right"]
            assert found["n"] == len(rows) and found["mean"] == pytest.approx(want, abs=1e-6)
            assert found["low"] < want < found["high"]
        gain = variants["guided"]["against"]["plain"][label]
        assert gain["mean"] == pytest.approx(guided - plain, abs=2e-6)
    # An empty picture keeps its background and has no object.
    parts = variants["plain"]["groups"]["all"]
    assert parts["present"]["mean"] == parts["right"]["mean"] < parts["background"]["mean"] == 1


def test_bars_are_judged_by_their_own_group(painter, suite, tmp_path):
    one, two = run_suite(suite(), tmp_path / "out").result["bars"]
    rows = chosen(1)
    assert one["found"]["mean"] == pytest.approx(
        statistics.mean(is_right(row["seed"], 3.0) for row in rows), abs=1e-6
    )
    assert one["outcome"] == "met" and one["where"] == "one object"
    assert two["outcome"] == "below" and two["found"]["mean"] == pytest.approx(0.5)
    higher = suite("target: 0.6, floor: 0.4", "target: 0.95, floor: 0.7")
    assert run_suite(higher, tmp_path / "out").result["bars"][0]["outcome"] == "above the floor"


def test_the_same_seeds_give_the_same_result_byte_for_byte(painter, suite, tmp_path):
    for name in ("a", "b"):
        run_suite(suite(), tmp_path / name)
    for file in ("result.json", "result.md", "plan.json"):
        first, second = ((tmp_path / name / file).read_bytes() for name in ("a", "b"))
        assert first == second, file


def test_an_interrupted_suite_goes_on_where_it_ended(painter, suite, tmp_path):
    painter.stop_at = 51
    first = run_suite(suite(), tmp_path / "out")
    assert first.interrupted and first.result is None and not first.passed
    painter.stop_at = None
    second = run_suite(suite(), tmp_path / "out")
    drawn = painter.calls - 2 * (7 + 1)
    assert drawn == 81 and second.passed  # 80 pictures and the one that was broken off


def test_likeness_and_costs(painter, suite, tmp_path):
    out = tmp_path / "out"
    result = run_suite(suite(), out).result
    variants = result["measurements"]["paint"]["variants"]
    assert variants["plain"]["likeness"]["psnr"]["mean"] == measure.PSNR_CAP
    assert variants["guided"]["likeness"]["ssim"]["mean"] < 1
    spent = json.loads((out / "costs.json").read_text())["measurements"]["paint"]
    assert spent["plain"]["ratio"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert spent["guided"]["seconds"] > 0 and spent["guided"]["peak_bytes"] > 1e6
    assert "seconds" not in (out / "result.json").read_text()


def test_costs_take_turns_and_ratios_are_paired_by_round(painter, suite, tmp_path, monkeypatch):
    """A clock that runs a hundred times slower in every other round must not show."""
    prepared = prepare_suite(suite(), tmp_path / "out", None)["paint"]
    order, now = [], [0.0]
    paint = type(painter).__call__

    def slow(self, guidance_scale=1.0, **options):
        order.append(guidance_scale)
        turn = (len(order) - 1) // 2
        now[0] += (2.5 if guidance_scale > 1 else 1.0) * (100 if turn % 2 else 1)
        return paint(self, guidance_scale=guidance_scale, **options)

    monkeypatch.setattr(type(painter), "__call__", slow)
    monkeypatch.setattr(costs, "clock_of", lambda device: ("fake", lambda: now[0]))
    found = costs.costs(prepared, "plain", rounds=4)
    assert order == [1.0, 3.0] * 5  # one round to warm up
    assert found["plain"]["ratio"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["guided"]["ratio"] == {"mean": 2.5, "low": 2.5, "high": 2.5}
    assert found["guided"]["seconds"] == statistics.median([250, 2.5, 250, 2.5])


def test_a_planted_effect_is_found_and_a_blind_scorer_is_not_believed(
    painter, suite, tmp_path, monkeypatch
):
    planted = run_suite(suite(), tmp_path / "out").result["measurements"]["paint"]["planted"]
    assert planted["passed"] and planted["replaced"] == 20
    assert planted["found"]["mean"] == pytest.approx(planted["planted"]) != 0
    never = zoo.score("shapes-sd3", np.zeros((128, 128, 3), np.uint8), "a red ring")
    monkeypatch.setattr(zoo, "score", lambda name, image, caption: never)
    with pytest.raises(AttnControlError, match="planted effect was not found"):
        evaluate(str(suite(load=False)), tmp_path / "blind")


def test_a_picture_changed_on_disk_fails_the_control(painter, suite, tmp_path):
    out = tmp_path / "out"
    run_suite(suite(), out)
    rows = [json.loads(line) for line in (out / "paint/results.jsonl").read_text().splitlines()]
    right = next(r for r in rows if r["variant"] == "plain" and r["score"]["right"])
    path = out / "paint" / "images" / right["file"]
    with Image.open(path) as picture:
        save(Made((Image.new("RGB", picture.size),)), path, read_record(path))
    outcome = run_suite(suite(), out)
    planted = outcome.result["measurements"]["paint"]["planted"]
    assert planted["changed_when_read_back"] == 1 and not outcome.passed


def test_the_plan_says_what_could_be_detected(painter, suite, tmp_path):
    file = suite()
    plan = plan_of(file, prepare_suite(file, tmp_path / "out", None))
    groups = plan["measurements"]["paint"]["groups"]
    assert groups["all"] == {"n": 40, "detects": round(detectable(40, 0.3), 4)}
    assert not painter.calls


def test_the_detectable_effect_is_detected_four_times_in_five():
    """Simulated: pairs that differ in 30 %, with the difference that 160 of them should show."""
    rng, n = np.random.default_rng(0), 160
    effect = detectable(n, 0.3)
    draws = rng.choice([1, -1, 0], (4000, n), p=[(0.3 + effect) / 2, (0.3 - effect) / 2, 0.7])
    error = draws.std(1, ddof=1) / np.sqrt(n)
    power = (np.abs(draws.mean(1)) > 1.96 * error).mean()
    assert 0.78 < power < 0.88  # the formula takes the variance's upper bound


def test_a_short_form_takes_fewer_prompts_and_is_never_published(painter, suite, tmp_path):
    result = run_suite(suite(), tmp_path / "out", spread=10).result
    assert result["spread"] == 10 and result["measurements"]["paint"]["pictures"] == 20
    with pytest.raises(AttnControlError, match="whole suites only"):
        evaluate(str(suite(load=False)), tmp_path / "o", spread=10, publish=tmp_path / "docs")


def test_publishing_writes_the_page_from_the_results(painter, suite, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    evaluate(str(suite(load=False)), tmp_path / "out", publish=docs)
    page = (docs / "evaluation.md").read_text()
    assert page == published_page(docs / "evaluation")
    assert (
        "Does guidance help the painter?" in page and "![paint](evaluation/suite/paint.png)" in page
    )
    with Image.open(docs / "evaluation" / "suite" / "paint.png") as plot:
        assert plot.width > 400
    numbers = json.loads((docs / "evaluation/suite/result.json").read_text())
    guided = numbers["measurements"]["paint"]["variants"]["guided"]["groups"]["all"]["right"]
    assert f"{100 * guided['mean']:.1f} % [{100 * guided['low']:.1f}, " in page


def test_what_a_run_noticed_stands_in_the_result(painter, suite, tmp_path, monkeypatch):
    monkeypatch.setattr("attn_control.render.run.is_blank", lambda made: True)
    out = tmp_path / "out"
    assert "one single colour" in run_suite(suite(), out, spread=5).result["notes"][0]
    assert "**Note:** paint: 10 picture(s)" in (out / "result.md").read_text()
