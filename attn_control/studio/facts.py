"""What the page has to know of a model: its heads, its sampler's start, what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from attn_control.call import Site
from attn_control.errors import AttnControlError
from attn_control.render.models import ModelChoice
from attn_control.render.signature import (
    call_parameters,
    check_pipeline,
    default_of,
    frame_period,
    makes_video,
    size_multiple,
)
from attn_control.studio.grid import Layer


@dataclass(frozen=True)
class Facts:
    """One model, as the page shows it.

    Attributes:
        layers: of the attention that has image or video tokens as queries and keys.
        cfg: the sampler's key of classifier-free guidance, None where the model has none.
        start: steps, cfg, height, width and frames that the page opens with.
        multiple, period: of height and width; what frames are one more than a multiple of.
        sites: all attention modules, without the modules, so that no model is kept for them.
        negative: whether the pipeline takes a negative prompt.
        even: whether all layers see the same tokens; those of a U-Net do not.
        picture: whether it takes a reference picture: "" no, "may", "must".
    """

    model: str
    kind: str
    layers: tuple[Layer, ...]
    cfg: str | None
    start: Mapping[str, Any]
    multiple: int = 8
    period: int = 1
    video: bool = False
    negative: bool = True
    even: bool = True
    picture: str = ""
    sites: tuple[Site, ...] = ()

    def tokens(self, height: int, width: int, frames: int | None) -> tuple[int, int, int] | None:
        """Frames, rows and columns of tokens of a picture or video; None where layers differ."""
        if not self.even:
            return None
        deep = 1 if frames is None else (frames - 1) // self.period + 1
        return deep, height // self.multiple, width // self.multiple


def facts_of(choice: ModelChoice, pipe: Any) -> Facts:
    """Read them off a loaded pipeline.

    Raises:
        AttnControlError: a pipeline that makes nothing of a prompt, or a denoiser of no family.
    """
    from attn_control import attach, zoo

    check_pipeline(pipe)
    with closing(attach(pipe)) as session:
        sites = [site for site in session.sites if not site.beside]
    heads: dict[int, int] = {}
    for site in sites:
        if site.slot in ("joint", "self") and site.model == sites[0].model:
            heads.setdefault(site.layer, site.heads)
    known = dict(zoo.defaults(choice.name)) if choice.kind == "zoo" else {}
    parameters = call_parameters(pipe)
    cfg = next((key for key in ("true_cfg_scale", "guidance_scale") if key in known), None)
    if cfg is None and "guidance_scale" in parameters:
        cfg = "guidance_scale"

    def start(key: str, otherwise: Any) -> Any:
        return known.get(key) or default_of(pipe, key) or otherwise

    video = makes_video(pipe)
    return Facts(
        model=choice.name if choice.folder is None else str(choice.folder),
        kind=choice.kind,
        layers=tuple(Layer(number, count) for number, count in sorted(heads.items())),
        cfg=cfg,
        start={
            "steps": int(start("num_inference_steps", 25)),
            "cfg": None if cfg is None else float(start(cfg, 1.0)),
            "height": int(start("height", 512)),
            "width": int(start("width", 512)),
            "frames": int(start("num_frames", 17)) if video else None,
        },
        multiple=size_multiple(pipe),
        period=frame_period(pipe),
        video=video,
        negative="negative_prompt" in parameters,
        even=getattr(pipe, "unet", None) is None,
        picture=_picture(choice, pipe),
        sites=tuple(replace(site, module=None) for site in sites),
    )


def _picture(choice: ModelChoice, pipe: Any) -> str:
    from attn_control.zoo.references import with_references

    taken = call_parameters(pipe).get("image")
    if taken is not None:
        return "must" if taken.default is taken.empty else "may"
    if choice.kind == "zoo":
        try:
            with_references(pipe)  # as `render` does where a prompt has a picture
            return "may"
        except AttnControlError:
            pass
    return ""
