"""Tiny whole pipelines that start from pictures: inpainting, references, ControlNets and so on.

Each builder gives the pipeline, its call, and the layout of its classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import PIL.Image
import tiny
import tiny_pipelines
import torch
import transformers
from tiny_more import MORE
from tiny_pipelines import _quiet, _rand

Made = tuple[Any, dict[str, Any], str]
STEPS = 3


def picture(size: int = 16, seed: int = 11) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def mask(size: int = 16) -> torch.Tensor:
    found = torch.zeros(1, 1, size, size)
    found[:, :, size // 2 :] = 1.0
    return found


def _again(cls: str, base: Callable[[], tuple[Any, dict[str, Any]]], **parts: Any) -> Any:
    """Another pipeline class over a tiny pipeline's components, and that one's call."""
    pipe, call = base()
    made = getattr(diffusers, cls)
    components = {**pipe.components, **parts}
    names = set(made._get_signature_keys(made)[0]) | set(made._get_signature_keys(made)[1])
    given = {name: value for name, value in components.items() if name in names}
    return _quiet(made(**given)), call | {"num_inference_steps": STEPS}


def _edited(cls: str, base: Any, layout: str, size: int, masked: bool, **more: Any) -> Made:
    parts = more.pop("parts", {})
    pipe, call = _again(cls, base, **parts)
    call |= {"image": picture(size), **more}
    if masked:
        call["mask_image"] = mask(size)
    return pipe, call, layout


def _other(model: Any, **changed: Any) -> Any:
    """A model of the same class with some of its configuration changed."""
    torch.manual_seed(0)
    config = {n: v for n, v in model.config.items() if not n.startswith("_")}
    return tiny._spread(type(model)(**config | changed))


def _plain_image(made: Made) -> Made:
    """Without the size: the picture's own counts."""
    pipe, call, layout = made
    call = {name: value for name, value in call.items() if name not in ("height", "width")}
    return pipe, call, layout


def sd15_image() -> Made:
    return _plain_image(
        _edited(
            "StableDiffusionImg2ImgPipeline", tiny_pipelines.sd15, "neg pos", 32, False,
            strength=0.7,
        )
    )  # fmt: skip


def sd15_inpaint() -> Made:
    return _edited(
        "StableDiffusionInpaintPipeline", tiny_pipelines.sd15, "neg pos", 32, True, strength=1.0
    )


def sd15_inpaint_nine() -> Made:
    """The inpainting UNet: latents, mask and masked picture, 4 + 1 + 4 channels."""
    return _edited(
        "StableDiffusionInpaintPipeline", tiny_pipelines.sd15, "neg pos", 32, True,
        strength=1.0, parts={"unet": _other(tiny.unet(), in_channels=9)},
    )  # fmt: skip


def sd15_pix2pix() -> Made:
    return _plain_image(
        _edited(
            "StableDiffusionInstructPix2PixPipeline", tiny_pipelines.sd15, "pos image neg", 32,
            False, image_guidance_scale=1.5, parts={"unet": _other(tiny.unet(), in_channels=8)},
        )
    )  # fmt: skip


def sdxl_image() -> Made:
    return _plain_image(
        _edited(
            "StableDiffusionXLImg2ImgPipeline", tiny_pipelines.sdxl, "neg pos", 32, False,
            strength=0.7,
        )
    )  # fmt: skip


def sdxl_inpaint() -> Made:
    return _edited(
        "StableDiffusionXLInpaintPipeline", tiny_pipelines.sdxl, "neg pos", 32, True, strength=0.99
    )


def sdxl_pix2pix() -> Made:
    return _plain_image(
        _edited(
            "StableDiffusionXLInstructPix2PixPipeline", tiny_pipelines.sdxl, "pos image neg", 32,
            False, image_guidance_scale=1.5,
            parts={"unet": _other(tiny.unet(sdxl=True), in_channels=8)},
        )
    )  # fmt: skip


def sd3_image() -> Made:
    return _edited(
        "StableDiffusion3Img2ImgPipeline", tiny_pipelines.sd3, "neg pos", 16, False, strength=0.7
    )


def sd3_inpaint() -> Made:
    """Its pipeline asks for SD3's own 16 channels."""
    return _edited(
        "StableDiffusion3InpaintPipeline", tiny_pipelines.sd3, "neg pos", 16, True, strength=0.7,
        parts={
            "transformer": _other(tiny.sd3(), in_channels=16, out_channels=16),
            "vae": _other(tiny_pipelines._vae(), latent_channels=16),
        },
    )  # fmt: skip


def flux_image() -> Made:
    return _edited("FluxImg2ImgPipeline", tiny_pipelines.flux, "one", 16, False, strength=0.7)


def flux_inpaint() -> Made:
    return _edited("FluxInpaintPipeline", tiny_pipelines.flux, "one", 16, True, strength=0.7)


def flux_inpaint_true_cfg() -> Made:
    return _edited(
        "FluxInpaintPipeline", lambda: tiny_pipelines.flux(true_cfg=True), "split", 16, True,
        strength=0.7,
    )  # fmt: skip


def flux_kontext() -> Made:
    return _edited(
        "FluxKontextPipeline", tiny_pipelines.flux, "one", 16, False,
        max_area=256, _auto_resize=False,
    )  # fmt: skip


def flux_kontext_true_cfg() -> Made:
    return _edited(
        "FluxKontextPipeline", lambda: tiny_pipelines.flux(true_cfg=True), "split", 16, False,
        max_area=256, _auto_resize=False,
    )  # fmt: skip


def flux_fill() -> Made:
    return _edited(
        "FluxFillPipeline", tiny_pipelines.flux, "one", 16, True, 
        parts={"transformer": _other(tiny.flux(), in_channels=48, out_channels=16)},
    )  # fmt: skip


def _controlled(cls: str, base: Any, layout: str, size: int, net: Any, **more: Any) -> Made:
    pipe, call = _again(cls, base, controlnet=net)
    return pipe, call | more, layout


def controlnet_of(unet: Any) -> Any:
    torch.manual_seed(2)
    return tiny._spread(
        diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    )


def sd15_controlnet(**more: Any) -> Made:
    return _controlled(
        "StableDiffusionControlNetPipeline", tiny_pipelines.sd15, "neg pos", 32,
        controlnet_of(tiny.unet()), image=picture(32), **more,
    )  # fmt: skip


def sd3_controlnet() -> Made:
    torch.manual_seed(2)
    net = diffusers.SD3ControlNetModel.from_transformer(
        tiny.sd3(), num_layers=2, num_extra_conditioning_channels=0
    )
    return _controlled(
        "StableDiffusion3ControlNetPipeline", tiny_pipelines.sd3, "neg pos", 16,
        tiny._spread(net), control_image=picture(16),
    )  # fmt: skip


def flux_controlnet() -> Made:
    torch.manual_seed(2)
    net = diffusers.FluxControlNetModel.from_transformer(
        tiny.flux(), num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2,
    )  # fmt: skip
    return _controlled(
        "FluxControlNetPipeline", tiny_pipelines.flux, "one", 16,
        tiny._spread(net), control_image=picture(16),
    )  # fmt: skip


def wan_vace() -> Made:
    """Its control channels: 2 x 4 of latents and 8 x 8 of the mask."""
    model = _other(MORE["vace"](), vace_in_channels=72, text_dim=16)
    pipe, call = _again("WanVACEPipeline", tiny_pipelines.wan, transformer=model)
    return pipe, call, "split"


def wan_image(text: int = 512, second: bool = False) -> Made:
    """Wan 2.1 I2V: an embedded picture beside the text, and its latents in further channels."""
    encoder = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2,
            image_size=8, patch_size=4,
        )
    )  # fmt: skip
    size = {"height": 8, "width": 8}
    model = _other(tiny.wan(), image_dim=8, added_kv_proj_dim=24, in_channels=12)
    pipe, call = _again(
        "WanImageToVideoPipeline", tiny_pipelines.wan, transformer=model, image_encoder=encoder,
        image_processor=transformers.CLIPImageProcessor(size=size, crop_size=size),
    )  # fmt: skip
    call |= {
        "image": PIL.Image.fromarray((picture(32)[0].permute(1, 2, 0) * 255).byte().numpy()),
        "prompt_embeds": _rand(1, text, 16, seed=1),
        "negative_prompt_embeds": _rand(1, text, 16, seed=2),
    }
    return pipe, call, "split"


def wan_image_two() -> Made:
    """Wan 2.2 I2V: two denoisers, and the picture in the latents only."""
    models = [_other(tiny.wan(), in_channels=12) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(0.9)
    pipe, call = _again(
        "WanImageToVideoPipeline", lambda: tiny_pipelines.wan(*models), boundary_ratio=0.5,
        image_encoder=None, image_processor=None,
    )  # fmt: skip
    return pipe, call | {"image": picture(32), "num_inference_steps": 4}, "split"


EDITING: dict[str, Callable[[], Made]] = {
    name: made
    for name, made in list(globals().items())
    if name.startswith(("sd15_", "sdxl_", "sd3_", "flux_", "wan_"))
}
