"""Runs a suite: renders what is missing, measures, judges the bars, writes the result."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attn_control import zoo
from attn_control.errors import AttnControlError
from attn_control.eval.attention_clock import clock_of
from attn_control.eval.costs import costs, sparse_costs
from attn_control.eval.fidelity import check_sparse, measure_sparse
from attn_control.eval.foretold import foretold
from attn_control.eval.measure import as_dict, kinds, measure
from attn_control.eval.plots import plot_result
from attn_control.eval.power import detectable
from attn_control.eval.suite import MASS, Bar, SuiteFile
from attn_control.eval.tables import costs_page, result_page
from attn_control.eval.workers import missing, processes, render_shared
from attn_control.render.command import write_sheets
from attn_control.render.measure import versions
from attn_control.render.prepare import Prepared, prepare
from attn_control.render.prompts import key_of
from attn_control.render.run import run
from attn_control.render.store import replace_file
from attn_control.render.summary import paired, share_right


@dataclass
class EvalOutcome:
    """What a suite left behind; `result` is None where the run was interrupted."""

    result: dict[str, Any] | None
    files: list[Path]
    interrupted: bool = False

    @property
    def passed(self) -> bool:
        """Whether every positive control was found. Says nothing of the bars."""
        return self.result is not None and all(
            each[key]["passed"]
            for each in self.result["measurements"].values()
            for key in ("planted", "closer")
            if key in each
        )


def plan_of(suite: SuiteFile, prepared: dict[str, Prepared]) -> dict[str, Any]:
    """What would run and what it could detect, before it runs."""
    measurements = {}
    for name, each in prepared.items():
        kind = kinds(each)
        groups = {}
        measurement = suite.suite.measurements[name]
        for group in measurement.groups if measurement.sparse is None else ():
            n = sum(group.holds(kind[prompt.key]) for prompt in each.prompts)
            points = detectable(n, suite.suite.discordance) if n else None
            groups[str(group)] = {"n": n, "detects": None if points is None else round(points, 4)}
        measurements[name] = {
            "model": each.choice.name,
            "variants": [plan.name for plan in each.variants],
            "pictures": len(each.tasks),
            "row_forwards": each.row_forwards,
            **({"groups": groups} if measurement.sparse is None else foretold(each)),
        }
    return {"suite": suite.name, "digest": suite.digest, "measurements": measurements}


def prepare_suite(suite: SuiteFile, out: Path, spread: int | None) -> dict[str, Prepared]:
    """Check every job of a suite against its model before the first picture is made."""
    found = {}
    for name in suite.suite.measurements:
        job, source = suite.job(name, spread)
        found[name] = prepare(job, source, out / name)
        model = found[name].choice
        if model.kind != "zoo":
            problem = (
                f"a suite measures a built-in model ({', '.join(zoo.NAMES)}), got {model.name!r}"
            )
            raise source.error(("model",), problem)
        if job.prompts.zoo != model.name:
            problem = f"the prompts of {job.prompts.zoo!r} are not those of {model.name!r}"
            raise source.error(("prompts", "zoo"), problem)
        measurement, home = suite.suite.measurements[name], suite.homes[name]
        if measurement.sparse is not None:
            try:
                check_sparse(found[name], measurement)
            except AttnControlError as error:
                raise home.error(("measurements", name), str(error)) from None
        mass = measurement.mass
        if mass is not None and job.variants[mass.variant].model_fields_set - {"sampler"}:
            at = ("measurements", name, "mass", "variant")
            raise home.error(at, f"{mass.variant!r} has controls; mass is measured without")
    return found


def run_suite(
    suite: SuiteFile,
    out: Path,
    *,
    spread: int | None = None,
    overwrite: bool = False,
    jobs: int | None = 1,
    console: Any = None,
) -> EvalOutcome:
    """Render and measure a suite; the same command goes on where an interrupted one ended.

    jobs: processes that render side by side; None for as many as pay (`workers.processes`).

    Writes `out/NAME/` (a render folder a job), and `result.json`, `result.md`, `costs.json`,
    `costs.md`, `plan.json` and a plot a job. result.* follow from the pictures alone, so that the
    same seeds give them byte for byte; costs.* are measured.

    Raises:
        AttnControlError: a mistake in the suite, before anything is rendered; or a failed picture.
    """
    prepared = prepare_suite(suite, out, spread)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "plan.json", _json(plan_of(suite, prepared)))
    measured, costing, dense = {}, {}, {}
    judged: list[dict[str, Any]] = []
    notes: list[str] = []
    left = 0 if jobs == 1 else missing(prepared, out, overwrite)
    jobs = processes(prepared, left) if jobs is None else jobs
    if jobs > 1 and left:
        shared = {"spread": spread, "overwrite": overwrite, "console": console}
        try:
            notes = render_shared(suite, out, left=left, jobs=jobs, **shared)
        except KeyboardInterrupt:
            return EvalOutcome(None, [], interrupted=True)
    for name, each in prepared.items():
        if console is not None:
            console.print(f"{suite.name}: {name}, {len(each.tasks)} pictures", style="dim")
        outcome = run(each, out / name, overwrite=overwrite and jobs == 1, console=console)
        if outcome.interrupted:
            return EvalOutcome(None, [], interrupted=True)
        notes += [f"{name}: {note}" for note in outcome.notes]
        write_sheets(each, outcome, out / name)
        spec = suite.suite.measurements[name]
        images = out / name / "images"
        if spec.sparse is None:
            measured[name] = measure(each, outcome.rows, spec, images)
            costing[name] = costs(each, spec.baseline, spec.rounds)
        else:
            measured[name] = measure_sparse(each, outcome.rows, spec, images)
            costing[name], dense[name] = kept(
                out / name / "times.json",
                [task.digest for task in each.tasks] + [spec.rounds, _machine(each)],
                partial(sparse_costs, each, measured[name], spec.rounds),
                anew=overwrite,
            )
        bars = [bar for bar in suite.suite.bars if bar.job == name]
        judged += [judge(bar, outcome.rows, each, measured[name]) for bar in bars]
    result = {
        "suite": suite.name,
        "question": suite.suite.question,
        "digest": suite.digest,
        "spread": spread,
        "versions": versions(),
        "notes": notes,
        "bars": judged,
        "measurements": measured,
    }
    spent = {
        "suite": suite.name,
        "digest": suite.digest,
        **_machine(next(iter(prepared.values()))),
        "rounds": {name: suite.suite.measurements[name].rounds for name in costing},
        "measurements": costing,
        **({"dense": dense} if dense else {}),
    }
    pages = {
        "result.json": _json(result), "result.md": result_page(result),
        "costs.json": _json(spent), "costs.md": costs_page(spent),
    }  # fmt: skip
    for file, text in pages.items():
        _write(out / file, text)
    return EvalOutcome(result, [*(out / file for file in pages), *plot_result(result, out)])


def judge(
    bar: Bar, rows: list[dict[str, Any]], prepared: Prepared, measured: dict[str, Any]
) -> dict[str, Any]:
    """Hold one bar against the pictures: `met`, `above the floor`, `below` or `not measured`."""
    if bar.verdict == MASS:
        found = measured["mass"]["share"]
    else:
        kind = kinds(prepared)
        here = [row for row in rows if bar.where.holds(kind[key_of(row)])]
        mine = [row for row in here if row["variant"] == bar.variant]
        theirs = [row for row in here if row["variant"] == bar.against]
        both = paired(mine, theirs, bar.verdict) if bar.against else None
        found = as_dict(both if bar.against else share_right(mine, bar.verdict))
    outcome = "not measured"
    if found is not None:
        outcome = "met" if found["mean"] >= bar.target else "below"
        if outcome == "below" and bar.floor is not None and found["mean"] >= bar.floor:
            outcome = "above the floor"
    fields = bar.model_dump(exclude={"where"})
    return {**fields, "where": str(bar.where), "found": found, "outcome": outcome}


def kept(path: Path, key: Any, measure: Callable[[], Any], *, anew: bool) -> Any:
    """What was measured before under the same key, or is measured now and kept in `path`: times of
    an hour's run must not be taken twice because it was interrupted.
    """
    digest = hashlib.sha256(_json({"key": key}).encode()).hexdigest()
    if path.is_file() and not anew:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == digest:
            return found["measured"]
    measured = measure()
    _write(path, _json({"key": digest, "measured": measured}))
    return measured


def _machine(prepared: Prepared) -> dict[str, str]:
    """What times are measured on, and by which clock."""
    import torch

    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores",
        "clock": clock_of(prepared.choice.device)[0],
    }


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1, default=str) + "\n"


def _write(path: Path, text: str) -> None:
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
