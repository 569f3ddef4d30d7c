"""The grammar for heads and for windows of steps: parsed once, immutable, with errors that point.

heads   := item ("," item)*          item := [component ":"] place
place   := "L" range ["." slot] ["H" range]  |  "all"
range   := number | number "-" number
window  := a "-" b                   progress in [0, 1], half-open, 1 inclusive
         | "sigma" high "-" low      noise levels, both inclusive
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from attn_control.call import SLOTS, Site, Step
from attn_control.errors import AttnControlError

_NUMBER = re.compile(r"\d+")
_SLOT = re.compile(r"[A-Za-z]\w*")
_COMPONENT = re.compile(r"([A-Za-z]\w*):")
_FLOAT = r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)"
_FORM = "expected '0-0.25' (progress from 0 to 1) or 'sigma 14-2' (from high to low)"
_WINDOW = re.compile(rf"\s*(sigma\s+)?{_FLOAT}\s*-\s*{_FLOAT}\s*")


def _point(text: str, at: int, expected: str) -> NoReturn:
    found = repr(text[at]) if at < len(text) else "the end"
    raise AttnControlError(
        f"selector {text!r}: expected {expected} at character {at + 1}, found {found}\n  {text}\n "
        f" {' ' * at}^"
    )


@dataclass(frozen=True)
class Term:
    """One item: a closed range of layers, perhaps a slot, perhaps a closed range of heads; of one
    component of the pipeline, or of every denoiser.
    """

    text: str
    layers: tuple[int, int] | None
    slot: str | None
    heads: tuple[int, int] | None
    model: str | None = None

    def means(self, site: Site) -> bool:
        """Whether the site's model is meant."""
        return not site.beside if self.model is None else site.model == self.model

    def takes(self, site: Site, slots: tuple[str, ...]) -> bool:
        if not self.means(site):
            return False
        if self.layers and not self.layers[0] <= site.layer <= self.layers[1]:
            return False
        return site.slot == self.slot if self.slot else site.slot in slots


@dataclass(frozen=True)
class Selector:
    """A parsed set of heads. ``str(selector)`` is the text it came from.

    >>> parse_heads("L7H3, L9H11-14").terms[1].heads
    (11, 14)
    """

    text: str
    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return self.text

    def heads_of(self, site: Site, slots: tuple[str, ...] = ("joint", "self")) -> tuple[int, ...]:
        """The heads of one site that the selector holds, none if it does not name the site."""
        held: set[int] = set()
        for term in self.terms:
            if term.takes(site, slots):
                first, last = term.heads or (0, site.heads - 1)
                held.update(range(first, min(last, site.heads - 1) + 1))
        return tuple(sorted(held))

    def resolve(
        self,
        sites: Iterable[Site],
        *,
        slots: tuple[str, ...] = ("joint", "self"),
        allowed: tuple[str, ...] | None = None,
        who: str = "selector",
    ) -> dict[Site, tuple[int, ...]]:
        """Map each selected site to its sorted head numbers.

        Args:
            sites: every site of the model(s).
            slots: where an item without a slot applies.
            allowed: the slots that an item may name; the same as ``slots`` unless given.
            who: named in errors.

        Raises:
            AttnControlError: an item that matches no site, a head that the site does not have, or a
                slot that the control cannot act on.
        """
        sites = list(sites)
        allowed = allowed or slots
        chosen: dict[Site, set[int]] = {}
        for term in self.terms:
            if term.slot and term.slot not in allowed:
                raise AttnControlError(
                    f"{who}: {term.text!r} names {term.slot} attention, which this control cannot"
                    " act on;"
                    f" it acts on: {', '.join(allowed)}"
                )
            matched = [site for site in sites if term.takes(site, slots)]
            models = dict.fromkeys(site.model for site in sites)
            if term.model is not None and term.model not in models:
                raise AttnControlError(
                    f"{who}: {term.text!r} names the component {term.model!r}; there is:"
                    f" {', '.join(models)}"
                )
            there = [site for site in sites if term.means(site)]
            if not matched:
                raise AttnControlError(
                    f"{who}: {term.text!r} matches no attention site; {_inventory(there, slots)}"
                )
            if term.layers:
                present = {site.layer for site in matched}
                missing = [n for n in range(term.layers[0], term.layers[1] + 1) if n not in present]
                if missing:
                    raise AttnControlError(
                        f"{who}: {term.text!r} asks for layer {missing[0]}, which has no such site;"
                        f" {_inventory(there, slots)}"
                    )
            for site in matched:
                first, last = term.heads or (0, site.heads - 1)
                if last >= site.heads:
                    raise AttnControlError(
                        f"{who}: {term.text!r} asks for head {last} of {site.label}, which has"
                        " heads"
                        f" 0 to {site.heads - 1}"
                    )
                chosen.setdefault(site, set()).update(range(first, last + 1))
        return {site: tuple(sorted(heads)) for site, heads in chosen.items()}


def _inventory(sites: list[Site], slots: tuple[str, ...]) -> str:
    usable = [site for site in sites if site.slot in slots]
    if not usable:
        return f"the model has no {' or '.join(slots)} attention"
    layers = sorted({site.layer for site in usable})
    kinds = ", ".join(sorted({site.slot for site in usable}))
    heads = sorted({site.heads for site in usable})
    count = str(heads[0]) if len(heads) == 1 else f"{heads[0]} to {heads[-1]}"
    return f"the model has layers L{layers[0]} to L{layers[-1]} ({kinds}) with {count} heads each"


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def take(self, token: str) -> bool:
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False

    def span(self, what: str) -> tuple[int, int]:
        start = self.at
        first = self._number(what)
        last = first
        if self.at < len(self.text) and self.text[self.at] == "-":
            self.at += 1
            last = self._number(what)
        if last < first:
            _point(self.text, start, f"a rising range of {what}s (got {first}-{last})")
        return first, last

    def _number(self, what: str) -> int:
        match = _NUMBER.match(self.text, self.at)
        if not match:
            _point(self.text, self.at, f"a {what} number")
        self.at = match.end()
        return int(match.group())


def parse_heads(text: str) -> Selector:
    """Parse a head selector such as ``"L7H3, L9H11-14"``, ``"L2-5, L9"``, ``"L3.cross"`` or
    ``"all"``; ``"transformer_2:L3"`` is of one component alone, and only so is a ControlNet taken.

    Raises:
        AttnControlError: points at the first character that does not fit the grammar.
    """
    if not isinstance(text, str):
        raise AttnControlError(f"heads: expected text such as 'L7H3, L9H11-14', got {text!r}")
    return _parse_heads(text)


@lru_cache(256)
def _parse_heads(text: str) -> Selector:
    scan, terms = _Scanner(text), []
    while True:
        scan.skip()
        terms.append(_item(scan))
        scan.skip()
        if scan.at == len(text):
            return Selector(text, tuple(terms))
        if not scan.take(","):
            _point(text, scan.at, "',' or the end")


def _item(scan: _Scanner) -> Term:
    start = scan.at
    layers = slot = heads = model = None
    component = _COMPONENT.match(scan.text, scan.at)
    if component:
        model, scan.at = component.group(1), component.end()
    if scan.take("all"):
        return Term(scan.text[start : scan.at], None, None, None, model)
    if not scan.take("L"):
        _point(scan.text, scan.at, "a layer such as L3 (or 'all')")
    layers = scan.span("layer")
    if scan.take("."):
        match = _SLOT.match(scan.text, scan.at)
        word = match.group() if match else ""
        # "L3.crossH2": the slot ends where the heads begin.
        for name in sorted(SLOTS, key=len, reverse=True):
            if word.startswith(name) and (word == name or word[len(name)] == "H"):
                slot = name
                scan.at += len(name)
                break
        else:
            _point(scan.text, scan.at, f"one of {', '.join(SLOTS)}")
    if scan.take("H"):
        heads = scan.span("head")
    return Term(scan.text[start : scan.at], layers, slot, heads, model)


@dataclass(frozen=True)
class Window:
    """When a control acts: "progress" in [first, last), 1 inclusive, "sigma" in [last, first]."""

    text: str
    kind: str
    first: float
    last: float

    def __str__(self) -> str:
        return self.text

    @property
    def always(self) -> bool:
        return self.kind == "progress" and self.first == 0 and self.last == 1

    def holds(self, step: Step, who: str = "window") -> bool:
        """Whether the step lies in the window.

        Raises:
            AttnControlError: the window is on a value that this sampler does not have.
        """
        if self.always:
            return True
        value = step.progress if self.kind == "progress" else step.sigma
        if value is None:
            raise AttnControlError(
                f"{who}: window {self.text!r} needs the sampler's {self.kind}, which is not known"
                " here;"
                " attach to the whole pipeline, or use window '0-1'"
            )
        return self.contains(value)

    def contains(self, value: float) -> bool:
        if self.kind == "sigma":
            return self.last <= value <= self.first
        return self.first <= value and (value < self.last or self.last == 1)


def parse_window(text: str) -> Window:
    """Parse ``"0-0.25"`` (progress) or ``"sigma 14-2"`` (noise levels, high to low).

    Raises:
        AttnControlError: not of that form, out of [0, 1], empty, or falling the wrong way.
    """
    if not isinstance(text, str):
        raise AttnControlError(f"window: {_FORM}, got {text!r}")
    return _parse_window(text)


@lru_cache(256)
def _parse_window(text: str) -> Window:
    match = _WINDOW.fullmatch(text)
    if not match:
        raise AttnControlError(f"window {text!r}: {_FORM}")
    first, last = float(match.group(2)), float(match.group(3))
    if not (math.isfinite(first) and math.isfinite(last)):
        raise AttnControlError(f"window {text!r}: the bounds must be finite; {_FORM}")
    if match.group(1):
        if first < last:
            raise AttnControlError(f"window {text!r}: sigma falls during sampling; {_FORM}")
        return Window(text, "sigma", first, last)
    if not 0 <= first < last <= 1:
        raise AttnControlError(f"window {text!r}: needs 0 <= first < last <= 1; {_FORM}")
    return Window(text, "progress", first, last)
