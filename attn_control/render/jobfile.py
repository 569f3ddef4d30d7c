"""Reads a Job from YAML; every error names the file, line, column, key path and value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from attn_control.errors import AttnControlError
from attn_control.render.job import (
    At,
    Job,
    ModelSpec,
    PromptEntry,
    PromptSource,
    Sampler,
    Variant,
    VideoSpec,
    close,
)
from attn_control.render.yamlfile import KeyPath, YamlFile, dotted, parse_yaml, read_yaml


def load_job(path: Path | str) -> tuple[Job, YamlFile]:
    """Read and check a job file; the second value tells where every key stands."""
    source = read_yaml(path)
    return job_from(source), source


def job_from_text(text: str, name: str = "job") -> tuple[Job, YamlFile]:
    """The same for text in memory, as the documentation's examples are tested."""
    source = parse_yaml(text, name)
    return job_from(source), source


def job_from(source: YamlFile) -> Job:
    """Check parsed YAML; the first problem in file order becomes one AttnControlError."""
    if not isinstance(source.data, dict):
        raise source.error((), f"expected keys (model, prompts, ...), got {_short(source.data)}")
    _alias_list_variants(source)
    try:
        return Job.model_validate(source.data)
    except ValidationError as error:
        problems = error.errors()
        # A misspelt key is both unknown and missing: say the first. Otherwise go by line.
        problems.sort(
            key=lambda each: (each["type"] == "missing", _line(source, _explain(each)[0]))
        )
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        path, text = _explain(problems[0])
        raise source.error(path, text + more) from None


def model_from(fields: dict[str, Any]) -> ModelSpec:
    """A ModelSpec from the command line's --model and --device."""
    try:
        return ModelSpec.model_validate(fields)
    except ValidationError as error:
        path, text = _explain(error.errors()[0])
        raise AttnControlError(f"--{dotted(path)}: {text}") from None


def _alias_list_variants(source: YamlFile) -> None:
    """Let `variants.NAME...` find its place also where the file has a list of variants."""
    variants = source.data.get("variants")
    if isinstance(variants, list):
        for path, mark in list(source.marks.items()):
            if len(path) >= 2 and path[0] == "variants":
                item = variants[path[1]]
                if isinstance(item, dict) and isinstance(item.get("name"), str):
                    source.marks.setdefault(("variants", item["name"], *path[2:]), mark)


def _line(source: YamlFile, path: KeyPath) -> tuple[int, int]:
    while path and path not in source.marks:
        path = path[:-1]
    return source.marks.get(path, (0, 0))


def _yaml_path(loc: tuple[Any, ...]) -> KeyPath:
    """The key path as written: 'texts' and 'file' do not stand in the short forms."""
    if len(loc) > 1 and loc[0] == "prompts" and loc[1] in ("texts", "file"):
        return (loc[0], *loc[2:])
    return loc


def _explain(problem: Any) -> tuple[KeyPath, str]:
    path = _yaml_path(tuple(problem["loc"]))
    kind, value = problem["type"], _short(problem["input"])
    if kind == "extra_forbidden":
        known = _fields_at(path[:-1])
        return path, f"unknown key{close(str(path[-1]), known)}; known: {', '.join(known)}"
    if kind == "missing":
        return path[:-1], f"the key {path[-1]!r} is missing"
    if kind == "value_error":
        error = problem["ctx"]["error"]
        return (*path, *error.path) if isinstance(error, At) else path, str(error)
    expected = problem["msg"].replace("Input should be", "expected").replace("Input", "value")
    return path, f"{expected}, got {value}"


def _fields_at(path: KeyPath) -> list[str]:
    if path and path[-1] == "sampler":
        return list(Sampler.model_fields)
    if len(path) == 2 and path[0] == "variants":
        return list(Variant.model_fields)
    if len(path) == 2 and path[0] == "prompts":
        return list(PromptEntry.model_fields)
    named: dict[KeyPath, type[BaseModel]] = {
        ("model",): ModelSpec,
        ("prompts",): PromptSource,
        ("video",): VideoSpec,
    }
    return list(named.get(path, Job).model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
