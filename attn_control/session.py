"""``attach(pipe, *controls) -> Session``: installs, verifies, reports, restores."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any

from torch import nn

from attn_control.call import Site, Step
from attn_control.denoiser import Denoiser
from attn_control.entry import Entry
from attn_control.errors import AttnControlError
from attn_control.families import (
    bent_by,
    denoisers,
    family_of,
    refuse_guiders,
    refuse_kind,
    refuse_pipeline,
    unwrap,
)
from attn_control.foresight import place_of
from attn_control.ledger import Summary, summary
from attn_control.masks.line import Line
from attn_control.masks.place import Place
from attn_control.preview import Preview, foresee
from attn_control.processors.control import Control
from attn_control.report import ControlRecord, Report, Stopwatch, usage


def attach(pipe_or_model: Any, *controls: Control, strict: bool = False) -> Session:
    """Put controls on a pipeline (or a bare denoiser) until the session is closed.

    Works at once, and is undone by ``close()`` or at the end of a ``with`` block, also after an
    exception: every processor is then the same object of the same class as before. Sessions nest;
    the controls of all act, outer first.

    Args:
        pipe_or_model: a diffusers pipeline, or its transformer or UNet. On a bare model the sampler
            is not known: controls with a window are refused at the first call, and every batch row
            counts as conditional.
        controls: what to do; none at all leaves every result bit-identical.
        strict: raise instead of warn, on a clean exit, when some control never acted.

    Raises:
        AttnControlError: an unknown kind of model, or a control whose selector matches nothing.

    Example:
        >>> with attach(pipe, SoftPAG("L3H1, L5", u=0.5, scale=2.0)) as session:  # doctest: +SKIP
        ...     image = pipe("a red circle").images[0]
        >>> print(session.report())  # doctest: +SKIP
    """
    return Session(pipe_or_model, controls, strict=strict)


class Session:
    """What ``attach`` returns. Use it as a context manager, or call ``close()``."""

    def __init__(self, target: Any, controls: tuple[Control, ...], *, strict: bool = False) -> None:
        for control in controls:
            if not isinstance(control, Control):
                raise AttnControlError(
                    f"attach: expected controls such as SoftPAG('L3H1'), got {control!r} of type"
                    f" {type(control).__name__}"
                )
        models = denoisers(target)
        if controls:
            refuse_guiders(target)
        for control in controls:
            refuse_pipeline(target, control)
            for model in models.values():
                refuse_kind(family_of(model), control)
        self.controls, self.strict = controls, strict
        self.pipe = None if isinstance(target, nn.Module) else target
        self._closed = False
        self._denoisers: list[Denoiser] = []
        self._installed: list[Denoiser] = []
        self._entries: dict[int, list[Entry]] = {n: [] for n in range(len(controls))}
        try:
            for component, model in models.items():
                self._denoisers.append(self._join(model, component))
            sites = self.sites
            for control in controls:
                if control.made_for is not None:
                    for denoiser in (one for one in self._denoisers if not one.beside):
                        control.made_for.check(control, denoiser.family.name, denoiser.sites)
            chosen = [control.select(sites) for control in controls]
        except BaseException:
            self._leave()
            raise
        try:
            for denoiser in self._denoisers:
                self._enter(denoiser, chosen)
        except BaseException:
            for denoiser in self._denoisers:
                if denoiser.sessions and denoiser.sessions[-1][0] is self:
                    denoiser.sessions.pop()
                    denoiser.set_entries([e for _, mine in denoiser.sessions for e in mine])
            self._leave()
            raise

    def _enter(self, denoiser: Denoiser, chosen: list[dict[Site, tuple[int, ...]]]) -> None:
        """Put the controls in force on one denoiser."""
        own = set(denoiser.sites)
        mine = []
        for number, heads in enumerate(chosen):
            control = self.controls[number]
            entry = Entry(
                control,
                {site: which for site, which in heads.items() if site in own},
                control.spares(denoiser.sites),
            )
            if entry.heads:
                mine.append(entry)
                self._entries[number].append(entry)
        denoiser.sessions.append((self, mine))
        denoiser.set_entries([entry for _, entries in denoiser.sessions for entry in entries])

    def _join(self, model: nn.Module, component: str) -> Denoiser:
        denoiser = model.__dict__.get("_attn_control")
        if denoiser is None:
            denoiser = Denoiser(model, component)
            denoiser.install()
            self._installed.append(denoiser)
        return denoiser

    def _leave(self) -> None:
        for denoiser in reversed(self._installed):
            denoiser.restore()
        self._installed.clear()

    @property
    def sites(self) -> list[Site]:
        """Every attention site of the attached model(s), in execution order."""
        return [site for denoiser in self._denoisers for site in denoiser.sites]

    @property
    def step(self) -> Step | None:
        """The last Step that a denoiser call of this session was at."""
        # A ControlNet's step runs ahead of its denoiser's.
        mine = [one for one in self._denoisers if not one.beside] or self._denoisers
        steps = [denoiser.step for denoiser in mine if denoiser.step is not None]
        return max(steps, key=lambda step: (step.run_id, step.index or 0), default=None)

    def preview(
        self,
        steps: int,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        grid: tuple[int, int, int] | None = None,
        text_tokens: int = 0,
    ) -> Preview:
        """What a run of so many steps would do, before anything runs. ``print`` it.

        The density of sparse controls depends on the size: give it in pixels, or in tokens. Without
        either, that of the last run of this session is taken.

        Args:
            steps: of the scheduler.
            height, width, num_frames: in pixels and frames, as the pipeline gets them.
            grid: instead, (frames, height, width) in tokens of the denoiser.
            text_tokens: tokens beside the picture in one sequence with it; of a language model all
                keys of a call.

        Raises:
            AttnControlError: a window holds none of the steps; a size that cannot be read.
        """
        scheduler = getattr(self.pipe, "scheduler", None)
        first = self._denoisers[0]
        ledgers = [e.ledger for mine in self._entries.values() for e in mine if e.ledger]
        place = next((ledger.place for ledger in ledgers if ledger.place is not None), None)
        if first.family.language:
            if grid is not None or (height, width, num_frames) != (None, None, None):
                raise AttnControlError(
                    f"preview: {first.family.name} is a language model, whose texts have no height,"
                    " width or frames; expected text_tokens="
                )
            if text_tokens:
                place = Line((("text", text_tokens),), 0, text_tokens)
        elif grid is not None:
            place = Place(grid, 0, text_tokens)
        elif (height, width, num_frames) != (None, None, None):
            found = place_of(self.pipe, unwrap(first.model), height, width, num_frames)
            place = Place(found.shape, 0, text_tokens)
        counts = [
            (
                sum(len(e.heads) + len(e.spared) for e in self._entries[number]),
                sum(len(e.spared) for e in self._entries[number]),
            )
            for number in range(len(self.controls))
        ]
        return foresee(self.controls, scheduler, first.family, steps, place=place, sites=counts)

    def report(self) -> Report:
        """What each control touched, at which steps, at what cost. At any time."""
        records, notes = [], []
        for number, control in enumerate(self.controls):
            record = ControlRecord(str(control), control.idle, reason=self._why_not(number))
            watches = []
            for entry in self._entries[number]:
                done = entry.evidence()
                watches.append(entry.watch)
                for site, heads in entry.heads.items():
                    count = done.calls[site]
                    record.calls += count
                    record.sites[f"{site.model}.{site.name}"] = {
                        "label": site.label,
                        "heads": list(heads),
                        "calls": count,
                    }
                for kept, seen in ((record.steps, done.steps), (record.skipped, done.skipped)):
                    for run, indices in seen.items():
                        kept.setdefault(run, []).extend(indices)
            record.read(self._sparsity(number))
            if control.guidance_scale is not None:
                record.extra = _total(watches)
            records.append(record)
        for denoiser in self._denoisers:
            notes += denoiser.interception.notes
        if any(control.guidance_scale is not None for control in self.controls):
            notes += bent_by(self.pipe)
        plain = _total([denoiser.plain for denoiser in self._denoisers if not denoiser.beside])
        guided = _total([denoiser.guided for denoiser in self._denoisers])
        held = sum(denoiser.phases.records.memory.peak for denoiser in self._denoisers)
        return Report(records, plain, guided, notes, held)

    def sparsity(self, run: int | None = None) -> list[Summary | None]:
        """What the calls of each control came to, None of those that are not sparse.

        run: ``step.run_id`` of the one run to look at; None: all of this session.
        """
        return [self._sparsity(number, run) for number in range(len(self.controls))]

    def _sparsity(self, number: int, run: int | None = None) -> Summary | None:
        ledgers = [e.ledger for e in self._entries[number] if e.ledger is not None]
        return summary(ledgers, run)

    def _why_not(self, number: int) -> str | None:
        """Why a control has not fired, or None if it has or need not."""
        control, entries = self.controls[number], self._entries[number]
        if control.idle or any(entry.fired for entry in entries):
            return None
        notes = [note for entry in entries if entry.ledger for note in entry.ledger.notes]
        if notes:
            return notes[0]
        if any(entry.due for entry in entries):
            return "a step cache answered in its place at every due step"
        seen = [entry.last for entry in entries if entry.last is not None]
        if not seen:
            return "the denoiser was never called"
        index, total = seen[-1]
        if index is not None and total is not None and index + 1 < total:
            return f"the run stopped at step {index} of {total}, before window {control.window!r}"
        what = "negative pass" if control.branch == "uncond" else "call"
        return f"no {what} fell into window {control.window!r}"

    def _interrupted(self, number: int) -> bool:
        return (self._why_not(number) or "").startswith("the run stopped")

    def close(self) -> None:
        """Undo everything. Idempotent.

        Raises:
            AttnControlError: a session that was attached later, to the same model, is still open.
        """
        if self._closed:
            return
        for denoiser in self._denoisers:
            if denoiser.sessions[-1][0] is not self:
                raise AttnControlError("attach: close the session that was attached last first")
        self._closed = True
        for denoiser in self._denoisers:
            denoiser.sessions.pop()
            denoiser.set_entries([entry for _, entries in denoiser.sessions for entry in entries])
            if not denoiser.sessions:
                denoiser.restore()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        silent = [
            f"{control}: {self._why_not(number)}"
            for number, control in enumerate(self.controls)
            if self._why_not(number) and not self._interrupted(number)
        ]
        self.close()
        if kind is not None or not silent:
            return
        message = "attach: never acted: " + "; ".join(silent)
        if self.strict:
            raise AttnControlError(message)
        warnings.warn(message, stacklevel=2)


def _total(watches: list[Stopwatch]) -> dict[str, float]:
    parts = [usage(watch) for watch in watches]
    return {
        "calls": sum(part["calls"] for part in parts),
        "seconds": sum(part["seconds"] for part in parts),
        "peak_bytes": max((part["peak_bytes"] for part in parts), default=0),
    }
