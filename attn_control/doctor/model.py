"""All checks on one model, in the order in which their answers matter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from attn_control import attach
from attn_control.doctor import checks
from attn_control.doctor.finding import Finding, Skipped, attempt
from attn_control.doctor.heads import one_head, one_row
from attn_control.doctor.inputs import made_up_call
from attn_control.doctor.memory import memory
from attn_control.doctor.patient import Check, Patient
from attn_control.doctor.probe import layout
from attn_control.doctor.subject import (
    Subject,
    first_calls,
    load,
    pipeline_arguments,
    run_pipeline,
)
from attn_control.families import family_of
from attn_control.processors import HeadGate, SoftPAG
from attn_control.report import peak_memory

_CHECKS: tuple[tuple[str, Check], ...] = (
    ("family", checks.family),
    ("sites", checks.sites),
    ("prediction", checks.finite),
    ("layout", layout),
    ("empty plan", checks.empty),
    ("u = 0", checks.zero),
    ("one head", one_head),
    ("one row", one_row),
    ("peak memory", memory),
    ("restore", checks.restore),
)


def examine_model(name: str, device: str = "auto", steps: int = 2) -> Iterator[Finding]:
    """Load a model and make every check on it, one after another as they are asked for.

    Args:
        name: a built-in model, a folder (of a pipeline, or of a denoiser alone) or a hub id.
        device: as in a job: auto, cpu, cuda, cuda:0 or mps.
        steps: of the short runs of the pipeline, at least 2.

    Yields:
        A finding a check; a FAIL of loading is the only one.
    """
    subjects: list[Subject] = []

    def loading() -> Finding:
        subjects.append(load(name, device))
        return _loaded(subjects[0])

    yield from attempt("load", loading)
    for subject in subjects:
        yield from examine_subject(subject, steps)


def examine_subject(subject: Subject, steps: int = 2) -> Iterator[Finding]:
    """Every check on a model that is loaded."""
    calls: dict[str, dict[str, Any]] = {}
    try:
        arguments = pipeline_arguments(subject, steps)
    except Skipped as reason:
        yield Finding("SKIP", "pipeline", str(reason))
    else:
        yield from attempt("pipeline", lambda: _pipeline(subject, arguments, calls))
    for component, model in subject.models.items():
        for each in examine_denoiser(component, model, calls.get(component)):
            several = len(subject.models) > 1
            yield replace(each, name=f"{component}: {each.name}") if several else each


def _loaded(subject: Subject) -> Finding:
    whole = subject.pipe if subject.pipe is not None else next(iter(subject.models.values()))
    weights = sum(p.numel() for model in subject.models.values() for p in model.parameters())
    parts = ", ".join(f"{name} {type(m).__name__}" for name, m in subject.models.items())
    figures = {
        "kind": subject.kind,
        "class": type(whole).__name__,
        "denoisers": {name: type(model).__name__ for name, model in subject.models.items()},
        "weights": weights,
        "device": subject.device,
        "dtype": subject.dtype,
    }
    detail = (
        f"{type(whole).__name__} ({parts}), {weights / 1e6:.1f} M weights, {subject.dtype} on"
        f" {subject.device}"
    )
    return Finding("PASS", "load", detail, figures)


def _pipeline(
    subject: Subject, arguments: dict[str, Any], calls: dict[str, dict[str, Any]]
) -> Finding:
    """Short runs: plain, attached with nothing, with u = 0, and guided at every step."""
    with first_calls(subject.models) as seen:
        plain = run_pipeline(subject, arguments)
    calls.update(seen)
    again = run_pipeline(subject, arguments)
    steps = arguments["num_inference_steps"]
    size = "x".join(str(arguments[n]) for n in ("width", "height") if n in arguments) or "own size"
    where = f"{steps} steps at {size}"
    if not bool(torch.isfinite(plain).all()):
        return Finding("FAIL", "pipeline", f"{where}: the latents hold values that are no numbers")
    if not torch.equal(plain, again):
        raise Skipped(f"{where}: two plain runs differ, so nothing can be compared")
    with attach(subject.pipe) as session:
        if not torch.equal(run_pipeline(subject, arguments), plain):
            return Finding("FAIL", "pipeline", f"{where}: attached with no control, it differs")
        site = next((s for s in session.sites if s.slot in SoftPAG.slots), session.sites[0])
    own = site.slot in SoftPAG.slots
    folded = any(family_of(model).folded for model in subject.models.values())
    guide = SoftPAG(f"{site.label}H0", u=0.5, scale=1.0)
    acting = guide if own and not folded else HeadGate(f"{site.label}H0", gain=0.5)
    if own:
        with attach(subject.pipe, replace(guide, u=0.0)):
            if not torch.equal(run_pipeline(subject, arguments), plain):
                return Finding("FAIL", "pipeline", f"{where}: with u = 0, it differs")
    with attach(subject.pipe, acting, strict=True) as session:
        if torch.equal(run_pipeline(subject, arguments), plain):
            return Finding("FAIL", "pipeline", f"{where}: {acting} changed nothing")
        report = session.report()
    acted = sorted({n for steps_of in report.controls[0].steps.values() for n in steps_of})
    if acted != list(range(steps)) and len(acted) < steps:
        return Finding("FAIL", "pipeline", f"{where}: {acting} acted at steps {acted} only")
    if not torch.equal(run_pipeline(subject, arguments), plain):
        return Finding("FAIL", "pipeline", f"{where}: it differs after everything was undone")
    figures = {"steps": steps, "report": report.to_dict(), "process_peak_bytes": peak_memory()}
    detail = (
        f"{where}: empty and u = 0 runs give the same bits, {acting} acts at each step, and a run"
        " after it is plain again"
    )
    return Finding("PASS", "pipeline", detail, figures)


def examine_denoiser(
    component: str, model: nn.Module, call: dict[str, Any] | None = None
) -> Iterator[Finding]:
    """Every check on one denoiser.

    call: the arguments of one call of it, by name; None has some made up.
    """
    patients: list[Patient] = []

    def prepare() -> Sequence[Finding]:
        family = family_of(model)
        given = call if call is not None else made_up_call(model, family)
        patients.append(_patient(Patient(component, model, family, given)))
        return []

    yield from attempt("call", prepare)
    for name, check in _CHECKS:
        if patients:
            yield from attempt(name, partial(check, patients[0]))
        else:
            yield Finding("SKIP", name, "there is no call to look at")


def _patient(patient: Patient) -> Patient:
    with attach(patient.model) as session:
        patient.sites = session.sites
    patient.seen = patient.watched(attached=False)
    patient.plain = patient.predict()
    start = time.perf_counter()
    patient.steady = torch.equal(patient.plain, patient.predict())
    patient.seconds = time.perf_counter() - start
    return patient
