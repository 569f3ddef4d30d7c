"""Everything that can be checked before the first picture, and the plan that comes out of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.render.job import Job, Variant, check_prompts
from attn_control.render.models import ModelChoice, choose_model, fingerprint, load_model
from attn_control.render.signature import check_pipeline, check_samplers, default_of, uses_cfg
from attn_control.render.store import file_name
from attn_control.render.yamlfile import KeyPath, YamlFile

_SPARE = 50_000_000  # bytes that stay free on the disk


@dataclass(frozen=True)
class VariantPlan:
    """One variant, ready to run.

    `row_forwards`: single rows through the denoiser a picture. Not `exact`: a window of sigma
    depends on the picture's size and is checked at the first call only.
    """

    name: str
    controls: tuple[Any, ...]
    described: tuple[dict[str, Any], ...]
    kwargs: dict[str, Any]
    steps: int
    row_forwards: int
    exact: bool = True


@dataclass(frozen=True)
class Task:
    """One picture to make. `settings` is all that decides its pixels, `digest` their hash."""

    variant: str
    prompt: str
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
    prompts: tuple[str, ...]
    variants: tuple[VariantPlan, ...]
    tasks: tuple[Task, ...]

    @property
    def seeds(self) -> dict[str, list[int]]:
        """The seeds of each prompt, both in the job's order."""
        found: dict[str, list[int]] = {prompt: [] for prompt in self.prompts}
        for task in self.tasks:
            if task.variant == self.variants[0].name:
                found[task.prompt].append(task.seed)
        return found

    @property
    def row_forwards(self) -> int:
        """Rows through the denoiser over the whole job: what its time is proportional to."""
        each = {variant.name: variant.row_forwards for variant in self.variants}
        return sum(each[task.variant] for task in self.tasks)


def prepare(job: Job, source: YamlFile, out: Path, *, given: bool = False) -> Prepared:
    """Check the job against this machine and the real model; nothing is rendered or written.

    Args:
        job: what to do.
        source: where each of its keys stands, for the errors.
        out: where it would go.
        given: the model or its device come from the command line and stand in no file.

    Raises:
        AttnControlError: anything that would go wrong later, with its place in the file.
    """
    base = Path(source.name).parent
    prompts = read_prompts(job, source, base)
    check_out(out)
    controls = {name: _controls(name, each, source) for name, each in job.variants.items()}
    try:
        choice = choose_model(job.model, base)
        pipe = load_model(choice)
    except AttnControlError as error:
        raise error if given else source.error(("model",), str(error)) from error
    check_pipeline(pipe)
    shared = {**_defaults(choice), **job.sampler.kwargs()}
    merged = {name: {**shared, **each.sampler.kwargs()} for name, each in job.variants.items()}
    check_samplers(pipe, job, source, merged)
    plans = [
        _plan_variant(pipe, name, controls[name], kwargs, source) for name, kwargs in merged.items()
    ]
    weights = fingerprint(choice)
    seeds = _seeds(job, prompts)
    tasks = tuple(
        _task(plan, prompt, seed, weights, choice)
        for plan in plans
        for prompt in prompts
        for seed in seeds[prompt]
    )
    check_space(out, tasks)
    return Prepared(job, choice, pipe, tuple(prompts), tuple(plans), tasks)


def read_prompts(job: Job, source: YamlFile, base: Path) -> list[str]:
    """The prompts themselves, whichever of the three ways the job names them."""
    wanted = job.prompts
    if wanted.texts is not None:
        prompts = wanted.texts
    elif wanted.zoo is not None:
        prompts = _zoo_prompts(job, wanted.zoo, source)
    else:
        prompts = _file_prompts(wanted.file or "", source, base)
    stop = None if wanted.limit is None else wanted.offset + wanted.limit
    chosen = prompts[wanted.offset : stop]
    if not chosen:
        raise source.error(
            ("prompts",), f"no prompt is left of {len(prompts)} with offset {wanted.offset}"
        )
    count = min(wanted.spread or len(chosen), len(chosen))
    return [chosen[i * len(chosen) // count] for i in range(count)]


def _zoo_prompts(job: Job, name: str, source: YamlFile) -> list[str]:
    from attn_control import zoo

    wanted = job.prompts
    try:
        rows = zoo.load_prompts(name)
    except AttnControlError as error:
        raise source.error(("prompts", "zoo"), str(error)) from None
    for key in ("split", "objects"):
        value = getattr(wanted, key)
        known = sorted({row[key] for row in rows})
        if value is not None and value not in known:
            expected = ", ".join(map(repr, known))
            raise source.error(("prompts", key), f"expected one of {expected}, got {value!r}")
        rows = [row for row in rows if value is None or row[key] == value]
    if not rows:
        raise source.error(("prompts",), "no prompt of the set has this split and these objects")
    return [row["prompt"] for row in rows]


def _seeds(job: Job, prompts: list[str]) -> dict[str, list[int]]:
    """The seeds of each prompt: the job's, or the one fixed beside it in its zoo set."""
    if isinstance(job.seeds, list):
        return dict.fromkeys(prompts, job.seeds)
    from attn_control import zoo

    fixed = {row["prompt"]: [row["seed"]] for row in zoo.load_prompts(job.prompts.zoo or "")}
    return {prompt: fixed[prompt] for prompt in prompts}


def _file_prompts(name: str, source: YamlFile, base: Path) -> list[str]:
    path = base / Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise source.error(
            ("prompts",),
            f"no such prompts file: {str(path)!r} (for a single prompt write a list: [{name!r}])",
        ) from None
    except UnicodeDecodeError:
        raise source.error(("prompts",), f"{str(path)!r} is not UTF-8 text") from None
    except OSError as error:
        raise source.error(("prompts",), f"cannot read {str(path)!r}: {error.strerror}") from None
    lines = [line.strip() for line in text.splitlines()]
    try:
        return check_prompts([line for line in lines if line and not line.startswith("#")])
    except ValueError as error:
        raise source.error(("prompts",), f"{str(path)!r}: {error}") from None


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
        if not (out / "images" / task.file).exists():
            need += 3 * sampler.get("height", 1024) * sampler.get("width", 1024)
    if need > free:
        raise AttnControlError(
            f"--out {str(out)!r}: {len(tasks)} pictures need up to {need / 1e9:.1f} GB and the "
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
    return VariantPlan(name, controls, described, kwargs, steps, cost, preview.exact)


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


def _defaults(choice: ModelChoice) -> dict[str, Any]:
    if choice.kind != "zoo":
        return {}
    from attn_control import zoo

    return dict(zoo.defaults(choice.name))


def _task(
    plan: VariantPlan, prompt: str, seed: int, weights: dict[str, Any], choice: ModelChoice
) -> Task:
    settings = {
        "model": weights,
        "dtype": choice.dtype,
        "device": choice.device.partition(":")[0],
        "prompt": prompt,
        "seed": seed,
        "sampler": plan.kwargs,
        "controls": list(plan.described),
    }
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Task(
        plan.name, prompt, seed, settings, digest, file_name(prompt, seed, plan.name, digest)
    )
