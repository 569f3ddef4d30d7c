"""Pipelines and guiders, as data: where they do otherwise than their denoiser's row says."""

from __future__ import annotations

from typing import Any

from attn_control.errors import AttnControlError

_TWO_GUIDANCES = ("cond", "other:image", "uncond")

BRANCHES: dict[str, tuple[str, ...]] = {
    "StableDiffusionInstructPix2PixPipeline": _TWO_GUIDANCES,
    "StableDiffusionXLInstructPix2PixPipeline": _TWO_GUIDANCES,
}
"""Pipelines whose batch under guidance is stacked in another way, branch by branch."""

_MASKS = "combines its predictions by masks, which a difference does not pass through"
_UNGUIDED: dict[str, str] = {
    "LDMTextToImagePipeline": "does not tell which rows of its batch are conditional",
    "LEditsPPPipelineStableDiffusion": _MASKS,
    "LEditsPPPipelineStableDiffusionXL": _MASKS,
    "SemanticStableDiffusionPipeline": _MASKS,
    "StableDiffusionPanoramaPipeline": "denoises many views in one step, with both rows of each",
    "StableDiffusionPipelineSafe": _MASKS,
    "StableDiffusionSAGPipeline": "runs perturbed predictions of its own",
}
"""Pipelines in which controls that need to know the branch of a row are refused, and why."""

_HOOKS = "hooks the model's layers for a perturbed prediction of its own"
_PERTURBING = {
    "AutoGuidance": _HOOKS,
    "PerturbedAttentionGuidance": _HOOKS,
    "SkipLayerGuidance": _HOOKS,
    "SmoothedEnergyGuidance": _HOOKS,
}
_BENDING = (
    "AdaptiveProjectedGuidance",
    "AdaptiveProjectedMixGuidance",
    "ClassifierFreeZeroStarGuidance",
    "FrequencyDecoupledGuidance",
    "MagnitudeAwareGuidance",
    "TangentialClassifierFreeGuidance",
)
"""Guiders that combine otherwise than affinely: a difference added before them is bent by them."""


_RENORMING = (
    "LongCatImagePipeline",
    "Lumina2Pipeline",
    "QwenImageControlNetInpaintPipeline",
    "QwenImageControlNetPipeline",
    "QwenImageEditInpaintPipeline",
    "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageImg2ImgPipeline",
    "QwenImageInpaintPipeline",
    "QwenImagePipeline",
)
"""Pipelines that by default bring a guided prediction back to the norm of the conditional one."""


def branches_of(pipe: Any) -> tuple[str, ...] | None:
    """The branches of the pipeline's batch under guidance, if they are special."""
    return next((BRANCHES[c.__name__] for c in type(pipe).__mro__ if c.__name__ in BRANCHES), None)


def refuse_pipeline(pipe: Any, control: Any) -> None:
    """Raise AttnControlError if the control needs branches that the pipeline does not have."""
    if "branch" not in control.needs:
        return
    for cls in type(pipe).__mro__:
        if cls.__name__ in _UNGUIDED:
            raise AttnControlError(
                f"{control}: {type(pipe).__name__} {_UNGUIDED[cls.__name__]}; expected a control"
                " that acts in place, such as HeadGate"
            )


def guiders_of(pipe: Any) -> list[Any]:
    """The guiders (``diffusers.guiders``) that a pipeline may ask."""
    found = (
        getattr(pipe, name, None) for name in ("guider", "guider_2", "audio_guider", "ocr_guider")
    )
    return [guider for guider in found if hasattr(guider, "prepare_models")]


def refuse_guiders(pipe: Any) -> None:
    """Raise AttnControlError if a guider of the pipeline perturbs the model itself."""
    for guider in guiders_of(pipe):
        name = type(guider).__name__
        why = _PERTURBING.get(name)
        if name == "LTX2Guidance" and (guider.stg_scale != 0 or guider.modality_scale != 1):
            why = "runs perturbed predictions of its own (stg_scale, modality_scale)"
        if why is not None and getattr(guider, "_enabled", True):
            raise AttnControlError(
                f"attach: {type(pipe).__name__} is guided by {name}, which {why}; give it another"
                " guider, such as ClassifierFreeGuidance, and use SoftPAG, SEG or SkipLayers"
            )


def bent_by(pipe: Any) -> list[str]:
    """Notes for the report: what becomes of a difference that is added before predictions are
    combined.
    """
    name = type(pipe).__name__
    norms = [
        f"{name}, unless told otherwise, brings what classifier-free guidance gives back to the"
        " norm of the conditional prediction: guidance of attn_control is added before that, and"
        " passes through it"
    ]
    return norms * (name in _RENORMING) + [
        f"{type(guider).__name__} combines predictions otherwise than by an affine sum: guidance of"
        " attn_control is added before it, and passes through it"
        for guider in guiders_of(pipe)
        if type(guider).__name__ in _BENDING or getattr(guider, "guidance_rescale", 0)
    ]
