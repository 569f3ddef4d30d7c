"""The zoo's API."""

import subprocess
import sys

import numpy as np
import pytest

from attn_control import zoo
from attn_control.errors import AttnControlError


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


@pytest.mark.parametrize("name", zoo.NAMES)
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
