"""Bad jobs: each is one error that names the place and the value, before any picture exists."""

from __future__ import annotations

import json

import pytest
from render.fakes import JOB

from attn_control.errors import AttnControlError
from attn_control.render.command import render

PROMPTS = "[a red circle, a blue square]"
SOFT = "{heads: L1H0, u: 0.5, scale: 2.0}"

# (what is wrong, old text, new text, words that the message must hold)
BAD = [
    ("malformed yaml", "seeds: 0-1", "seeds: [0, 1", ["job.yaml:4:", "not valid YAML"]),
    ("tab", "sampler: {", "\tsampler: {", ["job.yaml:4:1", "\\t"]),
    ("key twice", "seeds: 0-1", "seeds: 0-1\nseeds: 2", ["job.yaml:4:1", "seeds", "line 3"]),
    ("python tag", "seeds: 0-1", "seeds: !!python/name:os.system", ["job.yaml:3:8", "python/name"]),
    ("unknown key", "seeds:", "seed:", ["job.yaml:3:1", "seed: unknown key", "'seeds'"]),
    ("missing key", "seeds: 0-1\n", "", ["job.yaml:1:1", "'seeds' is missing"]),
    ("unknown sampler key", "num_inference_steps", "steps", ["job.yaml:4:11", "sampler.steps"]),
    ("text for a number", "height: 32", "height: '32'", ["job.yaml:4:", "sampler.height", "'32'"]),
    ("no steps", "num_inference_steps: 3", "num_inference_steps: 0",
     ["num_inference_steps", "got 0"]),
    ("nan guidance", "scale: 1.0}}", "scale: .nan}}",
     ["variants.plain.sampler.guidance_scale", "nan"]),
    ("empty value", "  cfg: {}", "  cfg: {sampler: }",
     ["job.yaml:7:9", "variants.cfg.sampler", "no value"]),
    ("seeds backwards", "0-1", "7-0", ["job.yaml:3:1", "seeds", "'7-0'", "backwards"]),
    ("seeds nonsense", "0-1", "many", ["job.yaml:3:1", "'many'", "0-7"]),
    ("seeds negative", "0-1", "[-1]", ["seed -1"]),
    ("seeds twice", "0-1", "[3, 1-4]", ["seed 3 is given twice"]),
    ("seeds without end", "0-1", "0-99999999999", ["0-99999999999", "100000"]),
    ("own seeds of a list", "0-1", "own", ["seeds", "'own'", "zoo"]),
    ("seeds a float", "0-1", "[0.5]", ["0.5 is not a seed"]),
    ("no prompts", PROMPTS, "[]", ["job.yaml:2:1", "prompts", "empty"]),
    ("empty prompt", PROMPTS, "[a, '  ']", ["job.yaml:2:14", "prompts[1]", "empty"]),
    ("prompt twice", PROMPTS, "[a, a]", ["prompts[1]", "'a' is already prompt 0"]),
    ("prompt a number", PROMPTS, "[3]", ["prompts[0]", "got 3"]),
    ("no such prompts file", PROMPTS, "no.txt", ["job.yaml:2:1", "no.txt", "a list"]),
    ("prompts of nowhere", PROMPTS, "{zoo: shapes-sd9}",
     ["job.yaml:2:11", "shapes-sd9", "shapes-sd3"]),
    ("no such split", PROMPTS, "{zoo: shapes-sd3, split: train}",
     ["prompts.split", "'train'", "'seen'"]),
    ("two sources", PROMPTS, "{zoo: shapes-sd3, file: a}", ["prompts", "text file"]),
    ("offset too far", PROMPTS, "{zoo: shapes-sd3, offset: 8}", ["offset 8", "of 8"]),
    ("no variants", JOB[JOB.index("variants") :], "variants: {}", ["job.yaml:5:1", "at least one"]),
    ("variants twice", "  cfg: {}", "  plain: {}", ["job.yaml:7:3", "variants.plain", "line 6"]),
    (
        "listed variants twice",
        JOB[JOB.index("variants") :],
        "variants:\n  - {name: a}\n  - {name: a}\n",
        ["job.yaml:7:5", "variants[1]", "'a'"],
    ),
    ("variant key", "    controls:", "    control:",
     ["job.yaml:9:5", "variants.soft.control", "'controls'"]),
    ("controls no list", "  cfg: {}", "  cfg: {controls: SoftPAG}",
     ["variants.cfg.controls", "a list"]),
    ("unknown control", "SoftPAG", "SoftPEG", ["job.yaml:10:", "SoftPEG", "SoftPAG"]),
    ("unknown option", SOFT, "{heads: L1, scal: 2}",
     ["job.yaml:10:", "soft.controls[0]", "'scal'"]),
    ("no heads", SOFT, "{u: 0.5}", ["job.yaml:10:", "'heads'"]),
    ("nan scale", "scale: 2.0", "scale: .nan", ["SoftPAG.scale", "nan"]),
    ("u too large", "u: 0.5", "u: 1.5", ["SoftPAG.u", "1.5"]),
    ("selector", "heads: L1H0", "heads: L1H", ["SoftPAG.heads", "L1H", "character"]),
    ("empty match", "heads: L1H0", "heads: L99", ["job.yaml:10:", "soft.controls[0]", "L99"]),
    ("no step", SOFT, "{heads: L1, window: 0.4-0.5}",
     ["soft.controls[0]", "0.4-0.5", "no step of 3"]),
    ("compare", "seeds: 0-1", "seeds: 0-1\ncompare: [cgf]", ["compare", "'cgf'", "'cfg'"]),
    ("wrong sampler key", "height: 32", "extra: {true_cfg_scale: 4}",
     ["extra.true_cfg_scale", "FakePipe"]),
    ("close sampler key", "height: 32", "extra: {clip_skipp: 4}", ["clip_skipp", "'clip_skip'"]),
    ("own sampler key", "height: 32", "extra: {generator: 4}", ["extra.generator", "'seeds'"]),
    ("doubled sampler key", "height: 32", "extra: {height: 4}",
     ["extra.height", "outside 'extra'"]),
    ("size", "height: 32", "height: 36", ["job.yaml:4:", "sampler.height", "36", "multiple of 8"]),
    (
        "negative prompt without cfg",
        "guidance_scale: 1.0",
        "guidance_scale: 1.0, negative_prompt: blurry",
        ["plain.sampler.negative_prompt", "ignored without CFG"],
    ),
    ("negative prompt that the job's scale makes void",
     "sampler: {guidance_scale: 1.0}}\n  cfg: {}",
     "sampler: {negative_prompt: blurry, guidance_scale: 0.5}}\n  cfg: {}",
     ["job.yaml:6:", "plain.sampler.negative_prompt", "ignored without CFG"]),
    ("negative prompt for nobody", "height: 32,",
     "guidance_scale: 1.0, negative_prompt: x, height: 32,",
     ["job.yaml:4:", "sampler.negative_prompt", "in some variant"]),
    ("unknown model", "shapes-sd3", "shapes-sd9", ["job.yaml:1:1", "shapes-sd9", "'shapes-sd3'"]),
    ("no such folder", "shapes-sd3", "./nowhere/model", ["./nowhere/model", "folder"]),
    ("revision of a built-in", "shapes-sd3", "{name: shapes-sd3, revision: v2}",
     ["revision", "'v2'"]),
    ("dtype", "shapes-sd3", "{name: shapes-sd3, dtype: fp8}", ["model.dtype", "'fp8'", "float32"]),
    ("device", "shapes-sd3", "{name: shapes-sd3, device: gpu}", ["model.device", "'gpu'"]),
]  # fmt: skip


def refused(world, tmp_path, text, out=None):
    """Run a bad job; its message, after checking that nothing was drawn or left behind."""
    target = out or tmp_path / "out"
    with pytest.raises(AttnControlError) as caught:
        render(world.job(text), target)
    assert not world.calls, "a picture was rendered"
    if out is None:
        assert not target.exists(), "the folder was created"
    assert world.log.count("closed") == sum(line.startswith("attached") for line in world.log)
    return str(caught.value)


@pytest.mark.parametrize("old,new,words", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_jobs_are_refused(world, tmp_path, old, new, words):
    assert old in JOB
    message = refused(world, tmp_path, JOB.replace(old, new, 1))
    for word in words:
        assert word in message, message
    assert len(message) < 500


@pytest.mark.parametrize(
    "text,words",
    [
        ("", ["empty"]),
        ("- a\n- b\n", ["expected keys"]),
        ("just text\n", ["expected keys", "just text"]),
        ("a: &x [*x]\n", ["alias", "a[0]"]),
        ("a: 1\n---\nb: 2\n", ["job.yaml:2:1", "single document"]),
    ],
)
def test_files_that_are_no_job(world, tmp_path, text, words):
    message = refused(world, tmp_path, text)
    assert all(word in message for word in words), message


def test_aliases_that_multiply_are_stopped(world, tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, 9)]
    assert "more than 200000" in refused(world, tmp_path, "\n".join(lines))


def test_job_files_that_cannot_be_read(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("prompts: [un carré]".encode("latin-1"))
    for path, words in [
        (tmp_path / "none.yaml", "no such job file"),
        (tmp_path, "this is a folder"),
        (latin, "byte 17 is not UTF-8"),
    ]:
        with pytest.raises(AttnControlError, match=words):
            render(path, tmp_path / "out")


def test_a_prompts_file_in_another_encoding(world, tmp_path):
    (tmp_path / "lines.txt").write_bytes("un carré".encode("latin-1"))
    message = refused(world, tmp_path, JOB.replace(PROMPTS, "lines.txt"))
    assert "lines.txt" in message and "UTF-8" in message


def test_an_out_that_is_a_file(world, tmp_path):
    out = tmp_path / "taken"
    out.write_text("mine")
    message = refused(world, tmp_path, JOB, out)
    assert "taken" in message and "is a file" in message
    assert out.read_text() == "mine"


def test_an_out_below_a_file(world, tmp_path):
    (tmp_path / "taken").write_text("mine")
    assert "taken" in refused(world, tmp_path, JOB, tmp_path / "taken" / "out")


def test_an_out_that_cannot_be_made(world, tmp_path):
    # /proc takes no folders, from root neither.
    from pathlib import Path

    out = Path("/proc/attn-control")
    with pytest.raises(AttnControlError, match="/proc"):
        render(world.job(JOB), out)
    assert not world.calls


def test_a_disk_without_room(world, tmp_path, monkeypatch):
    import collections
    import shutil

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    assert "12 pictures need up to 0.1 GB and the disk has 0.0 GB" in refused(world, tmp_path, JOB)


def pipeline_folder(path, class_name="StableDiffusionPipeline", **files):
    path.mkdir()
    (path / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    for name, content in files.items():
        part, _, file = name.partition("__")
        (path / part).mkdir(exist_ok=True)
        (path / part / file.replace("_", ".")).write_bytes(content)
    return path


def test_a_folder_with_pickled_weights_only(world, tmp_path):
    folder = pipeline_folder(
        tmp_path / "m", unet__weights_bin=b"\x80\x04K\x01.", vae__w_safetensors=b""
    )
    message = refused(world, tmp_path, JOB.replace("shapes-sd3", str(folder)))
    assert "'unet'" in message and "weights.bin" in message and "safetensors" in message


def test_a_folder_that_brings_code(world, tmp_path):
    folder = pipeline_folder(tmp_path / "m", unet__model_py=b"raise SystemExit")
    message = refused(world, tmp_path, JOB.replace("shapes-sd3", str(folder)))
    assert "holds code (model.py)" in message
    folder = pipeline_folder(tmp_path / "n", class_name=["pipeline", "Mine"])
    assert "'Mine'" in refused(world, tmp_path, JOB.replace("shapes-sd3", str(folder)))


def test_a_folder_that_is_no_pipeline(world, tmp_path):
    (tmp_path / "m").mkdir()
    message = refused(world, tmp_path, JOB.replace("shapes-sd3", "./m"))
    assert "model_index.json" in message and "job.yaml:1:1" in message
    (tmp_path / "m" / "model_index.json").write_text("[]")
    assert "not a JSON object" in refused(world, tmp_path, JOB.replace("shapes-sd3", "./m"))
    (tmp_path / "m" / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    message = refused(world, tmp_path, JOB.replace("shapes-sd3", "./m"))
    assert "cannot be loaded" in message and "NoSuchPipeline" in message


def test_a_single_file_model(world, tmp_path):
    (tmp_path / "m.ckpt").write_bytes(b"")
    message = refused(world, tmp_path, JOB.replace("shapes-sd3", str(tmp_path / "m.ckpt")))
    assert "m.ckpt" in message and "single file" in message
