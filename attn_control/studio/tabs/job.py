"""Job: the page as the YAML that `attn-control render` takes, and such YAML as the page."""

from __future__ import annotations

from typing import Any

NAME = "Job"
METHODS = ()
ABOUT = (
    '<p class="ac-about">Everything on this page, as a job: <code>attn-control render</code> makes '
    "the same two pictures of it, bit for bit on the same kind of machine. Paste or upload one, "
    "and the page follows.</p>"
)
# The browser has the text already: nothing is asked of the server.
_DOWNLOAD = """(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/yaml"}));
  link.download = "job.yaml";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


def layout(ui: Any) -> None:
    import gradio as gr

    gr.HTML(ABOUT)
    ui.alert("job")
    ui.add("job.notes", gr.HTML("", elem_classes="ac-quiet"))
    text = gr.Textbox(
        label="job.yaml",
        lines=14,
        max_lines=30,
        buttons=["copy"],
        elem_classes="ac-yaml",
        elem_id="job-yaml",
        interactive=True,
    )
    ui.add("job.text", text)
    ui.add("job.picture", gr.HTML("", elem_classes="ac-quiet"))
    with gr.Row():
        ui.add("job.apply", gr.Button("Set the page to this", size="sm"))
        download = gr.Button("Download", size="sm")
        upload = gr.UploadButton(
            "Upload", file_types=[".yaml", ".yml", ".txt"], type="binary", size="sm"
        )
        ui.add("job.upload", upload)
    download.click(None, text, None, js=_DOWNLOAD, api_visibility="private")
