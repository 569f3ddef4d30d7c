"""What a suite is: jobs to render, what to hold against what, and the bars. Data, checked by field.

The files lie in `suites/`. A suite is written and committed before it runs: its digest stands in
every result, so that a question changed afterwards shows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attn_control.errors import AttnControlError
from attn_control.render.job import Job
from attn_control.render.jobfile import job_from
from attn_control.render.yamlfile import YamlFile, read_yaml

FOLDER = Path(__file__).with_name("suites")
# Parts of the exact scorer's verdict; `right` is all of them together.
VERDICTS = ("right", "present", "bound", "relation", "background")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Where(_Strict):
    """Which of the zoo's fixed prompts; what is left out does not narrow."""

    split: Literal["seen", "heldout"] | None = None
    objects: Annotated[int, Field(ge=1)] | None = None

    def holds(self, prompt: dict[str, Any]) -> bool:
        """Whether a row of the prompt file belongs here."""
        asked = self.model_dump(exclude_none=True)
        return all(prompt[key] == value for key, value in asked.items())

    def __str__(self) -> str:
        words = {None: "", 1: "one object", 2: "two objects"}
        parts = [self.split or "", words.get(self.objects, f"{self.objects} objects")]
        return ", ".join(part for part in parts if part) or "all"


class Bar(_Strict):
    """A number that the project holds itself to.

    A share of one variant (`against` empty), or the difference of two. `target` is the bar; below
    `floor` the model does not ship. All are shares between 0 and 1.
    """

    job: str
    variant: str
    against: str | None = None
    verdict: Literal["right", "present", "bound", "relation", "background"] = "right"
    where: Where = Where()
    target: Annotated[float, Field(ge=-1, le=1)]
    floor: Annotated[float, Field(ge=-1, le=1)] | None = None


class Planted(_Strict):
    """The positive control: pictures of `variant` with a share of them replaced by true drawings.

    An evaluation that cannot see this effect could see no other, and counts as failed.
    """

    variant: str
    share: Annotated[float, Field(gt=0, le=1)]
    seed: int = 0


class Measurement(_Strict):
    """One job of a suite, and what its variants are held against."""

    job: dict[str, Any]
    baseline: str
    against: list[str] = Field(default_factory=list)  # more variants to take differences to
    groups: list[Where] = Field(default_factory=lambda: [Where()])
    planted: Planted


class Suite(_Strict):
    """A whole suite; `discordance` is what its power is reckoned with (see plan.py)."""

    question: str
    measurements: dict[str, Measurement]
    bars: list[Bar] = Field(default_factory=list)
    discordance: Annotated[float, Field(gt=0, le=1)] = 0.3

    @model_validator(mode="after")
    def _names_exist(self) -> Suite:
        for name, each in self.measurements.items():
            variants = list(each.job.get("variants", {}))
            for key, asked in (
                ("baseline", [each.baseline]),
                ("against", each.against),
                ("planted.variant", [each.planted.variant]),
            ):
                for variant in asked:
                    if variant not in variants:
                        raise ValueError(
                            f"measurements.{name}.{key}: no variant is called {variant!r}; there "
                            f"are: {', '.join(variants)}"
                        )
        for number, bar in enumerate(self.bars):
            if bar.job not in self.measurements:
                raise ValueError(f"bars.{number}.job: no measurement is called {bar.job!r}")
            variants = list(self.measurements[bar.job].job.get("variants", {}))
            for variant in filter(None, (bar.variant, bar.against)):
                if variant not in variants:
                    raise ValueError(f"bars.{number}: no variant is called {variant!r}")
        return self


def suite_names() -> tuple[str, ...]:
    """The suites that come with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@dataclass(frozen=True)
class SuiteFile:
    """A suite with where it stands in its file and the digest of the file's text."""

    name: str
    suite: Suite
    source: YamlFile
    digest: str

    def job(self, name: str, spread: int | None = None) -> tuple[Job, YamlFile]:
        """The render job of one measurement, checked as `attn-control render` checks one.

        spread: only so many prompts, spread evenly over those that the suite names.
        """
        path = ("measurements", name, "job")
        marks = {key[3:]: mark for key, mark in self.source.marks.items() if key[:3] == path}
        source = YamlFile(self.source.name, self.suite.measurements[name].job, marks)
        job = job_from(source)
        if job.prompts.zoo is None:
            problem = "a suite measures on the fixed prompts of a zoo model: {zoo: NAME}"
            raise source.error(("prompts",), problem)
        if spread is not None:
            job = job.model_copy(
                update={"prompts": job.prompts.model_copy(update={"spread": spread})}
            )
        return job, source


def load_suite(name: str) -> SuiteFile:
    """A suite that comes with the package, or one's own from the path of a YAML file.

    Raises:
        AttnControlError: no such suite, or a mistake in the file, with its place.
    """
    path = FOLDER / f"{name}.yaml" if name in suite_names() else Path(name)
    if not path.is_file():
        raise AttnControlError(
            f"no suite {name!r}; there are: {', '.join(suite_names())}, or the path of a YAML file"
        )
    source = read_yaml(path)
    try:
        suite = Suite.model_validate(source.data)
    except ValidationError as error:
        first = error.errors()[0]
        problem = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] == "value_error" else f", got {str(first['input'])[:80]!r}"
        raise source.error(tuple(first["loc"]), problem + got) from None
    return SuiteFile(path.stem, suite, source, hashlib.sha256(path.read_bytes()).hexdigest())
