"""Serves the studio. Gradio is imported here and not before: the command line stays quick."""

from __future__ import annotations

import os
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.studio.settings import Settings


def launch(
    settings: Settings | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = False,
    block: bool = True,
) -> tuple[Any, Any, str]:
    """Serve until Ctrl-C, or return at once: (the page, its studio, its address).

    Args:
        settings: what the operator allows.
        host: 127.0.0.1 is this machine alone, 0.0.0.0 every network that it is in.
        port: None takes a free one from 7860 on.
        browser: open one.
        block: wait; else ``page.close()`` and ``studio.close()`` are the caller's.

    Raises:
        AttnControlError: Gradio is missing, the port is taken, or the page does not answer.
    """
    # Read when Gradio is imported, and then for good: nothing is reported to anyone.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio as gr
    except ImportError:
        raise AttnControlError(
            "the studio needs Gradio: pip install 'attn-control[demo]'"
        ) from None
    from attn_control.studio.app import build
    from attn_control.studio.layout import STATIC
    from attn_control.studio.studio import Studio
    from attn_control.studio.tabs import METHODS

    settings = settings or Settings()
    studio = Studio(settings, METHODS)
    # Fonts of the machine: a page that works without a network asks nobody for one.
    font = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    theme = gr.themes.Soft(
        primary_hue="blue",
        neutral_hue="slate",
        radius_size="sm",
        font=font,
        font_mono=["ui-monospace", "monospace"],
    ).set(
        # Plain labels and dark enough hints: readable in both modes (WCAG AA).
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_padding="0",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_label_text_color="*neutral_800",
        block_label_text_color_dark="*neutral_100",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        # Sections are told apart from the page, also in light.
        body_background_fill="*neutral_100",
        block_background_fill="white",
        block_border_width="1px",
        block_border_width_dark="1px",
        # What is written into or ticked can be seen without a click (WCAG 1.4.11).
        input_border_color="*neutral_500",
        input_border_color_dark="*neutral_400",
        input_border_width="1px",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_text_color="white",
    )
    page = build(studio)
    page.queue(max_size=settings.waiting + 40)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            prevent_thread_lock=True,
            share=False,
            show_error=False,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=["settings"],
            run_history=False,
            max_file_size=max(settings.upload, settings.picture),
            theme=theme,
            css_paths=STATIC / "style.css",
        )
    except OSError as error:
        studio.close()
        raise AttnControlError(f"the studio cannot be served at {host}:{port}: {error}") from None
    except ValueError:  # Gradio asks its own address, and gives up after five tries
        page.close(verbose=False)
        studio.close()
        raise AttnControlError(
            f"the studio cannot be reached at {host}: is the machine too busy to answer within "
            "seconds, or a proxy set for localhost?"
        ) from None
    if block:
        print(f"the studio is at {address} (Ctrl-C ends it)", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)
            studio.close()
    return page, studio, address
