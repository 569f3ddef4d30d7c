"""Everything that can be checked before the first picture, and the plan that comes out of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.render.job import Job, Variant
from attn_control.render.media import VideoFormat
from attn_control.render.models import ModelChoice, choose_model, fingerprint, load_model
from attn_control.render.prompts import Key, Prompt, read_prompts, seeds_of
from attn_control.render.signature import (
    call_parameters,
    check_pictures,
    check_pipeline,
    check_samplers,
    default_of,
    uses_cfg,
    video_format,
)
from attn_control.render.store import file_name
from attn_control.render.yamlfile import KeyPath, YamlFile

_SPARE = 50_000_000  # bytes that stay free on the disk


@dataclass(frozen=True)
class VariantPlan:
    """One variant, ready to run.

    `row_forwards`: single rows through the denoiser a picture. Not `exact`: a window of sigma
    depends on the picture's size and is checked at the first call only. `video` is None for
    pictures.
    """

    name: str
    controls: tuple[Any, ...]
    described: tuple[dict[str, Any], ...]
    kwargs: dict[str, Any]
    steps: int
    row_forwards: int
    exact: bool = True
    video: VideoFormat | None = None


@dataclass(frozen=True)
class Task:
    """One picture or video to make. `settings` is all that decides it, `digest` their hash."""

    variant: str
    prompt: Prompt
    seed: int
    settings: dict[str, Any]
    digest: str
    file: str


@dataclass(frozen=True)
class Prepared:
    """A checked job with its loaded pipeline."""

    job: Job
    choice: ModelChoice
    pipe: Any
    prompts: tuple[Prompt, ...]
    variants: tuple[VariantPlan, ...]
    tasks: tuple[Task, ...]

    @property
    def seeds(self) -> dict[Key, list[int]]:
        """The seeds of each prompt, both in the job's order."""
        return seeds_of(self.job, list(self.prompts))

    @property
    def things(self) -> str:
        """What the tasks make, in words."""
        return "pictures" if self.variants[0].video is None else "videos"

    @property
    def row_forwards(self) -> int:
        """Rows through the denoiser over the whole job: what its time is proportional to."""
        each = {variant.name: variant.row_forwards for variant in self.variants}
        return sum(each[task.variant] for task in self.tasks)


def prepare(
    job: Job,
    source: YamlFile,
    out: Path,
    *,
    given: bool = False,
    load: Callable[[ModelChoice], Any] = load_model,
    identify: Callable[[ModelChoice], dict[str, Any]] = fingerprint,
) -> Prepared:
    """Check the job against this machine and the real model; nothing is rendered or written.

    Args:
        job: what to do.
        source: where each of its keys stands, for the errors.
        out: where it would go.
        given: the model or its device come from the command line and stand in no file.
        load, identify: what loads the pipeline and names its weights; others keep them between
            jobs.

    Raises:
        AttnControlError: anything that would go wrong later, with its place in the file.
    """
    base = Path(source.name).parent
    prompts = read_prompts(job, source, base)
    check_out(out)
    controls = {name: _controls(name, each, source) for name, each in job.variants.items()}
    try:
        choice = choose_model(job.model, base)
        pipe = load(choice)
    except AttnControlError as error:
        raise error if given else source.error(("model",), str(error)) from error
    if choice.kind == "zoo" and any(prompt.image is not None for prompt in prompts):
        pipe = _with_pictures(pipe, source)
    check_pipeline(pipe)
    check_pictures(pipe, prompts, source)
    shared = {**_defaults(choice, pipe), **job.sampler.kwargs()}
    merged = {
        name: _whole_area(pipe, {**shared, **each.sampler.kwargs()})
        for name, each in job.variants.items()
    }
    check_samplers(pipe, job, source, merged)
    zoo_model = choice.kind == "zoo"  # whose pictures are measured: nothing may be lost
    plans = [
        _plan_variant(
            pipe, name, controls[name], kwargs,
            video_format(pipe, job.video, kwargs, zoo_model, source), source,
        )
        for name, kwargs in merged.items()
    ]  # fmt: skip
    weights = identify(choice)
    seeds = seeds_of(job, prompts)
    tasks = tuple(
        _task(plan, prompt, seed, weights, choice)
        for plan in plans
        for prompt in prompts
        for seed in seeds[prompt.key]
    )
    check_space(out, tasks)
    return Prepared(job, choice, pipe, tuple(prompts), tuple(plans), tasks)


def check_out(out: Path) -> None:
    """Refuse an output folder that cannot be written, without creating it."""
    if out.exists() and not out.is_dir():
        raise AttnControlError(f"--out {str(out)!r} is a file, expected a folder")
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise AttnControlError(f"--out {str(out)!r}: no permission to write in {str(parent)!r}")


def check_space(out: Path, tasks: tuple[Task, ...]) -> None:
    """Refuse a disk that the pictures would fill: raw size, for noise hardly compresses."""
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    need = _SPARE
    for task in tasks:
        sampler = task.settings["sampler"]
        frames = sampler.get("num_frames", 81) if "video" in task.settings else 1
        if not (out / "images" / task.file).exists():
            need += 3 * frames * sampler.get("height", 1024) * sampler.get("width", 1024)
    if need > free:
        things = "videos" if "video" in tasks[0].settings else "pictures"
        raise AttnControlError(
            f"--out {str(out)!r}: {len(tasks)} {things} need up to {need / 1e9:.1f} GB and the "
            f"disk has {free / 1e9:.1f} GB free"
        )


def _controls(name: str, variant: Variant, source: YamlFile) -> list[tuple[KeyPath, Any]]:
    """The controls of a variant, its preset's first, each with its place in the file."""
    from attn_control.catalog import preset

    built: list[tuple[KeyPath, Any]] = []
    if variant.preset is not None:
        place: KeyPath = ("variants", name, "preset")
        try:
            built += [(place, control) for control in preset(variant.preset)]
        except AttnControlError as error:
            raise source.error(place, str(error)) from None
    for index, spec in enumerate(variant.controls):
        control, problem = _try(spec.name, spec.options)
        if problem is not None:
            culprit = _culprit(spec.name, spec.options, problem)
            path = ("variants", name, "controls", index, spec.name)
            raise source.error(path if culprit is None else (*path, culprit), problem)
        built.append((("variants", name, "controls", index), control))
    return built


def _try(name: str, options: dict[str, Any]) -> tuple[Any, str | None]:
    from attn_control.processors import build_control

    try:
        return build_control(name, dict(options)), None
    except AttnControlError as error:
        return None, str(error)


def _culprit(name: str, options: dict[str, Any], problem: str) -> str | None:
    """The option to blame: the one without which all is well, or else without which it differs."""
    others: dict[str, str | None] = {}
    for key in options:
        _, others[key] = _try(name, {k: v for k, v in options.items() if k != key})
    well = [key for key, other in others.items() if other is None]
    changed = [key for key, other in others.items() if other != problem]
    found = well or changed
    return found[0] if len(found) == 1 else None


def _plan_variant(
    pipe: Any,
    name: str,
    placed: list[tuple[KeyPath, Any]],
    kwargs: dict[str, Any],
    video: VideoFormat | None,
    source: YamlFile,
) -> VariantPlan:
    own = kwargs.get("sigmas") or kwargs.get("timesteps")
    steps = kwargs.get("num_inference_steps") or default_of(pipe, "num_inference_steps", 50)
    steps = len(own) if isinstance(own, list) else int(steps)
    controls = tuple(control for _, control in placed)
    try:
        preview = _match(pipe, controls, steps)
    except AttnControlError as error:
        # Which one was it? Alone, only the culprit fails; else they fail together.
        for place, control in placed:
            try:
                _match(pipe, (control,), steps)
            except AttnControlError as alone:
                raise source.error(place, str(alone)) from None
        raise source.error(("variants", name, "controls"), str(error)) from None
    cost = preview.row_forwards(2 if uses_cfg(pipe, kwargs) else 1)
    described = tuple(describe(control) for control in controls)
    return VariantPlan(name, controls, described, kwargs, steps, cost, preview.exact, video)


def _match(pipe: Any, controls: tuple[Any, ...], steps: int) -> Any:
    """Attach without running: selectors, conflicts and windows are checked. Returns the preview."""
    from attn_control import attach

    # closing() and not `with attach(...)`: that would warn about controls that never acted.
    with closing(attach(pipe, *controls)) as session:
        return session.preview(steps)


def describe(control: Any) -> dict[str, Any]:
    """A control as data: its name and every option, defaults written out."""
    options = {field.name: getattr(control, field.name) for field in fields(control)}
    plain = {key: value if _is_plain(value) else str(value) for key, value in options.items()}
    return {"control": type(control).__name__, **plain}


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)  # JSON knows no infinity, such as SEG's sigma
    return value is None or isinstance(value, (bool, int, str))


def _with_pictures(pipe: Any, source: YamlFile) -> Any:
    """A built-in model in the pipeline that takes pictures, where it was trained with them."""
    from attn_control.zoo.references import with_references

    try:
        return with_references(pipe)
    except AttnControlError as error:
        raise source.error(("prompts",), str(error)) from None


def _defaults(choice: ModelChoice, pipe: Any) -> dict[str, Any]:
    if choice.kind != "zoo":
        return {}
    from attn_control import zoo

    found = dict(zoo.defaults(choice.name))
    if "_auto_resize" in call_parameters(pipe):
        found["_auto_resize"] = False  # would bring a reference to a size of the large model's
    return found


def _whole_area(pipe: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Pipelines with a `max_area` change the size to fit it: make it that of the asked size."""
    height, width = kwargs.get("height"), kwargs.get("width")
    if "max_area" in call_parameters(pipe) and height and width:
        return {"max_area": height * width, **kwargs}
    return kwargs


def _task(
    plan: VariantPlan, prompt: Prompt, seed: int, weights: dict[str, Any], choice: ModelChoice
) -> Task:
    settings: dict[str, Any] = {
        "model": weights,
        "dtype": choice.dtype,
        "device": choice.device.partition(":")[0],
        "prompt": prompt.text,
        "seed": seed,
        "sampler": plan.kwargs,
        "controls": list(plan.described),
    }
    if prompt.image is not None:
        settings["image"] = prompt.image.digest
    if plan.video is not None:
        settings["video"] = asdict(plan.video)
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    suffix = "png" if plan.video is None else plan.video.format
    file = file_name(prompt.text, seed, plan.name, digest, suffix)
    return Task(plan.name, prompt, seed, settings, digest, file)
