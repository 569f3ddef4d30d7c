"""FLUX.1 and what was built on its plan: double blocks, then single ones, on packed latents."""

from __future__ import annotations

from dataclasses import replace

from attn_control import layouts
from attn_control.families.family import Family, evenly

BLOCKS = ("transformer_blocks.#", "single_transformer_blocks.#")
ROWS = frozenset(
    {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"}
)
IDS = frozenset({"img_ids", "txt_ids"})
BY_IDS = frozenset({"img_ids"})
JOINT = ("encoder_hidden_states", "hidden_states")
_SINGLE_ALONE = {BLOCKS[0]: JOINT, BLOCKS[1]: ("hidden_states",)}

_FLUX = Family(
    name="FLUX.1",
    denoiser="FluxTransformer2DModel",
    blocks=BLOCKS,
    slots={"attn": "joint"},
    layout=layouts.text_then_packed,
    by_value=BY_IDS,
    cfg="split",
    sigmas=evenly,
    block_returns=JOINT,
    timestep_scale=1e-3,
    row_fields=ROWS,
    shared_fields=IDS,
)

FLUX: tuple[Family, ...] = (
    _FLUX,
    replace(
        _FLUX,
        name="FLUX.2",
        denoiser="Flux2Transformer2DModel",
        layout=layouts.text_then_packed_or_cached,
        by_value=BY_IDS | {"kv_cache_mode", "num_ref_tokens"},
        block_returns=_SINGLE_ALONE,
        row_fields=ROWS | IDS,
        shared_fields=frozenset(),
    ),
    replace(
        _FLUX,
        name="Chroma",
        denoiser="ChromaTransformer2DModel",
        block_returns=_SINGLE_ALONE,
        row_fields=ROWS | {"attention_mask"},
    ),
    replace(_FLUX, name="Ovis-Image", denoiser="OvisImageTransformer2DModel"),
    replace(_FLUX, name="LongCat-Image", denoiser="LongCatImageTransformer2DModel"),
)
