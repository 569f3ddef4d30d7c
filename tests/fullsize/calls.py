"""One call of each full-size denoiser, at its pipeline's default size.

Large tensors are on the meta device: they have shapes and no memory. What decides a layout by its
values (position ids, masks) is real, and made by the pipeline's own function where there is one.
Texts have the most tokens that the pipeline takes; four pipelines take them as long as the prompt,
here 512 for FLUX.3, Qwen-Image and Qwen-Image 2.1, 256 for ERNIE-Image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.modular_pipelines.flux3 import before_denoise as flux3
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

Call = dict[str, Any]
_CPU = torch.device("cpu")


def big(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def ones(length: int) -> torch.Tensor:
    return torch.ones(1, length, dtype=torch.bool)


def _call(sample: tuple[int, ...], *text: int, time: float = 500.0, **more: Any) -> Call:
    """One row: the sample's shape and the text's, without the batch dimension."""
    return {
        "hidden_states": big(1, *sample),
        "encoder_hidden_states": big(1, *text),
        "timestep": torch.full((1,), time),
        **more,
    }


def _packed(channels: int, width: int, text: int, img: torch.Tensor, **more: Any) -> Call:
    """Packed tokens with the ids of an image of 64 x 64 of them, and perhaps of a reference."""
    ids = img[0] if img.ndim == 3 else img
    txt = torch.zeros(text, ids.shape[-1])
    txt = txt[None] if img.ndim == 3 else txt
    return _call((len(ids), channels), text, width, time=0.5, img_ids=img, txt_ids=txt, **more)


def flux_ids(reference: bool = False) -> torch.Tensor:
    make = diffusers.FluxPipeline._prepare_latent_image_ids
    ids = make(1, 64, 64, _CPU, torch.float32)
    if not reference:
        return ids
    other = make(1, 64, 64, _CPU, torch.float32)
    other[..., 0] = 1  # as FluxKontextPipeline.prepare_latents marks it
    return torch.cat([ids, other])


def _flux(reference: bool = False) -> Call:
    return _packed(64, 4096, 512, flux_ids(reference), pooled_projections=big(1, 768),
                   guidance=torch.full((1,), 3.5))  # fmt: skip


def _flux2(width: int, **more: Any) -> Call:
    ids = diffusers.Flux2Pipeline._prepare_latent_ids(big(1, 128, 64, 64)).float()
    return _packed(128, width, 512, ids, **more)


def _longcat() -> Call:
    ids = prepare_pos_ids(1, "image", start=(512, 512), height=64, width=64)
    return _packed(64, 3584, 512, ids)


def _bria() -> Call:
    ids = diffusers.BriaPipeline._prepare_latent_image_ids(1, 64, 64, _CPU, torch.float32)
    return _packed(16, 4096, 128, ids)


def _krea2() -> Call:
    ids = diffusers.Krea2Pipeline.prepare_position_ids(512, 64, 64, _CPU)
    return _call((4096, 64), 512, 12, 2560, time=0.5, position_ids=ids,
                 encoder_attention_mask=ones(512))  # fmt: skip


def _qwen(*shapes: tuple[int, int, int], **more: Any) -> Call:
    tokens = sum(frames * height * width for frames, height, width in shapes)
    return _call((tokens, 64), 512, 3584, time=0.5, img_shapes=[list(shapes)],
                 encoder_hidden_states_mask=ones(512), **more)  # fmt: skip


def _sizes(*names: str) -> Call:
    return {name: torch.full((1, 2), 1024.0) for name in names}


def _glm() -> Call:
    return _call((16, 128, 128), 2048, 1472, prior_token_id=torch.zeros(1, 4096, dtype=torch.long),
                 prior_token_drop=torch.zeros(1, 4096, dtype=torch.bool),
                 **_sizes("target_size", "crop_coords"))  # fmt: skip


def _hidream() -> Call:
    return {
        "hidden_states": big(1, 16, 128, 128),
        "timesteps": torch.full((1,), 500.0),
        "encoder_hidden_states_t5": big(1, 128, 4096),
        "encoder_hidden_states_llama3": big(32, 1, 128, 4096),
        "pooled_embeds": big(1, 2048),
    }


def _two_texts(sample: tuple[int, ...], first: tuple[int, int], second: int, **more: Any) -> Call:
    """HunyuanImage's and HunyuanVideo 1.5's: a second encoder reads what is quoted."""
    return _call(sample, *first, encoder_attention_mask=ones(first[0]),
                 encoder_hidden_states_2=big(1, second, 1472),
                 encoder_attention_mask_2=ones(second), **more)  # fmt: skip


def _hunyuandit() -> Call:
    return _call((4, 128, 128), 77, 1024, text_embedding_mask=ones(77),
                 encoder_hidden_states_t5=big(1, 256, 2048), text_embedding_mask_t5=ones(256),
                 image_rotary_emb=(big(4096, 88), big(4096, 88)))  # fmt: skip


def _wan(channels: int = 16, grid: tuple[int, int, int] = (21, 60, 104), **more: Any) -> Call:
    return _call((channels, *grid), 512, 4096, **more)


def _picture() -> Call:
    """CLIP's embedding of the first frame."""
    return {"encoder_hidden_states_image": big(1, 257, 1280)}


def _animate() -> Call:
    return _wan(36, (21, 90, 160), **_picture(), pose_hidden_states=big(1, 16, 20, 90, 160),
                face_pixel_values=big(1, 3, 77, 512, 512))  # fmt: skip


def _hunyuanvideo() -> Call:
    return _call((16, 33, 90, 160), 256, 4096, encoder_attention_mask=ones(256),
                 pooled_projections=big(1, 768), guidance=torch.full((1,), 6000.0))  # fmt: skip


def _ltx2() -> Call:
    return _call((6144, 128), 1024, 3840, encoder_attention_mask=ones(1024),
                 audio_hidden_states=big(1, 126, 128), audio_num_frames=126,
                 audio_encoder_hidden_states=big(1, 1024, 3840),
                 audio_encoder_attention_mask=ones(1024),
                 num_frames=16, height=16, width=24)  # fmt: skip


def _cog(channels: int, frames: int, height: int, width: int, step: int = 1, **more: Any) -> Call:
    tokens = frames // step * (height // 2) * (width // 2)
    return _call((frames, channels, height, width), 226, 4096,
                 image_rotary_emb=(big(tokens, 64), big(tokens, 64)), **more)  # fmt: skip


def _face() -> Call:
    return {"id_cond": big(1, 1280), "id_vit_hidden": [big(1, 577, 1024) for _ in range(5)]}


def _kandinsky() -> Call:
    # 16 channels of noise, 16 of the first frame, one that says where it is
    return _call((31, 64, 96, 33), 512, 3584, pooled_projections=big(1, 768),
                 visual_rope_pos=[torch.arange(n) for n in (31, 32, 48)],
                 text_rope_pos=torch.arange(512))  # fmt: skip


def _anyflow() -> Call:
    times = torch.full((1, 21), 500.0)
    return _call((21, 16, 60, 104), 512, 4096) | {"timestep": times, "r_timestep": times - 100}


def _sdxl() -> Call:
    more = {"text_embeds": big(1, 1280), "time_ids": big(1, 6)}
    return _unet(1, (4, 128, 128), 2048) | {"added_cond_kwargs": more}


def _unet(rows: int, sample: tuple[int, ...], width: int) -> Call:
    return {
        "sample": big(1, *sample),
        "encoder_hidden_states": big(rows, 77, width),
        "timestep": torch.tensor(500),
    }


def _sd3() -> Call:
    return _call((16, 128, 128), 77 + 256, 4096, pooled_projections=big(1, 2048))


def _masked(sample: tuple[int, ...], text: int, embedding: int, **more: Any) -> Call:
    return _call(sample, text, embedding, encoder_attention_mask=ones(text), **more)


CALLS: dict[str, Callable[[], Call]] = {
    "sd15": lambda: _unet(1, (4, 64, 64), 768),
    "sdxl": _sdxl,
    "sd3-medium": _sd3,
    "sd35-medium": _sd3,
    "sd35-large": _sd3,
    "flux1-dev": _flux,
    "flux1-kontext": lambda: _flux(reference=True),
    "flux2-dev": lambda: _flux2(15360, guidance=torch.full((1,), 4.0)),
    "flux2-klein-4b": lambda: _flux2(7680),
    "flux3": lambda: _packed(128, 20480, 512, flux3._prepare_image_ids(64, 64, 0.5)),
    "chroma": lambda: _packed(64, 4096, 512, flux_ids(), attention_mask=ones(512 + 4096)),
    "ovis": lambda: _packed(64, 2048, 256, flux_ids()),
    "longcat-image": _longcat,
    "qwen-image": lambda: _qwen((1, 64, 64)),
    "qwen-image-edit": lambda: _qwen((1, 64, 64), (1, 64, 64)),
    # Four layers and what they make up, of 640 x 640 pixels, and the picture to be taken apart.
    "qwen-image-layered": lambda: _qwen(*[(1, 40, 40)] * 6, additional_t_cond=torch.tensor([0])),
    "qwen-image-21": lambda: _call(
        (4096, 64), 512, 4096, time=0.5, img_shapes=[[(1, 64, 64)]],
        img_mask=torch.tensor([[False] * 512 + [True] * 1024]),  # a slot is 2 x 2 tokens
    ),
    "cogview4": lambda: _call((16, 128, 128), 1024, 4096,
                              **_sizes("original_size", "target_size", "crop_coords")),
    "cogview3plus": lambda: _call((16, 128, 128), 224, 4096,
                                  **_sizes("original_size", "target_size", "crop_coords")),
    "auraflow": lambda: _call((4, 128, 128), 256, 2048, time=0.5),
    "pixart-sigma": lambda: _masked((4, 128, 128), 300, 4096,
                                    added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    "sana": lambda: _masked((32, 32, 32), 300, 2304),
    "lumina2": lambda: _masked((16, 128, 128), 256, 2304, time=0.5),
    "hunyuanimage": lambda: _two_texts((64, 64, 64), (1000, 3584), 128),
    "bria": _bria,
    "krea2": _krea2,
    "hidream": _hidream,
    "hunyuandit": _hunyuandit,
    "prx": lambda: _call((16, 64, 64), 256, 2304, time=0.5, attention_mask=ones(256)),
    "ernie-image": lambda: {"hidden_states": big(1, 128, 64, 64), "timestep": torch.ones(1),
                            "text_bth": big(1, 256, 3072), "text_lens": torch.tensor([256])},
    "glm-image": _glm,
    "z-image": lambda: {"x": [big(16, 1, 128, 128)], "t": torch.ones(1),
                        "cap_feats": [big(512, 2560)]},
    "wan21-t2v-1.3b": _wan,
    "wan21-t2v-14b": _wan,
    "wan21-i2v-14b": lambda: _wan(36, **_picture()),
    "wan22-t2v-a14b": _wan,
    "wan22-ti2v-5b": lambda: _wan(48, (21, 30, 52)),
    "wan21-vace-14b": lambda: _wan(control_hidden_states=big(1, 96, 21, 60, 104)),
    "wan22-animate-14b": _animate,
    "skyreels-v2-14b": lambda: _wan(grid=(25, 68, 120)),
    "chronoedit-14b": lambda: _wan(36, (2, 60, 104), **_picture()),  # 5 frames without reasoning
    "hunyuanvideo": _hunyuanvideo,
    "hunyuanvideo15": lambda: _two_texts((65, 31, 30, 53), (1000, 3584), 256,
                                         image_embeds=torch.zeros(1, 729, 1152)),
    "mochi": lambda: _masked((12, 4, 60, 106), 256, 4096),
    "ltx-video": lambda: _masked((7392, 128), 128, 4096, num_frames=21, height=16, width=22),
    "ltx2": _ltx2,
    "cogvideox-5b": lambda: _cog(16, 13, 60, 90),
    "cogvideox15-5b": lambda: _cog(16, 22, 96, 170, step=2),
    "consisid": lambda: _cog(32, 13, 60, 90, **_face()),
    "kandinsky5-lite": _kandinsky,
    "cosmos1-7b": lambda: _call((16, 16, 88, 160), 512, 1024, padding_mask=big(1, 1, 704, 1280)),
    "cosmos2-2b": lambda: _call((16, 1, 96, 170), 512, 1024, padding_mask=big(1, 1, 768, 1360)),
    "allegro": lambda: _call((4, 22, 90, 160), 1, 512, 4096, encoder_attention_mask=ones(512)),
    "motif-video": lambda: _masked((33, 31, 92, 160), 512, 2560),
    "sana-video": lambda: _masked((16, 21, 60, 104), 300, 2304),
    "animatediff": lambda: _unet(16, (4, 16, 64, 64), 768),
    "anyflow-14b": _anyflow,
}  # fmt: skip
