"""What a Job is: model, prompts, seeds, sampler and variants, checked field by field.

Nothing here loads a model or torch. `jobfile.py` reads one from YAML and places the errors.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from attn_control.render.yamlfile import KeyPath

MAX_SEED = 2**63 - 1
MAX_SEEDS = 100_000


class At(ValueError):
    """A problem with something below the field being checked; `path` leads there."""

    def __init__(self, path: KeyPath, problem: str) -> None:
        super().__init__(problem)
        self.path = path


class _Strict(BaseModel):
    """No unknown key, no silent conversion (`"7"` is not 7), no empty value."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _no_empty_value(cls, data: Any) -> Any:
        if isinstance(data, dict):
            empty = [key for key, value in data.items() if value is None]
            if empty:
                raise At((empty[0],), "has no value; write one or leave the key out")
        return data


class ModelSpec(_Strict):
    """Which pipeline: the name of a built-in model, a folder, or a Hugging Face hub id."""

    name: str = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        kind, _, index = value.partition(":")
        if kind not in ("auto", "cpu", "cuda", "mps") or (index and not index.isdigit()):
            raise ValueError(f"expected auto, cpu, cuda, cuda:0 or mps, got {value!r}")
        return value


class PromptEntry(_Strict):
    """One prompt of the job, perhaps with a reference picture (a path beside the job file)."""

    prompt: str
    image: Annotated[str, Field(min_length=1)] | None = None


class PromptSource(_Strict):
    """Prompts from the job itself, from a text file (one a line) or from a fixed set of the zoo."""

    texts: list[PromptEntry] | None = None
    file: str | None = None
    zoo: str | None = None
    split: str | None = None
    objects: Annotated[int, Field(ge=1)] | None = None
    offset: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=1)] | None = None
    spread: Annotated[int, Field(ge=1)] | None = None  # so many, evenly over those chosen

    @model_validator(mode="after")
    def _one_source(self) -> PromptSource:
        if sum(source is not None for source in (self.texts, self.file, self.zoo)) != 1:
            raise ValueError("give a list of prompts, or the path of a text file, or {zoo: NAME}")
        if self.zoo is None and (self.split is not None or self.objects is not None):
            raise ValueError("'split' and 'objects' choose from a zoo prompt set; add 'zoo: NAME'")
        return self

    @field_validator("texts", mode="before")
    @classmethod
    def _entries(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        for index, item in enumerate(value):
            if not isinstance(item, (str, dict)):
                raise At((index,), f"expected text or {{prompt: ..., image: ...}}, got {item!r}")
        return [{"prompt": item} if isinstance(item, str) else item for item in value]

    @field_validator("texts")
    @classmethod
    def _texts(cls, value: list[PromptEntry] | None) -> list[PromptEntry] | None:
        return None if value is None else check_prompts(value)


class Sampler(_Strict):
    """Arguments of the pipeline's call; unset ones keep the model's own default."""

    num_inference_steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    height: Annotated[int, Field(ge=8, le=16_384)] | None = None
    width: Annotated[int, Field(ge=8, le=16_384)] | None = None
    num_frames: Annotated[int, Field(ge=1, le=100_000)] | None = None
    negative_prompt: str | None = None
    max_sequence_length: Annotated[int, Field(ge=1)] | None = None
    extra: dict[str, Any] = Field(default_factory=dict)

    def kwargs(self) -> dict[str, Any]:
        """What was written, as keyword arguments."""
        named = self.model_dump(exclude={"extra"}, exclude_none=True)
        return {**named, **self.extra}

    @model_validator(mode="after")
    def _extra_is_extra(self) -> Sampler:
        doubled = sorted(set(self.extra) & (set(type(self).model_fields) - {"extra"}))
        if doubled:
            problem = f"{doubled[0]!r} is a sampler key of its own, write it outside 'extra'"
            raise At(("extra", doubled[0]), problem)
        return self


class VideoSpec(_Strict):
    """How videos are written: `auto` is png (lossless) for built-in models, mp4 for all others."""

    format: Literal["auto", "png", "mp4"] = "auto"
    fps: Annotated[float, Field(ge=0.1, le=240)] | None = (
        None  # None: what the pipeline says, or 16
    )


class ControlSpec(_Strict):
    """One control by name with its options, as the processors' registry takes them."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Variant(_Strict):
    """One column of the sheet: a preset, a list of controls after it, changes to the sampler."""

    preset: str | None = None
    controls: list[ControlSpec] = Field(default_factory=list)
    sampler: Sampler = Field(default_factory=Sampler)

    @field_validator("controls", mode="before")
    @classmethod
    def _controls(cls, value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError("expected a list, one control an item: '- SoftPAG: {heads: L3H1}'")
        return [_control(index, item) for index, item in enumerate(value)]


class Job(_Strict):
    """A whole render job."""

    model: ModelSpec
    prompts: PromptSource
    seeds: list[int] | Literal["own"]  # own: each zoo prompt with the seed fixed beside it
    variants: dict[str, Variant]
    sampler: Sampler = Field(default_factory=Sampler)
    compare: list[str] = Field(default_factory=list)
    video: VideoSpec | None = None
    title: str | None = None

    @field_validator("model", mode="before")
    @classmethod
    def _model(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("prompts", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {"texts": value}
        return {"file": value} if isinstance(value, str) else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        return value if value == "own" else parse_seeds(value)

    @field_validator("variants", mode="before")
    @classmethod
    def _variants(cls, value: Any) -> Any:
        return _named_variants(value)

    @model_validator(mode="after")
    def _own_seeds_exist(self) -> Job:
        if self.seeds == "own" and self.prompts.zoo is None:
            raise At(
                ("seeds",), "'own' means the seeds of a zoo prompt set; use prompts: {zoo: NAME}"
            )
        return self

    @model_validator(mode="after")
    def _compare_exists(self) -> Job:
        for name in self.compare:
            if name not in self.variants:
                hint = close(name, self.variants)
                raise At(("compare",), f"no variant is called {name!r}{hint}")
        return self


def check_prompts(entries: Sequence[PromptEntry]) -> list[PromptEntry]:
    """Refuse an empty list, an empty prompt and a prompt given twice; strip the others."""
    if not entries:
        raise ValueError("the list of prompts is empty, expected at least one")
    first: dict[PromptEntry, int] = {}
    for index, entry in enumerate(entries):
        each = entry.model_copy(update={"prompt": entry.prompt.strip()})
        if not each.prompt:
            raise At((index,), "the prompt is empty, expected text")
        if each in first:
            told = repr(each.prompt) + (f" with {each.image!r}" if each.image else "")
            raise At((index,), f"{told} is already prompt {first[each]}, each counts once")
        first[each] = index
    return list(first)


def parse_seeds(value: Any) -> list[int]:
    """Seeds as a list (`[0, 5]`), one number, or ranges with both ends (`"0-7, 12"`)."""
    hint = "expected a list like [0, 1, 2] or a range like 0-7"
    seeds: list[int] = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise ValueError(f"{part!r} is not a seed; {hint}")
        for word in [part] if isinstance(part, int) else part.split(","):
            seeds += _seed_range(word, hint)
            if len(seeds) > MAX_SEEDS:
                raise ValueError(f"{value!r} holds more than {MAX_SEEDS} seeds")
    if not seeds:
        raise ValueError(f"no seed given; {hint}")
    twice = [seed for seed, count in Counter(seeds).items() if count > 1]
    if twice:
        raise ValueError(f"seed {twice[0]} is given twice")
    return seeds


def _seed_range(word: int | str, hint: str) -> list[int]:
    first, dash, last = str(word).strip().partition("-")
    if isinstance(word, int):
        first, dash, last = str(word), "", ""
    try:
        low, high = int(first), int(last) if dash else int(first)
    except ValueError:
        raise ValueError(f"{word!r} is not a seed or a range of seeds; {hint}") from None
    if low < 0 or high > MAX_SEED:
        raise ValueError(f"seed {low if low < 0 else high} is outside 0 to 2**63 - 1")
    if high < low:
        raise ValueError(f"the range {word!r} runs backwards; {hint}")
    if high - low >= MAX_SEEDS:
        raise ValueError(f"the range {word!r} holds more than {MAX_SEEDS} seeds")
    return list(range(low, high + 1))


def _control(index: int, item: Any) -> dict[str, Any]:
    if isinstance(item, str):
        return {"name": item}
    if isinstance(item, dict) and len(item) == 1:
        ((name, options),) = item.items()
        if options is None:
            options = {}
        if isinstance(options, dict):
            return {"name": name, "options": options}
    raise At(
        (index,),
        f"expected one control with its options, '- SoftPAG: {{heads: L3H1}}', got {item!r}",
    )


def _named_variants(value: Any) -> Any:
    """A mapping as it stands, or a list of `{name: ..., controls: ...}` turned into one."""
    if isinstance(value, list):
        named: dict[str, Any] = {}
        for index, item in enumerate(value):
            name = item.get("name") if isinstance(item, dict) else None
            if not isinstance(name, str):
                raise At((index,), "expected a variant with a 'name' that is text")
            if name in named:
                raise At((index,), f"two variants are called {name!r}, names must differ")
            named[name] = {key: part for key, part in item.items() if key != "name"}
        value = named
    if not isinstance(value, dict) or not value:
        raise ValueError("expected at least one variant: 'plain: {}'")
    for name in value:
        if not name.strip():
            raise At((name,), "a variant's name is empty")
    return {name: {} if part is None else part for name, part in value.items()}


def close(word: str, known: Any) -> str:
    """`; did you mean 'prompts'` when a known word is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}" if match else ""
