"""Job: the page as the YAML that `attn-control render` takes, and such YAML as the page."""

from __future__ import annotations

from typing import Any

NAME = "Job"
METHODS = ()
ABOUT = (
    '<p class="ac-about">Everything on this page, as a job: <code>attn-control render</code> makes '
    "the same two pictures of it, bit for bit on the same kind of machine. Paste or upload one, "
    "and set the page to it.</p>"
)
# A box of our own: Gradio writes into its own ones whenever an answer or a new frame comes.
_BOX = """<div class="ac-job">
<div class="ac-row"><label for="job-text">job.yaml</label>
<button type="button" class="ac-small ac-copy">Copy</button></div>
<textarea id="job-text" rows="14" spellcheck="false" autocapitalize="off"></textarea>
<p class="ac-note ac-mine" role="status" hidden>Changed by hand: the fields of the page do not
follow until you press “Set the page to this”.
<button type="button" class="ac-small ac-follow">Show the page's job again</button></p>
</div>"""
_TEXT = 'document.querySelector("#job-yaml textarea").value'
# What is sent is what is in sight, and not what Gradio last heard of it.
APPLY = f"() => [{_TEXT}]"
UPLOAD = f"(file) => [file, {_TEXT}]"
# The page took a job: the text that stood in the box then is nobody's any more.
TAKEN = """(text) => {
  const box = document.querySelector("#job-yaml textarea");
  if (box && text !== null) box.dispatchEvent(new CustomEvent("taken", {detail: text}));
  return [];
}"""
# The browser has the text already: nothing is asked of the server.
_DOWNLOAD = f"""() => {{
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([{_TEXT}], {{type: "text/yaml"}}));
  link.download = "job.yaml";
  link.click();
  URL.revokeObjectURL(link.href);
}}"""


def layout(ui: Any) -> None:
    import gradio as gr

    from attn_control.studio.layout import STATIC

    gr.HTML(ABOUT)
    ui.alert("job")
    ui.add("job.notes", gr.HTML("", elem_classes="ac-quiet"))
    text = gr.HTML(
        "",
        html_template=_BOX,
        js_on_load=(STATIC / "job.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="job-yaml",
    )
    ui.add("job.text", text)
    ui.add("job.taken", gr.Textbox(visible=False))
    ui.add("job.picture", gr.HTML("", elem_classes="ac-quiet"))
    with gr.Row():
        ui.add("job.apply", gr.Button("Set the page to this", size="sm"))
        download = gr.Button("Download", size="sm")
        upload = gr.UploadButton(
            "Upload",
            file_types=[".yaml", ".yml", ".txt"],
            type="binary",
            size="sm",
            elem_id="job-upload",
        )
        ui.add("job.upload", upload)
    download.click(None, None, None, js=_DOWNLOAD, api_visibility="private")
