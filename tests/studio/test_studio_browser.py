"""The page in a real Chromium: runs, cancelling, reload, two browsers, a phone, a keyboard, axe.

Needs Gradio, playwright and Debian's chromium; screenshots for people go to out/studio/.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image
from studio.visit import AXE, MARKS, PATIENCE

pytestmark = MARKS


def test_guidance_by_a_click_in_the_grid(visit, served):
    at = visit()
    at.section("SoftPAG")
    at.page.locator("#grid-SoftPAG button[data-layer='0']:not([data-head])").click()
    at.page.wait_for_function(
        "[...document.querySelectorAll('#section-SoftPAG input, #section-SoftPAG textarea')]"
        ".some(each => each.value === 'L0')"
    )
    assert at.page.locator("#section-SoftPAG input[type=checkbox]").first.is_checked()
    pressed = at.page.locator("#grid-SoftPAG button[data-layer='0'][aria-pressed=true]")
    assert pressed.count() == 5
    at.run()
    at.status("done")
    without, with_ = (np.asarray(at.picture(side), int) for side in ("without", "with"))
    assert np.abs(without - with_).mean() > 1
    told = at.page.locator("#figures").inner_text()
    assert "time per step" in told and "PSNR" in told and "all right" in told
    assert "L0H0,1,2,3" in at.page.locator("#report").inner_text()
    # The slider, by keyboard.
    at.page.locator("#compare .ac-slider").focus()
    at.page.keyboard.press("Home")
    cut = at.page.locator("#compare .ac-compare").evaluate("e => e.style.getPropertyValue('--cut')")
    assert cut == "0%"
    at.page.keyboard.press("End")
    for _ in range(50):
        at.page.keyboard.press("ArrowLeft")
    at.shot("guidance-1440-light")


def test_the_page_renders_what_the_command_renders_from_its_yaml(visit, tmp_path):
    from attn_control.render.command import render

    at = visit()
    at.page.get_by_role("button", name="NAG and SoftPAG together").click()
    at.page.wait_for_function("document.querySelector('#prompt textarea').value.includes('ring')")
    at.steps(3)
    at.tab("Job")
    shown = at.yaml("num_inference_steps: 3")
    with at.page.expect_download() as caught:
        at.page.get_by_role("button", name="Download").click()
    job = tmp_path / "job.yaml"
    caught.value.save_as(job)
    assert job.read_text() == shown
    at.shot("job-1440-light")
    at.run()
    at.status("done")
    outcome = render(job, tmp_path / "out")
    for row in outcome.rows:
        theirs = Image.open(tmp_path / "out" / "images" / row["file"]).convert("RGB")
        hashes = {
            hashlib.sha256(p.tobytes()).hexdigest() for p in (theirs, at.picture(row["variant"]))
        }
        assert len(hashes) == 1, row["variant"]
    assert at.picture("without").tobytes() != at.picture("with").tobytes()


def test_a_reference_picture(visit, tmp_path):
    from attn_control.zoo.references import draw_reference

    at = visit()
    assert not at.page.locator("#reference").is_visible(), "shapes-sd3 takes none"
    at.model("shapes-flux")
    at.page.locator("#reference").wait_for()
    at.page.locator("#prompt textarea").fill("a red circle with the texture of the reference")
    field = at.page.locator("#reference input[type=file]")
    evil = {"name": "a.png", "mimeType": "image/png", "buffer": b"\x80\x04\x95pickle"}
    field.set_input_files(evil)
    at.page.get_by_text("a pickle, which is never loaded").wait_for()
    at.run()
    at.status("done")
    before = at.picture("without").tobytes()
    file = tmp_path / "striped.png"
    Image.fromarray(draw_reference("striped", 1)).save(file)
    field.set_input_files(file)
    at.page.get_by_alt_text("reference picture").wait_for()
    at.tab("Job")
    at.yaml("image: reference-")
    with at.page.expect_download() as caught:
        at.page.get_by_role("link", name="Download reference-").click()
    caught.value.save_as(tmp_path / "down.png")
    assert Image.open(tmp_path / "down.png").tobytes() == Image.open(file).tobytes()
    at.run()
    at.page.wait_for_function(
        "document.querySelectorAll('#gallery img').length === 2", timeout=PATIENCE
    )
    assert at.picture("without").tobytes() != before, "the model saw it"
    at.shot("reference-1440-light")
    at.page.locator("#reference-remove").click()
    at.page.wait_for_function(
        "!document.querySelector('#job-yaml textarea').value.includes('image:')"
    )
    assert not at.page.get_by_alt_text("reference picture").is_visible()


def test_a_video_run_with_its_mask(visit, served):
    at = visit()
    at.model("shapes-wan")
    at.tab("Video")
    section = at.section("NeighborhoodAttention")
    section.get_by_label("more options").fill("{block: 32}")
    section.get_by_label("use NeighborhoodAttention").check()
    at.page.wait_for_selector("#foreseen svg rect")
    assert "density over the whole run" in at.page.locator("#foreseen").inner_text()
    at.run()
    at.page.wait_for_selector("#compare .ac-film >> nth=1")
    at.status("done")
    films = at.page.locator("#compare .ac-film")
    sheets = {films.nth(n).evaluate("e => e.style.backgroundImage") for n in (0, 1)}
    assert films.count() == 2 and len(sheets) == 2, "the two videos differ"
    time_ = at.page.locator("#compare .ac-time")
    time_.focus()
    at.page.keyboard.press("ArrowRight")
    assert {films.nth(n).get_attribute("data-frame") for n in (0, 1)} == {"1"}, "in step"
    at.page.locator("#compare .ac-play").click()
    at.page.wait_for_function("document.querySelector('#compare .ac-time').value !== '1'")
    at.page.locator("#compare .ac-play").click()
    at.shot("video-1440-light")


def long_run(at, tab):
    """Set up a run of the tab that takes a while, one under control where the tab has some."""
    if tab == "Video":
        at.model("shapes-wan")
    at.tab(tab)
    if tab == "Guidance":
        at.section("SoftPAG")
        at.page.locator("#grid-SoftPAG button[data-layer='0']:not([data-head])").click()
    if tab == "Video":
        section = at.section("NeighborhoodAttention")
        section.get_by_label("more options").fill("{block: 32}")
        section.get_by_label("use NeighborhoodAttention").check()
    at.steps(100)


@pytest.mark.parametrize("tab", ["Guidance", "Video", "Job"])
def test_cancel_takes_effect_within_a_step(visit, served, tab, monkeypatch):
    studio, _ = served
    at = visit()
    long_run(at, tab)
    at.run()
    at.page.wait_for_function(
        r"/step ([2-9]|\d\d)/.test(document.querySelector('#status')?.textContent)"
    )
    run = studio.runner._now
    sides = 1 if tab == "Job" else 2
    pressed, cancel = [], studio.cancel

    def watched(owner):  # where the press arrives
        pressed.append(round(run.share * 100 * sides))
        return cancel(owner)

    monkeypatch.setattr(studio, "cancel", watched)
    at.page.locator("#cancel").click()
    at.status("cancelled")
    assert run.wait(10) and run.state == "cancelled"
    # The step under way ends, and the next may have begun where the press was counted.
    assert round(run.share * 100 * sides) - pressed[0] <= 2
    at.page.locator("#run:enabled").wait_for()
    at.steps(2)
    at.run()
    at.status("done")


@pytest.mark.parametrize("tab", ["Guidance", "Video", "Job"])
def test_a_reload_ends_the_run_and_the_page_works_again(visit, served, tab):
    studio, _ = served
    at = visit()
    long_run(at, tab)
    at.run()
    at.page.wait_for_function(r"/step \d/.test(document.querySelector('#status')?.textContent)")
    run = studio.runner._now
    at.page.reload()
    at.ready()
    assert run.wait(60) and run.state == "cancelled"
    at.steps(2)
    at.run()
    at.status("done")


def test_two_browsers_take_turns(visit, served):
    studio, _ = served
    first, second = visit(), visit()
    for at, seed in ((first, 1), (second, 2)):
        at.steps(6)
        field = at.page.locator("#seed input")
        field.fill(str(seed))
        field.press("Tab")
    first.run()
    second.run()
    first.status("done")
    second.status("done")
    pictures = [at.picture("without").tobytes() for at in (first, second)]
    assert pictures[0] != pictures[1]
    assert "seed 1" in first.page.locator("#figures").inner_text()
    assert "seed 2" in second.page.locator("#figures").inner_text()


def test_a_phone(visit):
    at = visit(width=390, dark=True)
    at.section("SoftPAG")
    at.page.locator("#grid-SoftPAG button[data-layer='3'][data-head='2']").click()
    at.steps(3)
    at.run()
    at.status("done")
    wide = at.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, f"the page is {wide} px wide"
    at.shot("guidance-390-dark")


def test_the_grid_by_keyboard(visit):
    at = visit(dark=True)
    at.section("SoftPAG")
    at.page.locator("#grid-SoftPAG button[tabindex='0']").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Space"):
        at.page.keyboard.press(key)
    at.page.wait_for_function(
        "[...document.querySelectorAll('#section-SoftPAG input, #section-SoftPAG textarea')]"
        ".some(each => each.value === 'L1H1')"
    )
    assert at.page.evaluate("document.activeElement.dataset.head") == "1", "the focus stays"
    at.shot("grid-1440-dark")


def test_a_run_by_keyboard_alone(visit):
    """From the prompt on, with the tabulator, arrows, the space bar and the return key."""
    at = visit()
    press = at.page.keyboard.press

    def walk(arrived, key="Tab"):
        for _ in range(60):
            if at.page.evaluate(f"document.activeElement.matches({arrived!r})"):
                return
            press(key)
        raise AssertionError(f"60 stops, and none is {arrived}")

    walk("#prompt textarea")
    press("Control+A")
    at.page.keyboard.type("a blue circle on a white background")
    walk("#advanced .label-wrap")
    press("Enter")
    at.page.locator("#steps").wait_for()
    at.opened()
    walk("#steps input[type=number]")
    press("Control+A")
    at.page.keyboard.type("3")
    walk("#section-HeadGate .label-wrap")
    press("Enter")
    at.page.locator("#section-HeadGate input[type=checkbox]").first.wait_for()
    at.opened()
    walk("#grid-HeadGate button")
    press("Space")
    at.page.locator("#section-HeadGate input:checked").wait_for()
    walk("#run", "Shift+Tab")
    press("Enter")
    at.status("done")
    assert at.picture("without").tobytes() != at.picture("with").tobytes()
    assert "HeadGate" in at.page.locator("#report").inner_text()


def test_a_new_seed_each_run(visit):
    at = visit()
    at.steps(2)
    at.page.locator("#dice input").check()
    seeds = []
    for count in (1, 2):
        at.run()
        at.page.wait_for_function(
            "count => document.querySelectorAll('#gallery img').length === count", arg=count
        )
        seeds.append(at.page.locator("#seed input").input_value())
        assert f"seed {seeds[-1]}" in at.page.locator("#figures").inner_text()
    assert len({"0", *seeds}) == 3, "the page shows what was drawn"


SCREENS = {"Guidance": "SoftPAG", "Video": "NeighborhoodAttention", "Job": None}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_every_tab_fits_and_axe_finds_nothing_serious(visit, width, dark):
    """With a run's results beside it; axe-core where ATTN_CONTROL_AXE names it."""
    at = visit(width=width, dark=dark)
    if dark:  # one picture and no slider
        at.steps(2)
    else:
        at.page.get_by_role("button", name="silence a head").click()
        at.tab("Job")
        at.yaml("HeadGate")
        at.steps(2)
    at.run()
    at.status("done")
    if AXE:
        at.page.add_script_tag(path=AXE)
    for tab, control in SCREENS.items():
        at.tab(tab)
        if control:
            section = at.section(control)
            if tab == "Video":
                section.get_by_label("more options").fill("{block: 32}")
                section.get_by_label(f"use {control}").check()
                at.page.wait_for_selector("#foreseen svg rect")
        at.shot(f"tab-{tab.lower()}-{width}-{'dark' if dark else 'light'}")
        wide = at.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{tab} is {wide} px wide"
        if not AXE:
            continue
        found = at.page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        serious = [
            f"{each['id']}: {node['html'][:200]}"
            for each in found
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]
        assert not serious, tab + "\n" + "\n".join(serious)
