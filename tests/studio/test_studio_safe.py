"""Put on a network: what is uploaded or named is refused with a sentence, and nothing is read."""

from __future__ import annotations

import io
import pickle
import zipfile

import pytest
from PIL import Image

from attn_control.errors import AttnControlError
from attn_control.studio.models import allowed
from attn_control.studio.settings import Refused, Settings

GOOD = """\
model: shapes-sd3
prompts: [a red circle]
seeds: 3
sampler: {num_inference_steps: 3, height: 16, width: 16}
variants:
  plain: {}
  soft: {controls: [{SoftPAG: {heads: L1H0, scale: 2.0}}]}
"""


def picture():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as inside:
        inside.writestr("archive/data.pkl", b"\x80\x02.")
    return file.getvalue()


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was loaded')",))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
DEEP = "a: " + "[" * 20_000
UPLOADS = {
    "pickle": (pickle.dumps(Evil()), "pickle, which is never loaded"),
    "old pickle": (pickle.dumps(Evil(), protocol=0), "job"),
    "torch checkpoint": (archive(), "zip archive"),
    "png": (picture(), "PNG picture"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(100), "JPEG picture"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "gzip archive"),
    "program": (b"\x7fELF" + bytes(50), "program"),
    "gguf": (b"GGUF" + bytes(50), "GGUF model"),
    "pdf": (b"%PDF-1.7 ...", "PDF"),
    "too large": (b"# " + b"x" * 100_000, "at most 64000"),
    "binary": (bytes(range(1, 255)), "not UTF-8"),
    "null bytes": (b"model: shapes-sd3\0", "null bytes"),
    "utf-16": ("model: x".encode("utf-16"), "UTF-8"),
    "empty": (b"", "empty"),
    "html": (b"<html><script>alert(1)</script></html>", "expected keys"),
    "a list": (b"[1, 2, 3]", "expected keys"),
    "python tag": (b"!!python/object/apply:os.system ['true']", "could not determine"),
    "python module tag": (b"model: !!python/name:os.system", "could not determine"),
    "alias bomb": (BOMB.encode(), "more than"),
    "nested": (DEEP.encode(), "job"),
    "alias to itself": (b"a: &a [*a]", "alias"),
    "two documents": (GOOD.encode() + b"---\n" + GOOD.encode(), "not valid YAML"),
    "key twice": (GOOD.encode() + b"seeds: 4\n", "written twice"),
    "huge number": (GOOD.replace("seeds: 3", "seeds: " + "9" * 6000).encode(), "6000 digits"),
    "many seeds": (GOOD.replace("seeds: 3", "seeds: 0-999999999").encode(), "more than"),
    "unknown key": (GOOD.encode() + b"exec: rm\n", "unknown key"),
}
CHANGED = {
    "a prompts file": ("prompts: [a red circle]", "prompts: /etc/passwd", "reads no files"),
    "a prompts file by key": ("[a red circle]", "{file: ../../secret.txt}", "reads no files"),
    "a reference picture": ("[a red circle]", "[{prompt: x, image: /etc/passwd}]", "no files"),
    "a folder": ("model: shapes-sd3", "model: /etc", "no model of this studio"),
    "a way up": ("model: shapes-sd3", "model: ../../../etc", "no model of this studio"),
    "a home": ("model: shapes-sd3", "model: ~/models", "no model of this studio"),
    "a hub id": ("model: shapes-sd3", "model: owner/name", "no model of this studio"),
    "an address": ("model: shapes-sd3", "model: https://x.example/y", "no model of this studio"),
    "a revision": ("model: shapes-sd3", "model: {name: shapes-sd3, revision: x}", "model.revision"),
    "a device": ("model: shapes-sd3", "model: {name: shapes-sd3, device: cuda:7}", "model.device"),
    "other arguments": ("width: 16", "extra: {sigmas: [1, 0]}", "no place on the page"),
    "a callback": ("width: 16", "extra: {callback_on_step_end: x}", "no place on the page"),
    "two of a kind": (
        "scale: 2.0}}",
        "scale: 2.0}}, {SoftPAG: {heads: L0}}",
        "one section for SoftPAG",
    ),
    "a bad control": ("heads: L1H0", "heads: L1H0, u: 7", "between -1 and 1"),
    "no such preset": ("soft: {", "soft: {preset: nothing, ", "no preset"),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_hostile_uploads_are_a_sentence(studio, name):
    raw, words = UPLOADS[name]
    with pytest.raises(Refused) as caught:
        studio.open_upload(raw)
    assert caught.value.place == "job" and words in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", CHANGED)
def test_jobs_that_reach_too_far_are_a_sentence(studio, name):
    old, new, words = CHANGED[name]
    assert old in GOOD
    with pytest.raises(Refused) as caught:
        studio.open_upload(GOOD.replace(old, new, 1).encode())
    assert words in str(caught.value)


def test_limits_hold_for_uploaded_jobs_too(studio):
    for old, new in [
        ("steps: 3", "steps: 9000"),
        ("height: 16, width: 16", "height: 9600, width: 9600"),
    ]:
        form, _, _ = studio.open_upload(GOOD.replace(old, new).encode())
        with pytest.raises(Refused, match="must be from|pixels"):
            studio.submit("me", form)


def test_a_good_job_becomes_the_page(studio):
    text = GOOD.replace("[a red circle]", "[a red circle, a blue square]").replace(
        "seeds: 3", "seeds: 3-5"
    )
    form, facts, notes = studio.open_upload(text.encode())
    assert facts.model == "shapes-sd3"
    assert (form["prompt"], form["seed"], form["steps"]) == ("a red circle", 3, 3)
    assert form["SoftPAG.on"] and form["SoftPAG.heads"] == "L1H0"
    assert notes == ["The first of 2 prompts is shown.", "The first of 3 seeds is shown."]


@pytest.mark.parametrize(
    "name",
    [
        "../inside", "/etc", "inside/../../outside", "link", "inside/link/..", "\0", "x" * 5000,
        "owner/name/../../..", "C:\\Windows", "file:///etc", "inside/file.txt", "", None, 5, ["a"],
    ],
)  # fmt: skip
def test_only_folders_inside_the_operators_are_models(tmp_path, name):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "inside").mkdir(parents=True)
    outside.mkdir()
    (root / "inside" / "file.txt").write_text("x")
    (root / "link").symlink_to(outside)
    (root / "inside" / "link").symlink_to(outside)
    settings = Settings(folders=(root,))
    with pytest.raises(Refused) as caught:
        allowed(name, settings)
    assert caught.value.place == "model" and "No such file" not in str(caught.value)
    assert allowed("inside", settings) == str((root / "inside").resolve())
    assert allowed(str(root / "inside"), settings) == str((root / "inside").resolve())


def test_a_folder_that_is_there_is_told_from_none_by_nobody(tmp_path):
    """The same sentence for both: a page does not say what lies on the disk."""
    told = []
    for name in ("/etc", "/nothing-here"):
        with pytest.raises(Refused) as caught:
            allowed(name, Settings(folders=(tmp_path,)))
        told.append(str(caught.value).replace(name, "NAME"))
    assert told[0] == told[1]


def test_hub_ids_only_where_the_operator_allows_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused):
        allowed("owner/name", Settings())
    assert allowed("owner/name", Settings(allow_hub=True)) == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(Refused):  # a job would read that folder instead
        allowed("owner/name", Settings(allow_hub=True))


def test_settings_that_cannot_hold_are_refused(tmp_path):
    for wrong in ({"folders": (tmp_path / "none",)}, {"device": "tpu"}, {"device": "cuda:99"}):
        with pytest.raises(AttnControlError):
            Settings.of(**wrong)
