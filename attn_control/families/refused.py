"""Denoisers of diffusers that ``attach`` refuses, each with a true reason."""

from __future__ import annotations

_AUDIO = "it makes sound, and controls know pictures and videos only"
_LATER = "nobody has written and proved its row yet"
_PART = "it is a part of other models, not a denoiser of its own"
_MANY = "its one call mixes several modalities in one packed sequence, which no row describes yet"

REFUSED: dict[str, str] = {
    "AceStepTransformer1DModel": _AUDIO,
    "AnyFlowFARTransformer3DModel": _LATER,
    "AudioLDM2UNet2DConditionModel": _AUDIO,
    "BriaFibo2Transformer2DModel": _LATER,
    "BriaFiboTransformer2DModel": "its pipeline does not tell which rows are conditional",
    "Cosmos3OmniTransformer": _MANY,
    "DiTTransformer2DModel": "its pipeline does not tell which rows are conditional",
    "DreamLiteTransformer2DModel": _PART,
    "DreamLiteUNetModel": _LATER,
    "EasyAnimateTransformer3DModel": _LATER,
    "I2VGenXLUNet": _LATER,
    "Ideogram4Transformer2DModel": _LATER,
    "JoyImageEditPlusTransformer3DModel": _LATER,
    "JoyImageEditTransformer3DModel": _LATER,
    "Kandinsky3UNet": _LATER,
    "Kandinsky6SRTransformer3DModel": _LATER,
    "Kandinsky6Transformer3DModel": _LATER,
    "LongCatAudioDiTTransformer": _AUDIO,
    "LuminaNextDiT2DModel": _LATER,
    "MiniMaxH3Transformer3DModel": _MANY,
    "MiniMaxMusic3RVQDepthDecoder": _AUDIO,
    "MiniMaxMusic3Transformer1DModel": _AUDIO,
    "MotionAdapter": _PART,
    "NucleusMoEImageTransformer2DModel": _LATER,
    "OmniGenTransformer2DModel": _LATER,
    "PriorTransformer": "it makes embeddings of pictures, not pictures",
    "RFD4ProteinaTransformer": "it makes proteins",
    "SanaWMLTX2RefinerTransformer3DModel": _LATER,
    "SanaWMTransformer3DModel": _LATER,
    "StableAudio3DiTModel": _AUDIO,
    "StableAudioDiTModel": _AUDIO,
    "StableCascadeUNet": _LATER,
    "T5FilmDecoder": _AUDIO,
    "Transformer2DModel": _PART,
    "TransformerTemporalModel": _PART,
    "UNet1DModel": "it makes sound and trajectories, and controls know pictures and videos only",
    "UNet2DModel": "it knows no text, and so no conditional prediction to guide",
    "UNet3DConditionModel": _LATER,
    "UNetSpatioTemporalConditionModel": _LATER,
    "UVit2DModel": _LATER,
    "WanAnimate2Transformer3DModel": _LATER,
}
