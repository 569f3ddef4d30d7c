"""What a suite is: jobs to render, what to hold against what, and the bars. Data, checked by field.

The files lie in `suites/`. A suite is written and committed before it runs: its digest stands in
every result, so that a question changed afterwards shows. A suite may be put together from others,
its `parts`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.eval.groups import Strict, Where
from attn_control.render.job import Job, close
from attn_control.render.jobfile import job_from
from attn_control.render.yamlfile import KeyPath, YamlFile, read_yaml
from attn_control.zoo.prompts import traits

FOLDER = Path(__file__).with_name("suites")
MASS = "mass"  # the one verdict of a bar that no picture's score holds


class Bar(Strict):
    """A number that the project holds itself to.

    A share of one variant (`against` empty), or the difference of two. `target` is the bar; below
    `floor` the model does not ship. All are shares between 0 and 1. verdict: a part of the model's
    score (`zoo.verdicts`), or `mass`, the share of heads that stay near (`eval/mass.py`).
    """

    job: str
    variant: str
    against: str | None = None
    verdict: str = "right"
    where: Where = Where()
    target: Annotated[float, Field(ge=-1, le=1)]
    floor: Annotated[float, Field(ge=-1, le=1)] | None = None


class Planted(Strict):
    """The positive control: pictures of `variant` with a share of them replaced by true drawings.

    An evaluation that cannot see this effect could see no other, and counts as failed.
    """

    variant: str
    share: Annotated[float, Field(gt=0, le=1)]
    seed: int = 0


class Mass(Strict):
    """Where heads look, measured on a few prompts of the job in one variant, without controls.

    prompts: how many, spread evenly over those of the job. steps: of the sampler, the variant's own
    unless given; at: those that are measured, from 0, all unless given. heads: a selector.
    """

    variant: str
    prompts: Annotated[int, Field(ge=1)] = 5
    steps: Annotated[int, Field(ge=1)] | None = None
    at: list[int] | None = None
    heads: str = "all"


class Sparsity(Strict):
    """That a measurement holds sparse attention in videos against the dense run of the same seed.

    tokens: what each video has at least, checked before anything runs. density, psnr, gain: the
    bar. Some variant of at most this amortised density reaches this PSNR (dB), and is better by
    this many dB than its own mask without a correction. closer: videos of a sparse variant whose
    difference to the dense ones is halved, which has to be found as 6.02 dB.
    """

    tokens: Annotated[int, Field(ge=1)]
    closer: Planted
    density: Annotated[float, Field(gt=0, le=1)] = 0.35
    psnr: Annotated[float, Field(gt=0)] = 30.0
    gain: Annotated[float, Field(gt=0)] = 3.0


class Measurement(Strict):
    """One job of a suite, and what its variants are held against.

    rounds: how often each variant takes its turn when seconds are measured. sparse: the baseline is
    dense, every other variant a sparse control, and what counts is likeness (`eval/fidelity.py`).
    """

    job: dict[str, Any]
    baseline: str
    against: list[str] = Field(default_factory=list)  # more variants to take differences to
    groups: list[Where] = Field(default_factory=lambda: [Where()])
    planted: Planted
    mass: Mass | None = None
    rounds: Annotated[int, Field(ge=1)] = 7
    sparse: Sparsity | None = None

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Measurement:
        given = self.model_fields_set & {"against", "groups", "mass"}
        if self.sparse is not None and given:
            raise ValueError(f"'{sorted(given)[0]}' has no meaning beside 'sparse'")
        return self


class Suite(Strict):
    """A whole suite; `discordance` is what its power is reckoned with (see power.py)."""

    question: str
    parts: list[str] = Field(default_factory=list)  # more suites, by name: theirs are added
    measurements: dict[str, Measurement] = Field(default_factory=dict)
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
                ("mass.variant", [each.mass.variant] if each.mass else []),
                ("sparse.closer.variant", [each.sparse.closer.variant] if each.sparse else []),
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


def part_names() -> tuple[str, ...]:
    """The suites of one model each that they are put together from, by name."""
    found = (path.relative_to(FOLDER) for path in FOLDER.glob("*/*.yaml"))
    return tuple(sorted(path.with_suffix("").as_posix() for path in found))


@dataclass(frozen=True)
class SuiteFile:
    """A suite with all its parts, the file that each measurement stands in, and their digest."""

    name: str
    suite: Suite
    homes: dict[str, YamlFile]
    digest: str

    def job(self, name: str, spread: int | None = None) -> tuple[Job, YamlFile]:
        """The render job of one measurement, checked as `attn-control render` checks one.

        spread: only so many prompts, spread evenly over those that the suite names.
        """
        path, home = ("measurements", name, "job"), self.homes[name]
        marks = {key[3:]: mark for key, mark in home.marks.items() if key[:3] == path}
        source = YamlFile(home.name, self.suite.measurements[name].job, marks)
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
    known = (*suite_names(), *part_names())
    path = FOLDER / f"{name}.yaml" if name in known else Path(name)
    if not path.is_file():
        raise AttnControlError(
            f"no suite {name!r}; there are: {', '.join(known)}, or the path of a YAML file"
        )
    suite, source = _read(path)
    digest = hashlib.sha256(path.read_bytes())
    homes = dict.fromkeys(suite.measurements, source)
    measurements, bars = dict(suite.measurements), list(suite.bars)
    for number, each in enumerate(suite.parts):
        at: KeyPath = ("parts", number)
        file = FOLDER / f"{each}.yaml" if each in known else path.parent / each
        if not file.is_file():
            raise source.error(at, f"no suite {each!r}{close(each, known)}")
        part, home = _read(file)
        twice = set(part.measurements) & set(measurements)
        if part.parts or twice:
            what = f"measures {sorted(twice)[0]!r} again" if twice else "has parts of its own"
            raise source.error(at, f"{each!r} {what}")
        homes |= dict.fromkeys(part.measurements, home)
        measurements |= part.measurements
        bars += part.bars
        digest.update(file.read_bytes())
    if not measurements:
        raise source.error((), "a suite needs 'measurements' or 'parts'")
    whole = suite.model_copy(update={"measurements": measurements, "bars": bars})
    return SuiteFile(path.stem, whole, homes, digest.hexdigest())


def _read(path: Path) -> tuple[Suite, YamlFile]:
    """One file without its parts, checked as far as a look at the zoo's prompts allows."""
    source = read_yaml(path)
    try:
        suite = Suite.model_validate(source.data)
    except ValidationError as error:
        first = error.errors()[0]
        problem = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] == "value_error" else f", got {str(first['input'])[:80]!r}"
        raise source.error(tuple(first["loc"]), problem + got) from None
    for name, each in suite.measurements.items():
        at: KeyPath = ("measurements", name)
        for number, group in enumerate(each.groups):
            _check_group(group, each, source, (*at, "groups", number))
    for number, bar in enumerate(suite.bars):
        _check_bar(bar, suite.measurements[bar.job], source, ("bars", number))
    return suite, source


def model_of(measurement: Measurement) -> str | None:
    """The zoo model whose prompts a measurement runs on, as its job says; None for no such."""
    prompts = measurement.job.get("prompts")
    name = prompts.get("zoo") if isinstance(prompts, dict) else None
    return name if name in zoo.NAMES else None


def _check_group(group: Where, each: Measurement, source: YamlFile, at: KeyPath) -> None:
    model = model_of(each)
    if model is None:
        return  # said where the job is checked
    found = [traits(model, row) for row in zoo.load_prompts(model)]
    for key in group.asked():
        if key not in found[0]:
            known = ", ".join(found[0])
            raise source.error((*at, key), f"prompts of {model} are told apart by {known} only")
    if not any(map(group.holds, found)):
        raise source.error(at, f"no prompt of {model} is in the group '{group}'")


def _check_bar(bar: Bar, each: Measurement, source: YamlFile, at: KeyPath) -> None:
    _check_group(bar.where, each, source, (*at, "where"))
    model = model_of(each)
    if bar.verdict == MASS:
        if each.mass is None or each.mass.variant != bar.variant:
            problem = f"measurement {bar.job!r} measures no mass of variant {bar.variant!r}"
            raise source.error((*at, "verdict"), problem)
        if bar.against is not None or bar.where.asked():
            raise source.error(at, "a bar on mass takes neither 'against' nor 'where'")
    elif model is not None and bar.verdict not in zoo.verdicts(model):
        known = (*zoo.verdicts(model), MASS)
        raise source.error(
            (*at, "verdict"), f"{model} has no verdict {bar.verdict!r}; it has {', '.join(known)}"
        )
