"""Diffusion language models: text that is denoised block by block. Their attention modules have no
processor; it runs through transformers' attention interface.
"""

from __future__ import annotations

from typing import Any

from attn_control import layouts
from attn_control.errors import AttnControlError
from attn_control.families.family import Family, Loop

LANGUAGE: tuple[Family, ...] = (
    Family(
        name="LLaDA 2",
        denoiser="LLaDA2MoeModelLM",  # code of the checkpoint's own: transformers has no such class
        blocks=("model.layers.#",),
        slots={"attention": "self"},
        layout=layouts.prompt_then_response,
        cfg="none",
        sample="input_ids",
        timestep_scale=None,
        loop=Loop(step="step_idx", block="num_block", prompt="prompt_length"),
    ),
    Family(
        name="DiffusionGemma",
        denoiser="DiffusionGemmaForBlockDiffusion",
        # The encoder, which reads each block once, is no denoiser: it stays as it is.
        blocks=("model.decoder.layers.#",),
        slots={"self_attn": "self"},
        layout=layouts.cached_then_canvas,
        facts=layouts.cache_facts,
        cfg="none",
        sample="decoder_input_ids",
        timestep_scale=None,
        loop=Loop(step="step_idx", block="cur_len", prompt="prompt_length"),
    ),
)


def refuse_kind(family: Family, control: Any) -> None:
    """Raises AttnControlError for a control of pictures on a language model, and the other way
    round.
    """
    if not family.language:
        if control.text_only:
            raise AttnControlError(
                f"{control}: names the regions of a text, but {family.name} makes pictures or"
                " videos, which read their text whole; expected one number"
            )
        return
    if control.reads_text:
        return
    if control.sparse:
        why = (
            "its tokens are text in a line, without the frames, rows and columns that this pattern"
            " is made of; expected SelectedAttention"
        )
    elif control.guidance_scale is not None:
        why = (
            "it predicts words, which no classifier-free guidance combines, so that there is"
            " nothing to add a difference to; expected SelectedAttention or HeadGate"
        )
    else:
        why = "this control is made for pictures; expected SelectedAttention or HeadGate"
    raise AttnControlError(f"{control}: {family.name} is a language model: {why}")
