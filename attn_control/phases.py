"""Compiling plans: which control contributes what to which site, once per phase and shape."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_control.bypass import Bypass, find_bypasses, skip_plan
from attn_control.call import Layout, Site, Softmax, Step, rows_in, tensor_in
from attn_control.entry import Entry
from attn_control.errors import AttnControlError
from attn_control.families import Family
from attn_control.intercept import Interception
from attn_control.interface import InterfaceInterception
from attn_control.parallel import SpreadPlan, refuse_spread_series, spread
from attn_control.plan import Plan, PlanBuilder, PlanSeries, Records
from attn_control.processors.pairs import check_pairs

MAX_STRUCTURES = 8
"""Plan structures kept at once: older phases and shapes are compiled again when they return."""

Rows = tuple[int, int]


@dataclass(frozen=True)
class Pass:
    """One forward of the denoiser.

    Attributes:
        arguments: by name, as the model gets them, but for rows appended at the end.
        acting: the controls that are part of it.
        cond, uncond: its conditional and its negative rows, if any; perturbed: the rows that guides
            may change, None for all.
        appended: cond rows that run once more behind all others, with other text or perturbed.
        riders: guides whose perturbed rows are among those: their number and rows.
        branch: of every row, appended ones left out; alias: added to every name, in an extra
            forward that holds all rows.
        told: what a language model's layout is told beside its arguments.
    """

    arguments: dict[str, Any]
    acting: list[Entry]
    cond: Rows | None
    perturbed: Rows | None = None
    appended: int = 0
    uncond: Rows | None = None
    riders: tuple[tuple[int, Rows], ...] = ()
    branch: tuple[str, ...] = ()
    alias: str = ""
    told: tuple[tuple[str, Hashable], ...] = ()

    @property
    def branches(self) -> tuple[str, ...]:
        """Of every row, appended ones too: what is kept of one must not meet another."""
        more = ["appended"] * self.appended
        for number, (first, last) in self.riders:
            start = first - len(self.branch)
            more[start : start + last - first] = [f"perturbed:{number}"] * (last - first)
        names = (*self.branch, *more)
        return tuple(f"{name}, {self.alias}" for name in names) if self.alias else names

    def rows_of(self, entry: Entry) -> Rows | None:
        """The rows that a control may change, None for all."""
        control, ridden = entry.control, dict(self.riders)
        if entry.number in ridden:
            return ridden[entry.number]
        if control.branch is not None:
            return self.cond if control.branch == "cond" else self.uncond
        return self.perturbed if control.guidance_scale is not None else None


def _shape(value: Any) -> Any:
    """Shapes of a tensor, or of all in a list."""
    if isinstance(value, list):
        return tuple(map(_shape, value))
    return tuple(value.shape) if isinstance(value, Tensor) else None


class Phases:
    """The plans of one model: looked up by phase and shape, put on the ports before each
    forward.
    """

    def __init__(
        self, model: Any, family: Family, interception: Interception | InterfaceInterception
    ) -> None:
        self.model, self.family, self.interception = model, family, interception
        self.entries: list[Entry] = []
        self._bypasses: dict[tuple[Site, str], list[Bypass]] = {}
        self._plans: dict[Any, tuple[dict[Any, Any], list[Any]]] = {}
        self.records = Records()

    def set_entries(self, entries: list[Entry]) -> None:
        """The controls in force changed: forget what was compiled, swap the modules to be
        skipped.
        """
        check_pairs([(entry.control, entry.heads) for entry in entries])
        for bypass in self._all_bypasses():
            bypass.restore()
        self._bypasses = {}
        self.entries = entries
        self.forget()
        for port in self.interception.ports:
            port.fired = None
        self.records.ledgers.clear()
        for number, entry in enumerate(entries):
            entry.number = number
            if entry.ledger is not None:
                self.records.ledgers[number] = entry.ledger
            if self.family.layout is None and "layout" in entry.control.needs:
                raise self._no_layout(entry.control, next(iter(entry.heads)))
            kind = entry.control.bypass
            for site in entry.heads if kind else ():
                assert kind is not None
                if (site, kind) not in self._bypasses:
                    held = {id(bypass.module): bypass for bypass in self._all_bypasses()}
                    found = find_bypasses(self.model, self.family, site, kind)
                    for bypass in found:
                        if id(bypass.module) not in held:
                            bypass.install()
                    found = [held.get(id(bypass.module), bypass) for bypass in found]
                    self._bypasses[site, kind] = found

    def forget(self) -> None:
        """Drop compiled plans, and what controls keep from call to call."""
        self._plans.clear()
        self.records.memory.clear()

    def apply(self, plans: dict[Any, Any], step: Step | None = None) -> None:
        """Put plans on their ports, counters at zero; all other ports pass through."""
        for port in (*self.interception.ports, *self._all_bypasses()):
            port.plan = plans.get(port)
            port.entered = False
            if port.plan is not None and port.fired is not None:
                port.fired.zero_()
            if step is not None and port.plan is not None:
                port.plan.prepare(step)
            if isinstance(port, Bypass) and port.plan is not None:
                port.refuse_cached()

    @contextlib.contextmanager
    def again(self, plans: dict[Any, Any], step: Step) -> Iterator[None]:
        """Plans of a forward in force once more, whatever is in force now; nothing is counted."""
        ports = list({*self.interception.ports, *self._all_bypasses(), *plans})
        before = [(port, port.plan, port.fired) for port in ports]
        with contextlib.ExitStack() as stack:
            for port in plans:
                if isinstance(port, Bypass):
                    stack.enter_context(port.again())
            for port in ports:
                port.plan, port.fired = plans.get(port), None
                if port.plan is not None:
                    port.plan.prepare(step)
            try:
                yield
            finally:
                for port, plan, fired in before:
                    port.plan, port.fired = plan, fired

    def plans(self, run: Pass) -> dict[Any, Any]:
        """The plans of a pass, by port."""
        if not run.acting:
            return {}
        sample = tensor_in(run.arguments[self.family.sample])
        shapes = tuple((name, _shape(value)) for name, value in run.arguments.items())
        numbers = tuple(entry.number for entry in run.acting)
        rows = (run.cond, run.uncond, run.perturbed, run.appended, run.riders)
        # What decides a layout by its values: tensors by identity, kept alive while they are keys.
        held = [run.arguments.get(name) for name in sorted(self.family.by_value)]
        values = tuple(id(v) if isinstance(v, Tensor) else repr(v) for v in held)
        spreading = id(getattr(self.model, "_parallel_config", None))
        place = (sample.device, sample.dtype, spreading, run.told)
        key = (numbers, rows, shapes, values, *place)
        if key not in self._plans:
            if len(self._plans) == MAX_STRUCTURES:
                self._plans.pop(next(iter(self._plans)))
            with torch.inference_mode(False):  # plans outlive the mode they are made in
                self._plans[key] = self._build(run, sample), held
        return self._plans[key][0]

    def _all_bypasses(self) -> list[Bypass]:
        found = [bypass for some in self._bypasses.values() for bypass in some]
        return list({id(bypass): bypass for bypass in found}.values())

    def _build(self, run: Pass, sample: Tensor) -> dict[Any, Any]:
        device, plans = sample.device, {}
        for port in self.interception.ports:
            selecting = [e for e in run.acting if port.site in e.heads and e.control.bypass is None]
            if not selecting:
                continue
            plan = self._plan(port.site, selecting, run, device)
            if plan is not None:
                plans[port] = plan
        plans |= self._skips(run, device)
        for port in plans:
            if port.fired is None or port.fired.device != device:
                port.fired = torch.zeros(len(self.entries), dtype=torch.int64, device=device)
        return plans

    def _own_rows(self, entry: Entry, run: Pass) -> Rows | None:
        own, control = run.rows_of(entry), entry.control
        if own is not None and self.family.folded:
            raise AttnControlError(
                f"{control}: attention of {self.family.name} has other rows than the batch, so that"
                f" {control.branch or 'cond'} rows cannot be changed alone there"
            )
        return own

    def _plan(
        self, site: Site, selecting: list[Entry], run: Pass, device: torch.device
    ) -> Plan | SpreadPlan | PlanSeries | None:
        """The plan of a site; a series where its processor makes several softmaxes a call.

        Of several, a control takes part in those that hold queries of its tokens, and has to fit
        each of them.
        """
        found = self._layout(site, run)
        total = rows_in(run.arguments[self.family.sample])
        softmaxes: tuple[Softmax, ...] = (Softmax(found),)
        if isinstance(found, tuple):
            refuse_spread_series(self.model, site)
            softmaxes = with_appended(found, run.cond, run.appended, total)
        builders = [
            PlanBuilder(
                len(self.entries),
                site,
                device,
                total + run.appended,
                records=self.records,
                part=part,
                span=softmax.rows,
            )
            for part, softmax in enumerate(softmaxes)
        ]
        for entry in selecting:
            control, own = entry.control, self._own_rows(entry, run)
            if softmaxes[0].rows is not None and (control.appends or control.by_row):
                raise AttnControlError(
                    f"{control}: at {site.label} of {self.family.name} each row of the batch has a"
                    " softmax of its own, so that rows cannot be held against each other there"
                )
            asked = [s for s in softmaxes if s.layout is not None and s.layout.span(control.asks)]
            for builder, softmax in zip(builders, softmaxes, strict=True):
                rows, layout = within(own, softmax.rows), softmax.layout
                if rows == (0, 0) or (asked and softmax not in asked):
                    continue
                if layout is not None:
                    control.check(site, layout)
                elif "layout" in control.needs:
                    raise self._no_layout(control, site)
                control.contribute(builder, entry.number, layout, entry.heads[site], rows)
        built = tuple(builder.build() for builder in builders)
        if not any(built):
            return None
        if isinstance(found, tuple):
            return PlanSeries(built)
        (plan,) = built
        assert plan is not None
        return spread(plan, self.model, found)

    def _layout(self, site: Site, run: Pass) -> Layout | tuple[Softmax, ...] | None:
        if self.family.layout is None:
            return None
        return self.family.layout(site, {**run.arguments, **dict(run.told)}, self.model)

    def _no_layout(self, control: Any, site: Site) -> AttnControlError:
        if self.family.layout is None:
            why = "the order of its tokens is not known yet"
        else:
            why = f"the rows of this batch have no common order of tokens at {site.label}"
        return AttnControlError(
            f"{control}: needs to know which tokens are which in {self.family.name}, but {why};"
            " expected a control that acts on all tokens, such as SoftPAG(..., tokens='all')"
        )

    def _skips(self, run: Pass, device: torch.device) -> dict[Any, Any]:
        plans: dict[Any, Any] = {}
        for entry in run.acting:
            control, kind = entry.control, entry.control.bypass
            if not kind:
                continue
            rows = self._own_rows(entry, run) if control.branch or run.riders else None
            if rows == (0, rows_in(run.arguments[self.family.sample])):
                rows = None  # no other rows: what is left out whole need not run
            for site in entry.heads:
                drawn = _drawn(entry, site) if getattr(control, "stochastic", None) else None
                for bypass in self._bypasses[site, kind]:
                    plans[bypass] = skip_plan(
                        control, entry.number, len(self.entries), device, rows, drawn
                    )
        return plans


def with_appended(
    softmaxes: tuple[Softmax, ...], cond: Rows | None, appended: int, total: int
) -> tuple[Softmax, ...]:
    """The softmaxes of a call with the cond rows once more behind the ``total`` others: where each
    row has its own, so do they.
    """
    if not appended or cond is None or softmaxes[0].rows is None:
        return softmaxes
    each = cond[1] - cond[0]
    more = [
        replace(softmaxes[cond[0] + n % each], rows=(total + n, total + n + 1))
        for n in range(appended)
    ]
    return (*softmaxes, *more)


def within(own: Rows | None, rows: Rows | None) -> Rows | None:
    """A control's batch rows as rows of a softmax that holds only ``rows``; (0, 0) for none."""
    if own is None or rows is None:
        return own
    first, last = max(own[0], rows[0]), min(own[1], rows[1])
    return (first - rows[0], last - rows[0]) if first < last else (0, 0)


def _drawn(entry: Entry, site: Site) -> Callable[[Step], bool]:
    return lambda step: site in entry.control.sites_at(step, entry.heads)
