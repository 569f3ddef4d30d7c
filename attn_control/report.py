"""What a session did: measured inside the graph, counted when asked."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_control.ledger import Summary


class Stopwatch:
    """Seconds and peak memory around forwards; on CUDA through events, so that nothing waits."""

    def __init__(self) -> None:
        self.calls = 0
        self.peak_bytes = 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start: Any = None

    def start(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()
        else:
            self._start = time.perf_counter()

    def stop(self, device: torch.device) -> None:
        self.calls += 1
        if device.type == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((self._start, end))
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(device))
        else:
            self._seconds += time.perf_counter() - self._start
            self.peak_bytes = max(self.peak_bytes, peak_memory())

    @property
    def seconds(self) -> float:
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(a.elapsed_time(b) for a, b in self._events) / 1000
            self._events.clear()
        return self._seconds


def peak_memory() -> int:
    """The highest resident memory of this process since it began, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark if sys.platform == "darwin" else mark * 1024  # Linux counts kilobytes


@dataclass
class ControlRecord:
    """One control: what it touched, when, and what its extra forwards cost.

    ``steps`` and ``skipped`` are by run: where it acted, and where a step cache answered in place
    of some or all of its attention, so that there was nothing to act on.

    Of sparse controls, over all steps, layers and branches that they select, dense ones too:
    ``density`` is the share of query-key pairs that outputs were read from, ``computed`` the work
    done in dense attentions (above the density where blocks are read in vain, and where a refresh
    runs a mask too), ``layers`` the density by layer and step, ``outcomes`` how many calls came to
    what.
    """

    name: str
    idle: str | None
    density: float = 1.0
    computed: float = 1.0
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[int, list[int]] = field(default_factory=dict)
    skipped: dict[int, list[int]] = field(default_factory=dict)
    calls: int = 0
    extra: dict[str, float] = field(default_factory=dict)
    reason: str | None = None

    @property
    def fired(self) -> bool:
        return self.calls > 0

    def when(self) -> str:
        """Its steps, run by run, e.g. ``0-3 (1, 3 cached)``."""
        runs = []
        for run in dict.fromkeys([*self.steps, *self.skipped]):
            cached = ranges(self.skipped.get(run, []))
            acted = ranges(self.steps.get(run, [])) or "none"
            runs.append(f"{acted} ({cached} cached)" if cached else acted)
        return "; ".join(runs) or "-"

    def read(self, found: Summary | None) -> None:
        """Take in what a sparse control's ledger says."""
        if found is None:
            return
        told = found.to_dict()
        self.density, self.computed = found.density, found.computed
        self.layers, self.outcomes, self.notes = told["by_layer"], found.outcomes, found.notes

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "fired": self.fired}

    def lines(self) -> list[str]:
        """Density by layer and step, layers and steps that are alike taken together."""
        if not self.layers:
            return []
        alike: dict[tuple[tuple[str, float], ...], list[str]] = {}
        for layer, steps in self.layers.items():
            alike.setdefault(tuple(steps.items()), []).append(layer)
        calls = ", ".join(f"{count} {name}" for name, count in self.outcomes.items())
        found = [
            f"{self.name}: density {self.density:.3f}, computed {self.computed:.3f} of dense;"
            f" {calls}"
        ]
        for steps, layers in alike.items():
            by_density: dict[str, list[int]] = {}
            for step, density in steps:
                by_density.setdefault(f"{density:.3f}", []).append(int(step))
            told = "; ".join(f"{d} at {ranges(at)}" for d, at in by_density.items())
            found.append(f"  {_together(layers)}: {told}")
        return [*found, *(f"  {note}" for note in self.notes)]


@dataclass
class Report:
    """All of it. ``str(report)`` is a table; ``to_dict()`` is ready for JSON.

    ``plain`` and ``guided`` hold calls, seconds and peak bytes of the forwards without and with
    perturbation. ``kept_bytes``: the most that controls kept from step to step at once.
    """

    controls: list[ControlRecord]
    plain: dict[str, float]
    guided: dict[str, float]
    notes: list[str]
    kept_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "controls": [record.to_dict() for record in self.controls],
            "plain": self.plain,
            "guided": self.guided,
            "notes": self.notes,
            "kept_bytes": self.kept_bytes,
        }

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        out = io.StringIO()
        console = Console(file=out, width=110, color_system=None)
        table = Table("control", "fired at", "steps", "calls", "density", "seconds")
        for record in self.controls:
            state = f"idle: {record.idle}" if record.idle else record.reason or "never fired"
            table.add_row(
                record.name,
                ", ".join(site["label"] for site in record.sites.values() if site["calls"])
                or state,
                record.when(),
                str(record.calls),
                f"{record.density:.3f}",
                f"{record.extra.get('seconds', 0.0):.2f}",
            )
        console.print(table)
        for name, use in (("plain forwards", self.plain), ("extra forwards", self.guided)):
            console.print(
                f"{name}: {use['calls']} calls, {use['seconds']:.2f} s, peak"
                f" {use['peak_bytes'] / 2**20:.0f} MiB"
            )
        for record in self.controls:
            for line in record.lines():
                console.print(line, soft_wrap=True, markup=False)
        if self.kept_bytes:
            console.print(f"kept from step to step: at most {self.kept_bytes / 2**20:.1f} MiB")
        for note in self.notes:
            console.print(f"note: {note}")
        return out.getvalue().rstrip()


def usage(watch: Stopwatch) -> dict[str, float]:
    """A stopwatch as plain numbers."""
    return {"calls": watch.calls, "seconds": watch.seconds, "peak_bytes": watch.peak_bytes}


def _together(layers: list[str]) -> str:
    """``[L1.self, L2.self, L5.self]`` as ``L1-2.self, L5.self``."""
    by_kind: dict[tuple[str, str], list[int]] = {}
    for layer in layers:
        model, _, name = layer.rpartition(":")
        number, _, slot = name.removeprefix("L").partition(".")
        by_kind.setdefault((f"{model}:" if model else "", slot), []).append(int(number))
    return ", ".join(
        f"{model}L{part}.{slot}"
        for (model, slot), numbers in by_kind.items()
        for part in ranges(numbers).split(", ")
    )


def ranges(steps: list[int]) -> str:
    """Numbers taken together: ``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for step in sorted(set(steps)):
        if runs and runs[-1][1] == step - 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)
