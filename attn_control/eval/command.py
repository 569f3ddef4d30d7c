"""What `attn-control eval` prints; and the page that `--publish` makes of results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.eval.foretold import estimate
from attn_control.eval.run import EvalOutcome, plan_of, prepare_suite, run_suite
from attn_control.eval.suite import SuiteFile, load_suite
from attn_control.eval.tables import costs_page, result_page
from attn_control.render.prepare import Prepared

_HEAD = """\
# Evaluation

This page is generated from the JSON files in [evaluation/](evaluation/) by `attn-control eval SUITE
--out DIR --publish docs`; a test holds it against them. What a suite asks, on which prompts and
seeds, was committed before it ran: its file lies in `attn_control/eval/suites/`, and each result
carries the file's digest. An interval is published whatever its sign: a method that shows no effect
on these tiny models may show one on others, and the other way round.
"""


def evaluate(
    name: str,
    out: Path,
    *,
    spread: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    publish: Path | None = None,
    jobs: int | None = 1,
    console: Any = None,
    log: Any = None,
) -> EvalOutcome | None:
    """Run a suite, print its tables; returns None after a dry run. jobs: as `run_suite` has it."""
    if publish is not None and spread is not None:
        raise AttnControlError("--publish takes whole suites only: leave out --prompts")
    suite = load_suite(name)
    if dry_run:
        prepared = prepare_suite(suite, out, spread)
        if console is not None:
            _say(console, json.dumps(plan_of(suite, prepared), indent=1))
            for line in estimates(suite, prepared, out):
                _say(console, line)
        return None
    outcome = run_suite(suite, out, spread=spread, overwrite=overwrite, jobs=jobs, console=log)
    if outcome.result is None:
        return outcome
    if console is not None:
        _say(console, result_page(outcome.result))
        _say(console, costs_page(json.loads((out / "costs.json").read_text(encoding="utf-8"))))
        for file in outcome.files:
            _say(console, str(file))
    if not outcome.passed:
        raise AttnControlError(
            f"suite {suite.name!r}: a planted effect was not found, so no figure of this run "
            f"counts; see {out / 'result.md'}"
        )
    if publish is not None:
        _publish(outcome, out, suite.name, publish)
    return outcome


def estimates(suite: SuiteFile, prepared: dict[str, Prepared], out: Path) -> list[str]:
    """How long each sparse measurement will take, in a sentence: measured by a few dense steps."""
    told = []
    for name, each in prepared.items():
        spec = suite.suite.measurements[name]
        if spec.sparse is None:
            continue
        done = sum((out / name / "images" / task.file).exists() for task in each.tasks)
        minutes = estimate(each, spec.rounds, done) / 60
        threads = _threads()
        told.append(
            f"{name}: about {minutes:.0f} minutes on {threads}, with {done} of {len(each.tasks)} "
            "videos there already"
        )
    return told


def _threads() -> str:
    """`1 thread` or so."""
    import torch

    count = torch.get_num_threads()
    return f"{count} thread" + ("" if count == 1 else "s")


def _publish(outcome: EvalOutcome, out: Path, name: str, docs: Path) -> None:
    folder = docs / "evaluation" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in outcome.files:
        if file.suffix in (".json", ".png"):
            shutil.copyfile(file, folder / file.name)
    (docs / "evaluation.md").write_text(published_page(docs / "evaluation"), encoding="utf-8")


def published_page(folder: Path) -> str:
    """docs/evaluation.md from the results below `folder`."""
    parts = [_HEAD]
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        costs = json.loads(path.with_name("costs.json").read_text(encoding="utf-8"))
        pictures = [
            f"![{name}](evaluation/{path.parent.name}/{name}.png)"
            for name in result["measurements"]
            if path.with_name(f"{name}.png").is_file()
        ]
        parts += [result_page(result), *pictures, costs_page(costs)]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _say(console: Any, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
