"""Per-model facts, as data: the only folder in which a model's class is named.

A new model is one row of ``pictures.py`` or ``videos.py``, or of ``flux.py`` or ``wan.py`` if it is
built like those: where its blocks are in execution order, which attention is which, in which order
the tokens stand, and how its pipelines run classifier-free guidance. What has no row is in
``refused.py``, with the reason; what stands beside a denoiser in ``controlnets.py``; language
models in ``language.py``; what a pipeline or a guider does otherwise in ``pipelines.py``.
"""

from attn_control.families.controlnets import CONTROLNETS
from attn_control.families.family import EVERY, Family, Loop
from attn_control.families.find import (
    COMPONENTS,
    FAMILIES,
    bind,
    denoisers,
    family_of,
    find_sites,
    parameters,
    unwrap,
)
from attn_control.families.language import LANGUAGE, refuse_kind
from attn_control.families.pipelines import (
    bent_by,
    branches_of,
    guiders_of,
    refuse_guiders,
    refuse_pipeline,
)
from attn_control.families.refused import REFUSED
from attn_control.families.rows import repeat_rows, slice_rows
from attn_control.layouts import Arguments

__all__ = [
    "COMPONENTS",
    "CONTROLNETS",
    "EVERY",
    "FAMILIES",
    "LANGUAGE",
    "REFUSED",
    "Arguments",
    "Family",
    "Loop",
    "bent_by",
    "bind",
    "branches_of",
    "denoisers",
    "family_of",
    "find_sites",
    "guiders_of",
    "parameters",
    "refuse_guiders",
    "refuse_kind",
    "refuse_pipeline",
    "repeat_rows",
    "slice_rows",
    "unwrap",
]
