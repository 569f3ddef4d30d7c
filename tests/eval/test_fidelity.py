"""Sparse attention held against dense: every number against plain reckoning from the files."""

from __future__ import annotations

import json
import random
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from eval.sparse_suite import SUITE
from PIL import Image

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.eval import fidelity, run
from attn_control.eval.command import evaluate, published_page
from attn_control.eval.emptiness import is_empty
from attn_control.eval.fidelity_tables import sparse_section
from attn_control.eval.run import prepare_suite, run_suite
from attn_control.eval.suite import Planted, Sparsity, load_suite
from attn_control.eval.tables import costs_page, result_page
from attn_control.metrics import bootstrap_mean
from attn_control.render.media import Made, write_png
from attn_control.render.store import read_record


@pytest.fixture(scope="module")
def done(tmp_path_factory, wan_toy):
    """One run of the suite, which the tests only read."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTN_CONTROL_ZOO_DIR", str(wan_toy))
        (folder / "sparse.yaml").write_text(SUITE)
        outcome = run_suite(load_suite(str(folder / "sparse.yaml")), folder / "out")
    return folder / "out", outcome


def videos(out):
    """(variant, prompt, seed) -> frames as float arrays, read without the package."""
    found = {}
    for path in sorted((out / "few" / "images").glob("*.png")):
        row = read_record(path)
        with Image.open(path) as image:
            frames = []
            for number in range(image.n_frames):
                image.seek(number)
                frames.append(np.asarray(image.convert("RGB"), float))
        found[row["variant"], row["prompt"], row["seed"]] = np.stack(frames)
    return found


def by_hand(found, variant):
    """Decibels of each video: the mean over its frames of 10 log10(255^2 / mse)."""
    decibels = {}
    for (name, prompt, seed), frames in found.items():
        if name == variant:
            errors = ((frames - found["dense", prompt, seed]) ** 2).mean((1, 2, 3))
            decibels[prompt, seed] = float(np.mean(10 * np.log10(255**2 / errors)))
    return decibels


def test_likeness_and_gains_are_those_of_plain_reckoning(done):
    out, outcome = done
    variants = outcome.result["measurements"]["few"]["variants"]
    found = videos(out)
    assert len(found) == 30 and next(iter(found.values())).shape == (7, 64, 64, 3)
    hand = {name: by_hand(found, name) for name in variants if name != "dense"}
    for name, each in hand.items():
        told = variants[name]["likeness"]["psnr"]
        assert told["n"] == 6
        assert told["mean"] == pytest.approx(statistics.mean(each.values()), abs=1e-5)
    assert variants["dense"]["likeness"]["psnr"]["mean"] == 100
    gain = variants["tile + lse"]["gain"]
    differences = [hand["tile + lse"][key] - hand["tile"][key] for key in hand["tile"]]
    assert gain["over"] == "tile"
    assert gain["mean"] == pytest.approx(statistics.mean(differences), abs=1e-5)
    spread = bootstrap_mean(sorted(differences))
    assert gain["low"] == pytest.approx(spread.low, rel=0.5) and gain["low"] <= gain["mean"]
    honest = variants["chosen"]["over_share"]
    assert honest["over"] == "share"
    assert honest["mean"] == pytest.approx(
        statistics.mean(hand["chosen"][key] - hand["share"][key] for key in hand["share"]), abs=1e-5
    )
    assert [variants[name]["gain"] for name in ("dense", "share", "tile", "chosen")] == [None] * 4


def test_verdicts_and_what_they_lost_are_those_of_plain_reckoning(done, sparse_suite, tmp_path):
    """On scores made up, since the toy has none that is right."""
    images = done[0] / "few" / "images"
    suite = sparse_suite()
    rows = [read_record(path) for path in sorted(images.glob("*.png"))]
    dice = random.Random(0)
    for row in rows:
        row["score"] = {name: dice.random() < 0.5 for name in row["score"]}
        row["score"]["frames"] = dice.random()
    prepared = prepare_suite(suite, tmp_path / "o", None)["few"]
    found = fidelity.measure_sparse(prepared, rows, suite.suite.measurements["few"], images)
    score = {(row["variant"], row["prompt"], row["seed"]): row["score"] for row in rows}
    base = {key[1:]: each for key, each in score.items() if key[0] == "dense"}
    for name, each in found["variants"].items():
        mine = {key[1:]: each for key, each in score.items() if key[0] == name}
        for verdict in ("right", "frames", "direction"):
            own = statistics.mean(float(mine[key][verdict]) for key in mine)
            lost = statistics.mean(mine[key][verdict] - base[key][verdict] for key in mine)
            assert each["scores"][verdict]["mean"] == pytest.approx(own, abs=1e-5)
            told = each["minus_dense"][verdict]
            assert told["mean"] == pytest.approx(lost, abs=1e-5) and told["n"] == 6
            assert told["low"] < told["mean"] < told["high"] or name == "dense"
    lost = found["variants"]["tile"]["minus_dense"]["frames"]
    table = next(text for text in sparse_section(found) if "frames minus dense" in text)
    assert f"{100 * lost['mean']:+.1f} [{100 * lost['low']:+.1f}, " in table


def bare(path):
    """Overwrite a video with its ground, slightly uneven; its record is lost."""
    ground = np.full((64, 64, 3), 240, np.uint8)
    ground[::2] -= 9
    with Image.open(path) as image:
        count = image.n_frames
    write_png(Made((Image.fromarray(ground),) * count, is_video=True), path, None, 16.0)


def test_likeness_leaves_out_where_the_dense_video_shows_bare_ground(done, sparse_suite, tmp_path):
    out, outcome = done
    images = Path(shutil.copytree(out / "few" / "images", tmp_path / "images"))
    suite = sparse_suite()
    rows = [read_record(path) for path in sorted(images.glob("*.png"))]
    prepared = prepare_suite(suite, tmp_path / "o", None)["few"]
    before = videos(out)
    hand = {name: by_hand(before, name) for name in ("tile", "tile + lse", "chosen", "share")}
    first, *others = [row for row in rows if row["variant"] == "dense"]
    gone = first["prompt"], first["seed"]
    bare(images / first["file"])
    found = fidelity.measure_sparse(prepared, rows, suite.suite.measurements["few"], images)
    closer = found["closer"]
    assert found["compared"] == 5 and closer["replaced"] == 2  # half of five
    assert closer["found"]["mean"] == pytest.approx(6.0206 * 2 / 5, abs=1e-4)
    for name, each in hand.items():
        left = [value for key, value in each.items() if key != gone]
        told = found["variants"][name]
        assert told["likeness"]["psnr"]["n"] == 5 and told["scores"]["frames"]["n"] == 6
        assert told["likeness"]["psnr"]["mean"] == pytest.approx(statistics.mean(left), abs=1e-5)
    gain = [hand["tile + lse"][key] - hand["tile"][key] for key in hand["tile"] if key != gone]
    assert found["variants"]["tile + lse"]["gain"]["mean"] == pytest.approx(
        statistics.mean(gain), abs=1e-5
    )
    assert "1 of the 6 dense videos show bare ground" in sparse_section(found)[0]
    whole = outcome.result["measurements"]["few"]
    assert whole["compared"] == 6 and "bare ground" not in sparse_section(whole)[0]
    for row in others:
        bare(images / row["file"])
    with pytest.raises(AttnControlError, match=r"all 6 dense videos in .* show bare ground"):
        fidelity.measure_sparse(prepared, rows, suite.suite.measurements["few"], images)


def test_a_thousandth_of_the_pixels_is_no_bare_ground():
    frames = zoo.draw_truth("shapes-wan", "a yellow cross moves up on a white background", 0)
    assert not is_empty(frames)
    ground = np.full_like(frames, 240)
    assert is_empty(ground)
    count = ground[..., 0].size
    for share, empty in ((0.0009, True), (0.0011, False)):
        some = ground.copy().reshape(-1, 3)
        some[: int(share * count), 2] -= 60  # yellowish: one channel alone
        assert is_empty(some.reshape(ground.shape)) is empty
        some[: int(share * count), 2] += 20
        assert is_empty(some.reshape(ground.shape))


def test_densities_are_counted_from_what_ran(done):
    variants = done[1].result["measurements"]["few"]["variants"]
    found = {name: v["density"] for name, v in variants.items()}
    # Half of eight blocks, and the own one where it is not among them.
    assert (2 + 2 * 4 / 8) / 4 <= found.pop("chosen") <= (2 + 2 * 5 / 8) / 4
    tile = (2 + 2 * 0.25) / 4
    assert found == {"dense": 1.0, "share": 0.5, "tile": tile, "tile + lse": tile}
    # Four levels, two layers, one branch.
    assert variants["tile"]["outcomes"] == {"dense": 2, "refresh": 2, "sparse": 4}
    assert variants["share"]["outcomes"] == {"dense": 2, "refresh": 2, "shared": 4}
    assert variants["share"]["computed"] == 0.5 < variants["tile"]["computed"]


def test_both_planted_effects_are_found(done):
    found = done[1].result["measurements"]["few"]
    assert done[1].passed and found["planted"]["passed"] and found["closer"]["passed"]
    assert found["closer"]["planted"] == pytest.approx(6.0206 / 2, abs=1e-4)
    assert found["closer"]["found"]["mean"] == found["closer"]["planted"]
    assert found["redrawn"] == "videos" and (found["prompts"], found["seeds"]) == (2, 3)


def test_a_measure_that_sees_nothing_fails_the_control(done, sparse_suite, tmp_path, monkeypatch):
    out, _ = done
    prepared = prepare_suite(sparse_suite(), tmp_path / "o", None)["few"]
    rows = [read_record(path) for path in (out / "few" / "images").glob("*.png")]
    by_variant = fidelity.rows_by_variant(prepared, rows, out)
    arguments = [by_variant["tile"], by_variant["dense"], Planted(variant="tile", share=0.5)]
    arguments += [out / "few" / "images", range(6)]
    assert fidelity.planted_closer(*arguments)["passed"]
    monkeypatch.setattr(fidelity, "psnr", lambda a, b, **_: 20.0)
    assert not fidelity.planted_closer(*arguments)["passed"]


def taken_twice(*_):
    raise AssertionError("the times are there already")


def test_the_same_videos_give_the_same_table_and_times_are_taken_once(
    done, sparse_suite, monkeypatch
):
    out, first = done
    before = {name: (out / name).read_bytes() for name in ("result.json", "result.md", "plan.json")}
    lost = next((out / "few" / "images").glob("*-tile-lse-*.png"))
    lost.unlink()
    monkeypatch.setattr(run, "sparse_costs", taken_twice)
    again = run_suite(sparse_suite(), out)
    assert lost.is_file() and again.result == first.result
    assert before == {name: (out / name).read_bytes() for name in before}
    assert "seconds" not in (out / "result.json").read_text()


def test_the_page_says_all_of_it(done):
    out, outcome = done
    page = result_page(outcome.result)
    few = outcome.result["measurements"]["few"]
    assert few["goal"]["outcome"] in ("met", "not met") and list(few["goal"]["tried"]) == [
        "tile + lse"
    ]
    assert f"the interval above zero: {few['goal']['outcome']}.**" in page
    assert "256 tokens (4 x 8 x 8), 4 steps" in page and "They speak of these prompts only" in page
    tile = few["variants"]["tile"]["likeness"]["psnr"]
    assert (
        f"| tile | 0.625 | {few['variants']['tile']['computed']:.3f} | {tile['mean']:.2f} [" in page
    )
    assert "differences in dB" in page and "frames" in page and "direction" in page
    spent = json.loads((out / "costs.json").read_text())
    share = spent["dense"]["few"]["attention_share"]
    assert 0 < share < 1
    for name, each in spent["measurements"]["few"].items():
        computed = few["variants"][name]["computed"]
        assert each["amdahl"] == pytest.approx(1 - share * (1 - computed), abs=1e-3)
    told = costs_page(spent)
    assert "Faster than dense: " in told and "denoising over dense" in told
    assert {path.name for path in outcome.files} >= {"few.png", "result.md", "costs.md"}
    with Image.open(out / "few.png") as plot:
        assert plot.width > 400


def test_publishing_puts_plot_table_and_time_into_the_page(
    done, sparse_suite, tmp_path, monkeypatch
):
    out, _ = done
    monkeypatch.setattr(run, "sparse_costs", taken_twice)
    (tmp_path / "docs").mkdir()
    sparse_suite()
    evaluate(str(tmp_path / "sparse.yaml"), out, publish=tmp_path / "docs")
    page = (tmp_path / "docs" / "evaluation.md").read_text()
    assert page == published_page(tmp_path / "docs" / "evaluation")
    assert "![few](evaluation/sparse/few.png)" in page and "### few: time" in page


# ---- the verdict


def variant(density, mean, gain=None):
    around = {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 24}
    over = None if gain is None else {"over": "mask", "mean": gain[1], "low": gain[0], "high": 99.0}
    return {"density": density, "likeness": {"psnr": around}, "gain": over}


@pytest.mark.parametrize(
    "each, outcome",
    [
        (variant(0.34, 31, (2, 4)), "met"),
        (variant(0.36, 31, (2, 4)), "not measured"),
        (variant(0.34, 29, (2, 4)), "not met"),
        (variant(0.34, 31, (2, 2.9)), "not met"),
        (variant(0.34, 31, (-0.1, 4)), "not met"),
        (variant(0.34, 31), "not measured"),
    ],
)
def test_the_goal_wants_all_of_it_from_one_variant(each, outcome):
    spec = Sparsity(tokens=1, closer=Planted(variant="x", share=1.0))
    found = fidelity.goal({"mask": variant(0.1, 50), "it": each}, spec)
    assert found["outcome"] == outcome
    assert fidelity.goal({"it": each, "good": variant(0.3, 30, (1, 3))}, spec)["outcome"] == "met"
