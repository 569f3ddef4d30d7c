"""Model cards: every number from the run, the folder or a published evaluation, none besides."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from attn_control import AttnControlError, zoo
from attn_control.zoo import card

SHIPPED = pytest.mark.skipif(
    not (Path(zoo.__file__).parent / "models").is_dir(), reason="no weights in this checkout"
)
TRAINED = {
    "scenes": 1200,
    "denoiser": {"steps": 300, "losses": {"coarse": 0.25, "fine": 0.5}},
    "settings": {"steps": 400, "single": 1.5},
    "autoencoder": {"steps": None, "losses": {}},
}


def published():
    return json.loads(card.RESULT.read_text(encoding="utf-8")) if card.RESULT.is_file() else None


@SHIPPED
@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_shipped_cards_say_what_the_generator_says(name):
    """After a training or an evaluation: `python -m attn_control.zoo.card NAME` writes it anew."""
    folder = zoo.path(name)
    if published() is None:
        pytest.skip("the published evaluation is not in this checkout")
    made = card.card(name, folder, card.trained_of(folder), published())
    assert (folder / "README.md").read_text(encoding="utf-8") == made


@SHIPPED
@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_score_on_a_shipped_card_is_in_the_published_result(name):
    """Read back from the card and looked up in the JSON, without the generator."""
    text = (zoo.path(name) / "README.md").read_text(encoding="utf-8")
    section = text.split("## Scores\n")[1].split("\n## ")[0]
    if section.strip().startswith("Not yet measured"):
        assert not re.search(r"\d", section)
        return
    numbers = set()

    def collect(value):
        if isinstance(value, dict):
            if {"mean", "low", "high"} <= set(value):
                numbers.add(tuple(round(100 * value[k], 1) for k in ("mean", "low", "high")))
            value = list(value.values())
        if isinstance(value, list):
            for each in value:
                collect(each)

    result = published()
    collect({job: m for job, m in result["measurements"].items() if m["model"] == name})
    found = re.findall(r"([-+\d.]+)(?: %)? \[([-+\d.]+), ([-+\d.]+)\]", section)
    assert len(found) >= 8
    for triple in found:
        value = tuple(map(float, triple))
        assert any(np.allclose(value, known, atol=0.051) for known in numbers), triple


@SHIPPED
@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_digest_is_the_one_that_evaluations_write_down(name):
    from attn_control.render.models import ModelChoice, fingerprint

    choice = ModelChoice("zoo", name, None, None, "float32", "cpu")
    assert fingerprint(choice)["weights"] == card.weights_of(zoo.path(name))


@SHIPPED
@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_code_on_a_card_runs(name, monkeypatch):
    text = (zoo.path(name) / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    given = zoo.defaults
    monkeypatch.setattr(zoo, "defaults", lambda n: given(n) | {"num_inference_steps": 1})
    names = {}
    exec(code, names)  # noqa: S102
    made = names.get("image") or names["frames"]
    assert made.size == (128, 128) if "image" in names else len(made) == 17


@SHIPPED
@pytest.mark.parametrize("name", zoo.NAMES)
def test_parts_parameters_and_bytes_are_the_folder_s(name):
    folder = zoo.path(name)
    text = (folder / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| `\w+` \| ([\d,]+|-) \| [\d,]+ \|$", text, re.M))
    parts = {p.name for p in folder.iterdir() if p.is_dir()}
    assert set(rows) == parts
    for part, module in zoo.load(name).components.items():
        if isinstance(module, torch.nn.Module):
            count = sum(p.numel() for p in module.parameters())
            assert int(rows[part].replace(",", "")) == count


@pytest.mark.parametrize("name", zoo.NAMES)
def test_people_have_said_something_of_every_model(name):
    said = card.texts(name)
    assert set(said) == {"what", "example", "data", "loss", "history", "limits"} and all(
        said.values()
    )
    assert f'zoo.load("{name}")' in said["example"]
    compile(said["example"], name, "exec")
    with pytest.raises(AttnControlError, match="says nothing of 'shapes-x'"):
        card.texts("shapes-x")


def test_facts_are_what_the_run_left(tmp_path):
    """Losses by kind of the last 200 steps up to the checkpoint, a repeated step once."""
    own, others = tmp_path / "own", tmp_path / "others"
    for folder in (own, others / "vae"):
        folder.mkdir(parents=True)
    (own / "vae").symlink_to(others / "vae")
    np.save(own / "latents-0.npy", np.zeros((3, 1)))
    np.save(own / "latents-1.npy", np.zeros((4, 1)))
    state = {"settings": {"steps": 900, "widths": (1, 2)}, "step": 400, "model": {}}
    torch.save(state, own / "denoiser.pt")
    lines = [
        {"step": 200, "fine": 9.0, "s_per_step": 7.0},
        {"step": 250, "fine": 8.0, "coarse": 1.0, "s_per_step": 7.0},
        {"step": 300, "fine": 8.0, "s_per_step": 7.0},
        {"step": 300, "fine": 2.0, "s_per_step": 7.0},  # resumed at 250, and logged again
        {"step": 350, "coarse": 2.0, "s_per_step": 7.0},
        {"step": 400, "fine": 5.0, "s_per_step": 7.0},
        {"step": 450, "fine": 99.0, "s_per_step": 7.0},  # after the checkpoint
    ]
    (own / "denoiser.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (others / "autoencoder.jsonl").write_text('{"step": 50, "loss": 0.125}\n')
    assert card.facts(own, own) == {
        "scenes": 7,
        "denoiser": {"steps": 400, "losses": {"coarse": 1.5, "fine": 5.0}},
        "settings": {"steps": 900, "widths": [1, 2]},
        "autoencoder": {"steps": 50, "losses": {"loss": 0.125}},
    }


@SHIPPED
def test_what_was_not_measured_is_not_on_the_card(tmp_path):
    name = "shapes-sd3"
    folder = tmp_path / name
    shutil.copytree(zoo.path(name), folder)
    weights = card.weights_of(folder)
    result = {
        "suite": "zoo", "spread": None,
        "bars": [{"job": "one", "variant": "CFG", "verdict": "right", "where": "all",
                  "found": {"mean": 0.5}, "target": 0.6, "outcome": "below"}],
        "measurements": {"one": {
            "model": name, "weights": {"weights": weights}, "baseline": "no CFG",
            "variants": {
                "no CFG": {"groups": {"all": {"right": share(0.25)}}, "against": {}},
                "CFG": {"groups": {"all": {"right": share(0.5)}},
                        "against": {"no CFG": {"all": share(0.25)}}},
            },
        }},
    }  # fmt: skip

    def scores(given):
        text = card.write(name, folder, TRAINED, given).read_text(encoding="utf-8")
        return text.split("## Scores\n")[1].split("\n## ")[0]

    assert "| all | 8 | 25.0 % [15.0, 35.0] | 50.0 % [40.0, 60.0] | +25.0 [+15.0, +35.0] |" in (
        scores(result)
    )
    assert "| CFG | right | all | 50.0 % | 60 % | - | below |" in scores(result)
    other = copy.deepcopy(result)
    other["measurements"]["one"]["weights"]["weights"] = "0" * 16
    short = {**result, "spread": 20}
    elsewhere = copy.deepcopy(result)
    elsewhere["measurements"]["one"]["model"] = "shapes-wan"
    for given in (elsewhere, short, other, None):
        assert scores(given).strip().startswith("Not yet measured")
        assert not re.search(r"\d", scores(given))

    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "- Data: 1,200 scenes" in text and "300 steps of 400 planned" in text
    assert "coarse 0.2500, fine 0.5000" in " ".join(text.split())
    assert "Autoencoder: steps not logged; no loss was logged." in text
    assert "- Settings: steps 400, single 1.5." in text
    assert card.weights_of(folder) == weights  # the card is no part of the weights
    assert card.trained_of(folder) == TRAINED
    card.main([name, "--folder", str(folder), "--result", str(tmp_path / "none.json")])
    assert (folder / "README.md").read_text(encoding="utf-8") == text
    (folder / "README.md").write_text("# mine\n")
    with pytest.raises(AttnControlError, match="tells nothing of the training"):
        card.main([name, "--folder", str(folder)])
    with pytest.raises(AttnControlError, match="name one model, got 0"):
        card.main(["--folder", str(folder)])


def share(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 8}
