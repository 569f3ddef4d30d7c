"""The zoo's API, and its evaluation of a painter whose pictures are known."""

import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.zoo import evaluate


def test_importing_the_zoo_is_light():
    code = (
        "import sys, attn_control.zoo as z; z.defaults('shapes-sd3'); z.is_scorable('x', 'y'); "
        "z.is_scorable('shapes-sd3', 'a red circle'); "
        "print([m for m in ('torch', 'diffusers', 'transformers', 'cv2') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_unknown_names_are_refused_with_the_known_ones():
    for call in (zoo.path, zoo.load, zoo.defaults, zoo.load_prompts):
        with pytest.raises(AttnControlError, match="shapes-sd3"):
            call("shapes-sd4")
    with pytest.raises(AttnControlError, match="shapes-sd3"):
        zoo.score("shapes-sd4", np.zeros((64, 64, 3), np.uint8), "a red circle")


def test_missing_weights_say_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(tmp_path))
    with pytest.raises(AttnControlError, match="ATTN_CONTROL_ZOO_DIR") as error:
        zoo.path("shapes-sd3")
    assert str(tmp_path) in str(error.value)


def test_the_environment_can_name_another_folder(tmp_path, monkeypatch):
    (tmp_path / "shapes-sd3").mkdir()
    (tmp_path / "shapes-sd3" / "model_index.json").write_text("{}")
    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(tmp_path))
    assert zoo.path("shapes-sd3") == tmp_path / "shapes-sd3"


def test_defaults_are_a_fresh_copy():
    zoo.defaults("shapes-sd3")["height"] = 1
    assert zoo.defaults("shapes-sd3")["height"] == 128


def test_what_is_scorable():
    assert zoo.is_scorable("shapes-sd3", "a red circle above a cyan ring")
    assert not zoo.is_scorable("shapes-sd3", "a photo of a dog")
    assert not zoo.is_scorable("sd3", "a red circle")
    moving = "a red circle moves right behind a blue square"
    for name, caption in {"shapes-flux": "a striped red circle", "shapes-wan": moving}.items():
        assert zoo.is_scorable(name, caption) and not zoo.is_scorable("shapes-sd15", caption)


@pytest.mark.parametrize("name", zoo.KNOWN)
def test_the_truth_scores_right_and_another_truth_does_not(name):
    rows = zoo.load_prompts(name)[::40]
    textures = [(row.get("reference") or {}).get("texture") for row in rows]
    for i, (row, texture) in enumerate(zip(rows, textures, strict=True)):
        truth = zoo.draw_truth(name, row["prompt"], i, texture)
        assert zoo.score(name, truth, row["prompt"], texture).right, row
        other = rows[i - 1]
        truth = zoo.draw_truth(name, other["prompt"], i, textures[i - 1])
        assert not zoo.score(name, truth, row["prompt"], texture).right, row


def test_a_reference_is_taken_only_by_the_model_that_knows_one():
    picture = np.zeros((128, 128, 3), np.uint8)
    with pytest.raises(AttnControlError, match="no references"):
        zoo.score("shapes-sd3", picture, "a red circle", "striped")


class Painter:
    """A pipeline that paints the truth where it is guided, and nothing elsewhere."""

    def __init__(self, name):
        self.name, self.seen = name, []

    def __call__(self, prompt, generator, **call):
        self.seen.append(call)
        scale = call.get("true_cfg_scale", call.get("guidance_scale"))
        assert all(len(v) == len(prompt) for v in call.values() if isinstance(v, list))
        truth = [
            zoo.draw_truth(self.name, p, g.initial_seed())
            for p, g in zip(prompt, generator, strict=True)
        ]
        truth = [t if scale > 1 else 0 * t for t in truth]
        if self.name == "shapes-wan":
            return types.SimpleNamespace(frames=np.stack(truth) / 255)
        return types.SimpleNamespace(images=[Image.fromarray(t) for t in truth])


@pytest.mark.parametrize("name", zoo.KNOWN)
def test_an_evaluation_of_a_perfect_painter(name, tmp_path, monkeypatch):
    rows = [row for row in zoo.load_prompts(name) if not row.get("reference")][::20]
    monkeypatch.setattr(zoo, "load_prompts", lambda name: rows)
    painter = Painter(name)
    scores = evaluate.evaluate(name, tmp_path, pipe=painter, batch=4)
    for row in scores:
        assert row["right"] == (row["setting"] != "no CFG"), row
    assert len(scores) == 2 * len(rows)
    text = (tmp_path / "table.md").read_text()
    parts = evaluate.PARTS.get(name, ("present",))
    assert all(f"| {part} |" in text for part in parts) and "100.0 % [100.0, 100.0]" in text
    assert len(list(tmp_path.glob("sheet-*.png"))) == 2
    keys = set(painter.seen[0]) & set(zoo.defaults(name))
    assert keys == set(zoo.defaults(name))


def test_intervals_and_subsets():
    mean, low, high = evaluate.interval(np.array([1.0] * 80 + [0.0] * 20))
    assert mean == 80 and 70 < low < 75 and 84 < high < 90
    rows = zoo.load_prompts("shapes-sd3")
    few = evaluate.subset(rows, 10)
    assert len(few) == 10 and {r["objects"] for r in few} == {1, 2}
    assert evaluate.subset(rows, None) == rows


def test_the_table_pairs_prompts():
    rows = zoo.load_prompts("shapes-sd3")
    scores = [{**r, "setting": s, "right": s == "CFG 3"} for s in ("CFG 3", "no CFG") for r in rows]
    text = evaluate.table(scores, ["CFG 3", "no CFG"])
    assert "| seen, one object | 80 | 100.0 % [100.0, 100.0] | 0.0 % [0.0, 0.0] | +100.0" in text
    assert "| heldout, all | 40 |" in text
