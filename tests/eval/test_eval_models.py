"""Suites of textures and videos: numbers against plain counting, and toy models from end to end."""

from __future__ import annotations

import json
import statistics
import types

import numpy as np
import pytest
from eval.video_painter import Frames, VideoPainter, backwards, empty
from PIL import Image
from render import fakes
from tiny_zoo import export_tiny

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.eval.groups import Where
from attn_control.eval.run import prepare_suite, run_suite
from attn_control.eval.suite import FOLDER, load_suite, part_names, suite_names
from attn_control.eval.tables import result_page
from attn_control.zoo.prompts import spread, traits
from attn_control.zoo.references import draw_reference

ZOO_PARTS = [part for part in part_names() if part.startswith("zoo/")]


class Painter:
    """Answers a prompt of shapes-flux rightly or with another texture, by its seed."""

    vae_scale_factor = 8
    scheduler = types.SimpleNamespace()

    def set_progress_bar_config(self, **_):
        pass

    def __call__(
        self, prompt=None, image=None, height=128, width=128, num_inference_steps=2,
        true_cfg_scale=1.0, negative_prompt=None, generator=None, output_type="pil",
        max_sequence_length=24,
    ):  # fmt: skip
        seed, texture = generator.initial_seed(), None
        if image is not None:
            textures = ("plain", "striped", "barred", "checked", "dotted")
            shown = {t: draw_reference(t, s) for t in textures for s in [self.by_seed[seed]]}
            texture = next(t for t, each in shown.items() if np.array_equal(each, image))
            if wrong_texture(seed):
                texture = next(t for t in textures if t != texture)
        return types.SimpleNamespace(
            images=[Image.fromarray(zoo.draw_truth("shapes-flux", prompt, seed, texture))]
        )


def wrong_texture(seed):
    return seed % 4 == 0


FLUX = """\
question: Does the painter carry textures over?
measurements:
  paint:
    baseline: plain
    groups: [{reference: true}, {reference: false}, {texture: dotted}, {}]
    planted: {variant: plain, share: 0.9}
    rounds: 1
    job:
      model: shapes-flux
      prompts: {zoo: shapes-flux, spread: 40}
      seeds: own
      sampler: {num_inference_steps: 2, extra: {true_cfg_scale: 1.0}}
      variants: {plain: {}}
bars:
  - {job: paint, variant: plain, verdict: texture, where: {reference: true}, target: 0.7}
"""
WAN = FLUX.replace("shapes-flux", "shapes-wan").replace("spread: 40", "spread: 8")
WAN = WAN.replace(", extra: {true_cfg_scale: 1.0}", "")
WAN = WAN.replace(
    "[{reference: true}, {reference: false}, {texture: dotted}, {}]",
    "[{objects: 1}, {crossing: behind}, {direction: left}, {}]",
)
WAN = (
    WAN[: WAN.index("bars")]
    + """\
bars:
  - {job: paint, variant: plain, verdict: frames, where: {objects: 1}, target: 0.9, floor: 0.8}
  - {job: paint, variant: plain, verdict: direction, target: 0.8, floor: 0.7}
"""
)


@pytest.fixture
def paint(monkeypatch, tmp_path):
    """Runs a suite on a painter; gives the rows of its prompts and the outcome."""
    monkeypatch.setattr("attn_control.attach", fakes.fake_attach([]), raising=False)
    monkeypatch.setattr(zoo, "path", lambda name: tmp_path)

    def run(painter, text):
        monkeypatch.setattr(zoo, "load", lambda name, **_: painter)
        monkeypatch.setattr("attn_control.zoo.references.with_references", lambda pipe: pipe)
        (tmp_path / "suite.yaml").write_text(text)
        suite = load_suite(str(tmp_path / "suite.yaml"))
        model = suite.suite.measurements["paint"].job["model"]
        count = suite.suite.measurements["paint"].job["prompts"]["spread"]
        return spread(zoo.load_prompts(model), count), run_suite(suite, tmp_path / "out")

    return run


def test_textures_are_counted_by_group_and_held_against_their_bar(paint):
    painter = Painter()
    fixed = zoo.load_prompts("shapes-flux")
    painter.by_seed = {row["seed"]: row["reference"]["seed"] for row in fixed if row["reference"]}
    rows, outcome = paint(painter, FLUX)
    groups = outcome.result["measurements"]["paint"]["variants"]["plain"]["groups"]
    pointing = [row for row in rows if row["reference"]]
    want = statistics.mean(not wrong_texture(row["seed"]) for row in pointing)
    found = groups["with a reference"]["texture"]
    assert found["n"] == len(pointing) and found["mean"] == pytest.approx(want, abs=1e-6)
    assert groups["with a reference"]["bound"]["mean"] == 1 > want
    assert groups["without a reference"]["right"]["mean"] == 1
    dotted = [row for row in pointing if row["reference"]["texture"] == "dotted"]
    assert groups["dotted reference"]["right"]["n"] == len(dotted) > 0
    (bar,) = outcome.result["bars"]
    assert bar["found"] == found and bar["outcome"] == ("met" if want >= 0.7 else "below")
    planted = outcome.result["measurements"]["paint"]["planted"]
    assert planted["passed"] and planted["changed_when_read_back"] == 0
    page = result_page(outcome.result)
    assert "texture: with a reference" in page and "Differences in being right" not in page


def test_videos_are_counted_by_frame_and_a_share_is_no_truth_value(paint):
    rows, outcome = paint(VideoPainter(), WAN)
    groups = outcome.result["measurements"]["paint"]["variants"]["plain"]["groups"]
    alone = [row for row in rows if row["objects"] == 1]
    want = statistics.mean(1 - empty(row["seed"], row["prompt"]) / 17 for row in alone)
    found = groups["one object"]["frames"]
    assert 0.82 < want < 1 and found["mean"] == pytest.approx(want, abs=1e-6)
    kinds = [traits("shapes-wan", row) for row in rows]
    behind = [row for row, kind in zip(rows, kinds, strict=True) if kind["crossing"] == "behind"]
    assert groups["crossing behind"]["frames"]["n"] == len(behind) > 0
    direction = statistics.mean(not backwards(row["seed"]) for row in rows)
    assert groups["all"]["direction"]["mean"] == pytest.approx(direction, abs=1e-6)
    frames, turned = outcome.result["bars"]
    assert frames["found"] == found and frames["outcome"] == (
        "met" if want >= 0.9 else "above the floor"
    )
    assert turned["found"] == groups["all"]["direction"]
    assert direction < 0.7 and turned["outcome"] == "below"
    planted = outcome.result["measurements"]["paint"]["planted"]
    assert planted["passed"] and planted["changed_when_read_back"] == 0
    page = result_page(outcome.result)
    assert "frames: one object" in page and "direction: all" in page


def test_a_scorer_that_cannot_judge_is_one_error(paint):
    text = WAN.replace("num_inference_steps: 2", "num_inference_steps: 2, num_frames: 3")
    paint_three = VideoPainter.__call__

    class Three(VideoPainter):
        def __call__(self, prompt=None, num_frames=3, num_inference_steps=2, guidance_scale=1.0,
                     generator=None, output_type="pil", height=128, width=128,
                     max_sequence_length=24):  # fmt: skip
            out = paint_three(self, prompt, generator=generator)
            return Frames(frames=[out.frames[0][:3]])

    with pytest.raises(AttnControlError, match="scorer of shapes-wan cannot judge.*5 frames"):
        paint(Three(), text)


@pytest.fixture(scope="session")
def flux_toy(tmp_path_factory):
    """A folder with a toy of shapes-flux."""
    return export_tiny(tmp_path_factory.mktemp("flux"), "shapes-flux")


def test_every_model_has_a_part_of_the_zoo_suite():
    assert set(ZOO_PARTS) == {f"zoo/{name}" for name in zoo.NAMES}
    assert load_suite("zoo").suite.parts == [f"zoo/{name}" for name in zoo.NAMES]
    assert suite_names() == ("guidance", "video", "zoo")


@pytest.mark.parametrize("part", ZOO_PARTS)
def test_each_part_fits_its_model(part, tmp_path):
    name = part.split("/")[1]
    suite = load_suite(part)
    (prepared,) = prepare_suite(suite, tmp_path / "out", 5).values()
    assert (prepared.choice.name, len(prepared.prompts)) == (name, 5)
    assert {bar.job for bar in suite.suite.bars} == set(suite.suite.measurements) == {name}
    assert prepared.things == ("videos" if name == "shapes-wan" else "pictures")


def toy_suite(tmp_path, part, *changes):
    text = (FOLDER / f"{part}.yaml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "toy.yaml").write_text(text)
    return load_suite(str(tmp_path / "toy.yaml"))


def test_a_toy_of_shapes_wan_from_end_to_end(wan_toy, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(wan_toy))
    small = "{num_inference_steps: 1, height: 64, width: 64, num_frames: 5}"
    suite = toy_suite(
        tmp_path, "zoo/shapes-wan",
        ("seeds: own", f"seeds: own\n      sampler: {small}"),
        ("prompts: 5, steps: 12, at: [2, 6, 10]", "prompts: 2, steps: 2, at: [1]"),
        ("CFG: {}", "CFG: {}\n        no CFG: {sampler: {guidance_scale: 1.0}}"),
        ("rounds: 2", "rounds: 1"),
    )  # fmt: skip
    outcome = run_suite(suite, tmp_path / "out", spread=5)
    result = outcome.result["measurements"]["shapes-wan"]
    mass = result["mass"]
    assert (mass["prompts"], mass["steps"], mass["at"]) == (2, 2, [1]) and len(mass["heads"]) > 1
    assert mass["share"]["mean"] == pytest.approx(statistics.mean(mass["near_by_prompt"]))
    bar = next(bar for bar in outcome.result["bars"] if bar["verdict"] == "mass")
    assert bar["found"] == mass["share"]
    assert bar["outcome"] == ("met" if mass["share"]["mean"] >= 0.5 else "below")
    likeness = {name: each["likeness"] for name, each in result["variants"].items()}
    assert likeness["CFG"]["psnr"]["mean"] == 100 > likeness["no CFG"]["psnr"]["mean"]
    assert "Attention mass, CFG, 2 prompts, 1 of 2 steps" in result_page(outcome.result)
    costs = json.loads((tmp_path / "out" / "costs.json").read_text())
    assert costs["rounds"] == {"shapes-wan": 1}
    assert (tmp_path / "out" / "shapes-wan" / "sheet.png").is_file()
    first = (tmp_path / "out" / "result.json").read_bytes()
    run_suite(suite, tmp_path / "out", spread=5)
    assert (tmp_path / "out" / "result.json").read_bytes() == first


def test_a_toy_of_shapes_flux_from_end_to_end(flux_toy, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(flux_toy))
    suite = toy_suite(
        tmp_path, "zoo/shapes-flux",
        ("seeds: own", "seeds: own\n      sampler: {num_inference_steps: 1}"),
        ("    baseline:", "    rounds: 1\n    baseline:"),
    )  # fmt: skip
    outcome = run_suite(suite, tmp_path / "out", spread=5)
    groups = outcome.result["measurements"]["shapes-flux"]["variants"]["CFG"]["groups"]
    counts = [groups[name]["right"]["n"] for name in ("with a reference", "without a reference")]
    assert counts == [3, 2] and set(groups["all"]) == set(zoo.verdicts("shapes-flux"))
    assert {path.name for path in outcome.files} >= {"shapes-flux.png", "result.md", "costs.md"}


WRONG = [
    ("{texture: dotted}", "{crossing: behind}", ["groups[2].crossing", "told apart by", "texture"]),
    ("{texture: dotted}", "{texture: furry}", ["groups[2]", "no prompt", "furry reference"]),
    ("{texture: dotted}", "{split: seen, objects: 3}", ["groups[2]", "seen, 3 objects"]),
    ("verdict: texture", "verdict: frames", ["bars[0].verdict", "'frames'", "texture, mass"]),
    ("verdict: texture", "verdict: mass", ["bars[0].verdict", "measures no mass", "'plain'"]),
    ("where: {reference: true}", "where: {direction: up}", ["bars[0].where.direction"]),
    ("rounds: 1", "rounds: 1\n    mass: {variant: plane}", ["paint.mass.variant", "'plane'"]),
    ("rounds: 1", "rounds: 0", ["rounds", "greater than or equal to 1"]),
    ("verdict: texture, where", "verdict: mass, where", ["measures no mass"]),
    ("measurements:", "parts: [zoo/shapes-sd4]\nmeasurements:", ["parts[0]", "zoo/shapes-sd3"]),
    ("measurements:", "parts: [zoo]\nmeasurements:", ["parts[0]", "'zoo' has parts of its own"]),
    ("measurements:", "parts: [zoo/shapes-sd3, zoo/shapes-sd3]\nmeasurements:",
     ["parts[1]", "'shapes-sd3' again"]),
]  # fmt: skip


@pytest.mark.parametrize("old, new, words", WRONG, ids=[new for _, new, _ in WRONG])
def test_a_mistake_is_told_when_the_suite_is_read(tmp_path, old, new, words):
    assert old in FLUX
    (tmp_path / "suite.yaml").write_text(FLUX.replace(old, new, 1))
    with pytest.raises(AttnControlError) as caught:
        load_suite(str(tmp_path / "suite.yaml"))
    assert all(word in str(caught.value) for word in ["suite.yaml", *words]), str(caught.value)


def test_a_bar_on_mass_takes_no_group(tmp_path):
    text = FLUX.replace("rounds: 1", "rounds: 1\n    mass: {variant: plain}")
    (tmp_path / "suite.yaml").write_text(text.replace("verdict: texture", "verdict: mass"))
    with pytest.raises(AttnControlError, match="neither 'against' nor 'where'"):
        load_suite(str(tmp_path / "suite.yaml"))


def test_mass_needs_a_variant_without_controls(wan_toy, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(wan_toy))
    suite = toy_suite(
        tmp_path, "zoo/shapes-wan", ("CFG: {}", "CFG: {controls: [{SoftPAG: {heads: L1}}]}")
    )
    with pytest.raises(AttnControlError, match="mass.variant: 'CFG' has controls"):
        prepare_suite(suite, tmp_path / "out", 5)


def test_a_suite_of_parts_has_all_of_theirs_and_a_digest_of_all(tmp_path):
    (tmp_path / "one.yaml").write_text(FLUX)
    (tmp_path / "whole.yaml").write_text("question: All?\nparts: [zoo/shapes-sd3, one.yaml]\n")
    whole = load_suite(str(tmp_path / "whole.yaml"))
    assert list(whole.suite.measurements) == ["shapes-sd3", "paint"]
    assert [bar.job for bar in whole.suite.bars] == ["shapes-sd3"] * 3 + ["paint"]
    assert whole.suite.question == "All?"
    (tmp_path / "one.yaml").write_text(FLUX.replace("target: 0.7", "target: 0.6"))
    assert load_suite(str(tmp_path / "whole.yaml")).digest != whole.digest
    (tmp_path / "none.yaml").write_text("question: None?\n")
    with pytest.raises(AttnControlError, match="needs 'measurements' or 'parts'"):
        load_suite(str(tmp_path / "none.yaml"))


def test_groups_say_what_they_are():
    row = {"split": "seen", "objects": 1, "reference": True, "texture": "dotted"}
    assert Where(reference=True).holds(row) and not Where(reference=False).holds(row)
    assert str(Where(texture="dotted", objects=1)) == "one object, dotted reference"
    assert str(Where(direction="up", crossing="in front of")) == "moving up, crossing in front of"
