"""A studio on stand-ins that are quick, and one on a stock pipeline of random weights."""

from __future__ import annotations

import zlib

import pytest
import torch

from attn_control.studio.page import start_form
from attn_control.studio.settings import Settings
from attn_control.studio.studio import Studio
from attn_control.studio.tabs import METHODS


def prompts_as_noise(pipe, tokens, pooled=None):
    """Texts become noise of their own instead of features: no text encoder is needed."""

    def encode_prompt(prompt, do_classifier_free_guidance=True, **_):
        text = prompt if isinstance(prompt, str) else "".join(prompt or [])
        seed = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        found = torch.randn(2, 1, *tokens, generator=seed)
        if pooled is None:
            return found[0], found[1]
        both = torch.randn(2, 1, pooled, generator=seed)
        return found[0], found[1], both[0], both[1]

    pipe.encode_prompt = encode_prompt
    return pipe


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder with an untrained shapes-flux, which takes reference pictures."""
    from tiny_zoo import export_tiny

    return export_tiny(tmp_path_factory.mktemp("toys"), "shapes-flux")


@pytest.fixture
def tiny_sd3(monkeypatch, tmp_path):
    """The zoo has one model: a stock SD3 pipeline of random weights, 16 x 16 pixels, 3 steps."""
    import tiny_pipelines

    from attn_control import zoo

    pipe, _ = tiny_pipelines.sd3()
    prompts_as_noise(pipe, (5, 32), 16)
    folder = tmp_path / "weights"
    folder.mkdir()
    start = {"max_sequence_length": 5, "num_inference_steps": 3, "guidance_scale": 2.0}
    monkeypatch.setattr(zoo, "path", lambda name: folder)
    monkeypatch.setattr(zoo, "load", lambda name, **_: pipe)
    monkeypatch.setattr(zoo, "defaults", lambda name: {**start, "height": 16, "width": 16})
    return pipe


@pytest.fixture
def studio(tiny_sd3):
    """An open studio on it; closed afterwards."""
    opened = Studio(Settings(), METHODS)
    yield opened
    opened.close()


@pytest.fixture
def form(studio):
    """Its form with a prompt and two heads of SoftPAG on."""
    facts = studio.facts("shapes-sd3")
    return {
        **start_form(facts, METHODS),
        "model": "shapes-sd3",
        "prompt": "a red circle",
        "SoftPAG.on": True,
        "SoftPAG.heads": "L1H0, L0",
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory, toys):
    """The real page on the real shapes-sd3, beside a Wan and a Flux of random weights."""
    pytest.importorskip("gradio", reason="the studio's page needs the demo extra")
    import tiny_pipelines

    from attn_control import zoo
    from attn_control.studio.launch import launch
    from attn_control.studio.settings import Settings

    wan, _ = tiny_pipelines.wan()
    prompts_as_noise(wan, (5, 16))
    size = {"height": 128, "width": 128, "num_frames": 9}
    start = {**size, "num_inference_steps": 4, "guidance_scale": 2.0}
    flux = {**zoo.defaults("shapes-flux"), "num_inference_steps": 2, "height": 64, "width": 64}
    folder = tmp_path_factory.mktemp("wan")
    kept = {name: getattr(zoo, name) for name in ("path", "load", "defaults")}

    def instead(name, models):
        real = kept[name]
        return lambda model, **how: models[model] if model in models else real(model, **how)

    with pytest.MonkeyPatch.context() as patch:
        paths = {"shapes-wan": folder, "shapes-flux": toys / "shapes-flux"}
        starts = {"shapes-wan": start, "shapes-flux": flux}
        patch.setattr(zoo, "path", instead("path", paths))
        patch.setattr(zoo, "load", instead("load", {"shapes-wan": wan}))
        patch.setattr(zoo, "defaults", instead("defaults", starts))
        page, studio, address = launch(Settings(), block=False)
        yield studio, address
        page.close(verbose=False)
        studio.close()


@pytest.fixture(scope="module")
def chromium():
    from studio.visit import CHROMIUM

    sync = pytest.importorskip("playwright.sync_api", reason="no playwright")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, served):
    """Visits of the page, which must not ask anybody but the studio for anything."""
    from studio.visit import Visit

    made = []

    def go(**options):
        made.append(Visit(chromium, served[1], **options))
        return made[-1]

    yield go
    for each in made:
        assert not each.strangers, f"the page asked others: {each.strangers}"
        each.close()
