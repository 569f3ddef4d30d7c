"""What the published checkpoints must show, written down by hand from their cards and from the
sizes of their pictures: no code is shared with what is checked.
"""

from __future__ import annotations

from typing import NamedTuple


class Figures(NamedTuple):
    """Elements of the state dict, transformer blocks, sites by slot, (heads, heads of keys, width)
    of the softmax, and by slot the layouts at the pipeline's default size.
    """

    elements: int
    blocks: int
    sites: dict[str, int]
    heads: tuple[tuple[int, int, int], ...]
    layouts: dict[str, tuple[str, ...]]


def _joint(blocks: int, heads: int, width: int, elements: int, *layouts: str) -> Figures:
    """A joint attention in each block."""
    head = (heads, heads, width)
    return Figures(elements, blocks, {"joint": blocks}, (head,), {"joint": layouts})


def _two(blocks: int, heads: int, width: int, elements: int, *layouts: str, text: int) -> Figures:
    """In each block an attention of the picture's own and one that asks the text."""
    return Figures(
        elements,
        blocks,
        {"self": blocks, "cross": blocks},
        ((heads, heads, width),),
        {"self": layouts, "cross": tuple(f"{one} -> text {text}" for one in layouts)},
    )


def _cross(blocks: int, heads: int, width: int, elements: int, layout: str) -> Figures:
    head = (heads, heads, width)
    return Figures(elements, blocks, {"cross": blocks}, (head,), {"cross": (layout,)})


def _unknown(figures: Figures) -> Figures:
    """Attach-only: no layout is claimed."""
    return figures._replace(layouts={})


# 512 x 512 pixels: 64 x 64 latents, halved at each level; blocks of widths 320, 640, 1280.
_SD15_LEVELS = ("image 64x64", "image 32x32", "image 16x16", "image 8x8")
_SD15_HEADS = ((8, 8, 40), (8, 8, 80), (8, 8, 160))
_1K = "image 64x64"  # 1024 x 1024 pixels, in patches of 16
_480P = "video 21x30x52"  # 81 frames of 480 x 832 pixels, in patches of 4 x 16 x 16

FIGURES = {
    "sd15": _two(16, 8, 40, 859520964, *_SD15_LEVELS, text=77)._replace(heads=_SD15_HEADS),
    "sdxl": _two(70, 10, 64, 2567463684, "image 64x64", "image 32x32", text=77)._replace(
        heads=((10, 10, 64), (20, 20, 64))
    ),
    "sd3-medium": _joint(24, 24, 64, 2084951104, f"{_1K}, text 333"),
    "sd35-medium": _joint(24, 24, 64, 2469663936, f"{_1K}, text 333")._replace(
        sites={"joint": 24, "self2": 13},
        layouts={"joint": (f"{_1K}, text 333",), "self2": (_1K,)},
    ),
    "sd35-large": _joint(38, 38, 64, 8146280768, f"{_1K}, text 333"),
    "flux1-dev": _joint(57, 24, 128, 11901408320, f"text 512, {_1K}"),
    "flux1-kontext": _joint(57, 24, 128, 11901408320, f"text 512, {_1K}, reference 4096"),
    "flux2-dev": _joint(56, 48, 128, 32223281152, f"text 512, {_1K}"),
    "flux2-klein-4b": _joint(25, 24, 128, 3875544576, f"text 512, {_1K}"),
    "flux3": _joint(33, 24, 128, 5538458368, f"text 512, {_1K}")._replace(
        sites={"self": 5, "joint": 28},
        layouts={"self": (_1K,), "joint": (f"text 512, {_1K}",)},
    ),
    "chroma": _joint(57, 24, 128, 8899983424, f"text 512, {_1K}"),
    "ovis": _joint(33, 24, 128, 7370449728, f"text 256, {_1K}"),
    "longcat-image": _joint(30, 24, 128, 6270668864, f"text 512, {_1K}"),
    "qwen-image": _joint(60, 24, 128, 20430401088, f"text 512, {_1K}"),
    "qwen-image-edit": _joint(60, 24, 128, 20430401088, f"text 512, {_1K}, reference 64x64"),
    "qwen-image-layered": _joint(
        60, 24, 128, 20430401088 + 2 * 3072,
        "text 512" + ", image 40x40" * 5 + ", reference 40x40",
    ),
    "qwen-image-21": _joint(
        32, 32, 128, 7115124736, f"text 512; {_1K} -> text 512, {_1K}"
    ),
    "cogview4": _joint(28, 32, 128, 6369118272, f"text 1024, {_1K}"),
    "cogview3plus": _joint(30, 64, 40, 2848836672, f"text 224, {_1K}"),
    "auraflow": _joint(36, 12, 256, 6858605568, f"register 8, text 256, {_1K}"),
    "pixart-sigma": _two(28, 16, 72, 610856096, _1K, text=300),
    "sana": _cross(20, 20, 112, 1604462752, "image 32x32 -> text 300"),
    "lumina2": _joint(26, 24, 96, 2609769152, f"text 256, {_1K}"),
    "hunyuanimage": _joint(60, 28, 128, 17425795520, f"{_1K}, text 1128"),
    "bria": _joint(36, 24, 96, 3785669392, f"text 128, {_1K}"),
    "krea2": _joint(28, 48, 128, 12820073036, f"text 512, {_1K}")._replace(
        heads=((48, 12, 128),)
    ),
    "hidream": _joint(48, 20, 128, 17105733184, f"{_1K}, text 384"),
    "hunyuandit": _two(40, 16, 88, 1499952032, _1K, text=77 + 256),
    "prx": _joint(16, 28, 64, 1170691648, "image 32x32 -> text 256, image 32x32"),
    "ernie-image": _joint(36, 32, 128, 8033490048, f"{_1K}, text 256"),
    "glm-image": _joint(30, 32, 128, 6926882880, f"text 2048, {_1K}"),
    "z-image": _joint(30, 30, 128, 6154908736, f"{_1K}, text 512"),
    "wan21-t2v-1.3b": _two(30, 12, 128, 1418996800, _480P, text=512),
    "wan21-t2v-14b": _two(40, 40, 128, 14288491584, _480P, text=512),
    "wan21-i2v-14b": _two(40, 40, 128, 16394878784, _480P, text=512),
    "wan22-t2v-a14b": _two(40, 40, 128, 14288491584, _480P, text=512),
    "wan22-ti2v-5b": _two(30, 24, 128, 4999787712, "video 21x15x26", text=512),
    "wan21-vace-14b": _two(40 + 8, 40, 128, 17337592896, _480P, text=512),
    "wan22-animate-14b": _two(
        40, 40, 128, 17274816884, "reference 45x80, video 20x45x80", text=512
    ),
    "skyreels-v2-14b": _two(40, 40, 128, 14288491584, "video 25x34x60", text=512),
    "chronoedit-14b": _two(40, 40, 128, 16394878784, "video 2x30x52", text=512),
    "hunyuanvideo": _joint(60, 24, 128, 12821012544, "video 33x45x80, text 256"),
    # T2V's embedded picture is of zeros: its 729 tokens count as the padding of two texts.
    "hunyuanvideo15": _joint(54, 16, 128, 8326608160, "video 31x30x53, text 1985"),
    "framepack": _unknown(_joint(60, 24, 128, 12874314816)),
    "ltx-video": _two(28, 32, 64, 1923385472, "video 21x16x22", text=128),
    "ltx2": _two(48, 32, 128, 18876174592, "video 16x16x24", text=1024),
    "cogvideox-5b": _joint(42, 48, 64, 5570283072, "text 226, video 13x30x45"),
    "cogvideox15-5b": _joint(42, 48, 64, 5570676352, "text 226, video 11x48x85"),
    "consisid": _joint(42, 48, 64, 6217102912, "text 226, video 13x30x45"),
    "kandinsky5-lite": _two(32, 28, 64, 2007702848, "video 31x32x48", text=512),
    "cosmos1-7b": _two(28, 32, 128, 7236192256, "video 16x44x80", text=512),
    "cosmos2-2b": _two(28, 16, 128, 1956405248, "video 48x85", text=512),
    "allegro": _two(32, 24, 96, 2771907856, "video 22x45x80", text=512),
    # Its last eight blocks, a decoder, see the video twice and no text.
    "motif-video": _joint(
        36, 12, 128, 1886712256,
        "video 31x46x80, text 512", "video 31x46x80, reference 31x46x80",
    ),
    "helios": _unknown(_two(40, 40, 128, 14312427584, text=512)),
    "latte": _unknown(_two(56, 16, 72, 1057246880, text=120)._replace(
        sites={"self": 56, "cross": 28}
    )),
    "mochi": _joint(48, 24, 128, 10027677744, "video 4x30x53, text 256"),
    "sana-video": _cross(20, 20, 112, 2056862144, f"{_480P} -> text 300"),
    "animatediff": _two(16, 8, 40, 1277221764, *_SD15_LEVELS, text=77)._replace(
        heads=_SD15_HEADS
    ),
    "anyflow-14b": _two(40, 40, 128, 14316026944, _480P, text=512),
}  # fmt: skip
