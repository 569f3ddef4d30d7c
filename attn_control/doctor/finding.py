"""One line of the doctor's: a status, a name, a reason, and the figures behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attn_control.errors import AttnControlError


@dataclass(frozen=True)
class Finding:
    """PASS: as it should be. WARN: works, with a limit. SKIP: could not be looked at, and why.
    FAIL: something will not work.

    ``figures`` are numbers and names for the JSON, plain enough for it.
    """

    status: str
    name: str
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)


class Skipped(Exception):
    """A check that cannot be made here; its text says why."""


def attempt(name: str, check: Callable[[], Finding | Sequence[Finding]]) -> list[Finding]:
    """Run a check. One that breaks is a FAIL, never a traceback: a broken installation, or a model
    that nobody has tried, may raise anything.
    """
    try:
        found = check()
    except Skipped as reason:
        return [Finding("SKIP", name, str(reason))]
    except AttnControlError as error:
        return [Finding("FAIL", name, " ".join(str(error).split()))]
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        return [Finding("FAIL", name, f"{type(error).__name__}: {text}")]
    return [found] if isinstance(found, Finding) else list(found)


def failed(findings: Sequence[Finding]) -> bool:
    return any(each.status == "FAIL" for each in findings)


def print_findings(findings: Iterable[Finding], width: int = 16) -> list[Finding]:
    """One line a finding, as soon as it comes; returns them all.

    width: of the column of names.
    """
    told = []
    for each in findings:
        print(f"{each.status:4}  {each.name:{width}}  {each.detail}", flush=True)
        told.append(each)
    return told


def write_json(path: Path, machine: Sequence[Finding], model: Sequence[Finding], name: Any) -> None:
    """Everything, to paste into an issue.

    Args:
        path: the file.
        machine, model: findings of either.
        name: of the model, as it was asked for; None without one.

    Raises:
        AttnControlError: the file cannot be written.
    """
    content = {
        "schema": 1,
        "failed": failed([*machine, *model]),
        "machine": [asdict(each) for each in machine],
        "model": name,
        "checks": [asdict(each) for each in model],
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AttnControlError(f"--json {str(path)!r}: cannot write: {error.strerror}") from None
