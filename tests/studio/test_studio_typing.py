"""What is typed on the page, in a real Chromium: it stays, and what is wrong is said there."""

from __future__ import annotations

from studio.visit import MARKS

pytestmark = MARKS
QUESTIONS = "**/run/predict*"  # about the page as it is, of which an answer may come late
# Which numbers of steps the page wrote into the job, one after the other.
LOGGED = """() => {
  const own = Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "defaultValue");
  window.written = [];
  Object.defineProperty(document.querySelector("#job-yaml textarea"), "defaultValue", {
    get() { return own.get.call(this); },
    set(text) {
      const found = /num_inference_steps: (\\d+)/.exec(text);
      if (found) window.written.push(found[1]);
      own.set.call(this, text);
    },
  });
}"""


def test_the_job_is_that_of_the_last_change_however_late_answers_come(visit):
    """Of every two questions the second is answered first."""
    at = visit()
    at.tab("Job")
    at.yaml("num_inference_steps: 25")
    at.page.evaluate(LOGGED)
    held = []

    def swap(route):
        if not held:
            held.append(route)
            return
        for each in (route, held.pop()):
            each.fulfill(response=each.fetch())

    at.page.route(QUESTIONS, swap)
    at.page.get_by_role("button", name="skip layer 2").click()  # asks twice
    for count in (7, 8, 9, 10):
        at.steps(count)
    shown = "document.querySelector('#job-yaml textarea').value"
    while "num_inference_steps: 10" not in at.page.evaluate(shown):
        at.page.wait_for_timeout(100)  # answers come meanwhile
        if held:  # the last one has nobody to wait for
            held[0].fulfill(response=held.pop().fetch())
    written = [int(each) for each in at.page.evaluate("window.written")]
    assert written and written[-1] == 10
    assert written[written.index(10) :] == [10] * written.count(10), "nothing older after it"


def test_what_somebody_writes_is_not_written_over(visit):
    """By the answer to a change before it; the page's job is a button away."""
    at = visit()
    at.tab("Job")
    at.yaml("num_inference_steps: 25")
    held, late = [], True
    at.page.route(QUESTIONS, lambda route: held.append(route) if late else route.continue_())
    at.steps(11)
    while not held:
        at.page.wait_for_timeout(20)
    box = at.page.locator("#job-yaml textarea")
    box.fill("mine")
    at.page.get_by_text("Changed by hand").wait_for()
    late = False
    for route in held:
        route.continue_()
    came = "document.querySelector('#job-yaml textarea').defaultValue.includes('steps: 11')"
    at.page.wait_for_function(came)
    assert box.input_value() == "mine"
    at.steps(12)  # nor by one that comes after
    at.page.wait_for_function(came.replace("11", "12"))
    assert box.input_value() == "mine"
    at.shot("job-by-hand-1440-light")
    at.page.get_by_role("button", name="Show the page's job again").click()
    at.yaml("num_inference_steps: 12")
    assert not at.page.get_by_text("Changed by hand").is_visible()


def test_a_job_that_is_set_fills_the_page_and_gives_way_to_the_pages_own(visit):
    at = visit()
    at.tab("Job")
    shown = at.yaml("num_inference_steps: 25")
    box = at.page.locator("#job-yaml textarea")
    wrong = shown.replace("seeds:", "seed:")
    for text, word in ((wrong, "seed"), ("# a remark\n" + shown.replace("25", "13"), None)):
        box.fill(text)
        at.page.get_by_role("button", name="Set the page to this").click()
        if word:
            at.page.get_by_role("alert").filter(has_text=word).first.wait_for()
            assert box.input_value() == text, "what is refused can be mended"
    at.page.wait_for_function(
        "!document.querySelector('#job-yaml textarea').value.includes('# a remark')"
    )
    at.yaml("num_inference_steps: 13")
    assert at.page.get_by_role("alert").count() == 0
    assert not at.page.get_by_text("Changed by hand").is_visible()
    # A file does the same.
    job = {
        "name": "job.yaml",
        "mimeType": "text/yaml",
        "buffer": shown.replace("25", "14").encode(),
    }
    with at.page.expect_file_chooser() as chooser:
        at.page.locator("#job-upload").click()
    chooser.value.set_files(job)
    at.yaml("num_inference_steps: 14")


def test_an_example_that_changes_fields_out_of_sight_alone_is_written_too(visit):
    at = visit()
    at.tab("Job")
    for label, words in (("skip layer 2", "SkipLayers"), ("silence a head", "HeadGate")):
        at.page.get_by_role("button", name=label).click()
        at.yaml(words)


def test_bad_input_is_a_sentence_where_it_was_made(visit):
    at = visit()
    section = at.section("SoftPAG")
    section.get_by_label("use SoftPAG").check()
    at.run()
    section.get_by_role("alert").wait_for()
    assert "no head is chosen" in section.get_by_role("alert").inner_text()
    section.get_by_label("use SoftPAG").uncheck()
    at.page.locator("#prompt textarea").fill("")
    at.run()
    at.page.get_by_text("write a prompt first").wait_for()
    assert section.get_by_role("alert").count() == 0
    for name in ("owner/name", "/etc/passwd"):
        at.model(name)
        at.page.get_by_role("alert").filter(has_text=f"'{name}' is no model").wait_for()
    at.model("shapes-sd3")
    at.page.wait_for_function("!document.querySelector('[role=alert]')")
    at.tab("Job")
    at.page.locator("#job-yaml textarea").fill("model: /etc/passwd\nprompts: [x]\nseeds: 0\n")
    at.page.get_by_role("button", name="Set the page to this").click()
    at.page.get_by_text("variants").first.wait_for()
    assert "/etc/passwd" in at.page.locator("#job-yaml textarea").input_value(), "it can be mended"
    evil = {"name": "job.yaml", "mimeType": "text/yaml", "buffer": b"\x80\x04\x95pickle"}
    at.page.locator("input[type=file]").first.set_input_files(evil)
    at.page.get_by_text("a pickle, which is never loaded").wait_for()
    at.tab("Video")
    radial = at.section("RadialAttention")
    radial.get_by_label("use RadialAttention").check()
    at.page.locator("#prompt textarea").fill("a red circle")
    # Out of sight, in a closed section of another tab: it is brought into sight.
    radial.locator(".label-wrap").first.click()
    at.tab("Guidance")
    at.run()
    radial.get_by_role("alert").wait_for()
    at.page.get_by_text("See RadialAttention in the tab Video.").wait_for()
    assert "picture" in radial.get_by_role("alert").inner_text()
    at.shot("refused-1440-light")
