"""The page as a value: what one run asks for, its limits, and the job that says the same."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.render.job import MAX_SEED
from attn_control.render.yamlfile import JobError, KeyPath, dump_yaml
from attn_control.studio.facts import Facts
from attn_control.studio.form import ControlOptions, Form, Method, controls_of, form_of
from attn_control.studio.settings import Refused, Settings

WITHOUT, WITH = "without", "with"
_PICTURE = re.compile(r"reference-[0-9a-f]{16}\.png")


@dataclass(frozen=True)
class Page:
    """One prompt and one seed, made without and with the controls.

    picture: the name of a reference picture of the studio's; "" for none.
    """

    model: str
    prompt: str
    seed: int
    steps: int
    cfg: float | None
    height: int
    width: int
    frames: int | None = None
    negative: str = ""
    picture: str = ""
    controls: tuple[ControlOptions, ...] = ()


def start_form(facts: Facts, methods: tuple[Method, ...]) -> Form:
    """What the page opens with, and what a model starts with."""
    form, _ = form_of((), methods)
    return {"seed": 0, "negative": "", "picture": "", **facts.start, **form}


def page_of(
    form: Mapping[str, Any], facts: Facts, methods: tuple[Method, ...], settings: Settings
) -> Page:
    """Read and check every field of the page.

    Args:
        form: "prompt", "picture", "negative", "seed", "steps", "cfg", "height", "width", "frames"
            and the fields of every method.
        facts: of the model that is chosen.

    Raises:
        Refused: the first field that is wrong, with its place.
    """
    prompt = _text(form, "prompt", settings.text, "prompt")
    if not prompt:
        raise Refused("prompt", "write a prompt first, for example: a red circle")
    height, width = (_whole(form, side, 8, settings.pixels) for side in ("height", "width"))
    for side, value in (("height", height), ("width", width)):
        if value % facts.multiple:
            raise Refused(
                "sampler",
                f"{side} {value} is not a multiple of {facts.multiple}, as this model needs",
            )
    if height * width > settings.pixels:
        raise Refused(
            "sampler",
            f"{width} x {height} are {height * width} pixels, this studio allows {settings.pixels}",
        )
    frames = None
    if facts.video:
        frames = _whole(form, "frames", 1, settings.frames)
        if (frames - 1) % facts.period:
            raise Refused(
                "sampler",
                f"frames must be 1 more than a multiple of {facts.period}, got {frames}",
            )
    return Page(
        model=facts.model,
        prompt=prompt,
        seed=_whole(form, "seed", 0, MAX_SEED),
        steps=_whole(form, "steps", 1, settings.steps),
        cfg=None if facts.cfg is None else _cfg(form),
        height=height,
        width=width,
        frames=frames,
        negative=_text(form, "negative", settings.text, "sampler") if facts.negative else "",
        picture=_picture(form, facts),
        controls=controls_of(form, methods, settings.text),
    )


def job_of(page: Page, facts: Facts, device: Mapping[str, str]) -> str:
    """The same as YAML, which `attn-control render` takes and which gives the same pictures."""
    sampler: dict[str, Any] = {"num_inference_steps": page.steps}
    if facts.cfg == "guidance_scale":
        sampler["guidance_scale"] = page.cfg
    sampler |= {"height": page.height, "width": page.width}
    if page.frames is not None:
        sampler["num_frames"] = page.frames
    if page.negative:
        sampler["negative_prompt"] = page.negative
    if facts.cfg not in (None, "guidance_scale"):
        sampler["extra"] = {facts.cfg: page.cfg}
    prompt = {"prompt": page.prompt, "image": page.picture} if page.picture else page.prompt
    variants: dict[str, Any] = {WITHOUT: {}}
    if page.controls:
        variants[WITH] = {"controls": [{name: options} for name, options in page.controls]}
    return dump_yaml(
        {
            "model": {"name": page.model, **device} if device else page.model,
            "prompts": [prompt],
            "seeds": [page.seed],
            "sampler": sampler,
            "variants": variants,
        }
    )


def placed(error: AttnControlError, page: Page) -> Refused:
    """A job's error as the page's: at the field or the section that stands behind its key."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, JobError):
        return Refused(_place(error.path, page), error.problem)
    reason = getattr(error, "reason", str(error))
    # A refusal during the run begins with the control that it is about.
    named = [name for name, _ in page.controls if reason.startswith((f"{name}(", f"{name}:"))]
    return Refused(named[0] if named else "run", reason)


def _place(path: KeyPath, page: Page) -> str:
    head = path[0] if path else "run"
    if head == "variants":
        index = next((part for part in path if isinstance(part, int)), None)
        if index is not None and index < len(page.controls):
            return page.controls[index][0]
        return page.controls[0][0] if page.controls else "run"
    if "image" in path:
        return "picture"
    places = {"model": "model", "prompts": "prompt", "seeds": "sampler", "sampler": "sampler"}
    return places.get(str(head), "run")


def _text(form: Mapping[str, Any], key: str, longest: int, place: str) -> str:
    value = form.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Refused(place, f"{key} must be text, got {type(value).__name__}")
    if len(value) > longest:
        raise Refused(place, f"{key} has {len(value)} characters, this studio takes {longest}")
    value = " ".join(value.split())
    if not value.isprintable():
        raise Refused(place, f"{key} holds characters that are no text")
    return value


def _picture(form: Mapping[str, Any], facts: Facts) -> str:
    name = form.get("picture") or ""
    if name and not (isinstance(name, str) and _PICTURE.fullmatch(name)):
        raise Refused("picture", "this is no picture of this studio: upload one")
    if name and not facts.picture:
        raise Refused("picture", "this model takes no reference picture: remove it")
    if not name and facts.picture == "must":
        raise Refused("picture", "this model needs a reference picture: upload one")
    return name


def _whole(form: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = form.get(key)
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value != int(value):
        raise Refused("sampler", f"{key} must be a whole number, got {value!r:.60}")
    if not low <= value <= high:
        raise Refused("sampler", f"{key} must be from {low} to {high}, got {int(value)!r:.30}")
    return int(value)


def _cfg(form: Mapping[str, Any]) -> float:
    value = form.get("cfg")
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not 0 <= value <= 100:
        raise Refused("sampler", f"CFG scale must be a number from 0 to 100, got {value!r:.60}")
    return float(value)
