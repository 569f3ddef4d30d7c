"""A method on the page, as data: its fields, and how their values become a control, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from attn_control.errors import AttnControlError
from attn_control.processors import CONTROLS, build_control
from attn_control.render.yamlfile import dump_yaml, parse_yaml
from attn_control.select import parse_window
from attn_control.studio.settings import Refused

Form = dict[str, Any]  # "SoftPAG.scale" -> what the page's field holds
ControlOptions = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Field:
    """One option of a control.

    kind: "number", "whole", "choice", "switch", "text"; "share" is a number beside which whole
        ones are counts, so that 1 is not 1.0; "heads" and "layers" are selectors, to be clicked in
        a grid; "window" takes two fields, from and to. `option` may be one inside another,
        "policy.first". `start` is what the page opens with, where that is not the control's own
        default; `absent` is a value that stands for leaving the option out.
    """

    option: str
    label: str
    kind: str = "number"
    start: Any = None
    low: float = 0.0
    high: float = 1.0
    step: float = 0.05
    choices: tuple[str, ...] = ()
    info: str = ""
    absent: Any = None


WINDOW = Field("window", "window", "window", "0-1")


@dataclass(frozen=True)
class Method:
    """One section of a tab. `about` is two sentences; `paper` is their source's address."""

    control: str
    title: str
    about: str
    paper: str
    paper_name: str
    fields: tuple[Field, ...]

    def keys(self) -> list[str]:
        """The form's keys of this section, in the order of the page."""
        names = ["on"]
        for field in self.fields:
            names += ["from", "to"] if field.kind == "window" else [field.option]
        return [f"{self.control}.{name}" for name in [*names, "more"]]

    def start(self) -> Form:
        """What the section opens with: off."""
        form: Form = {f"{self.control}.on": False, f"{self.control}.more": ""}
        for field in self.fields:
            value = field.start if field.start is not None else _default(self.control, field.option)
            form.update(self._shown(field, value))
        return form

    def options(self, form: Mapping[str, Any], longest: int) -> dict[str, Any] | None:
        """The control's options, those at its own defaults left out; None while it is off.

        Raises:
            Refused: a value that is not of the field's kind; text that is too long.
        """
        if form.get(f"{self.control}.on") is not True:
            return None
        found: dict[str, Any] = {}
        for field in self.fields:
            value = self._read(field, form, longest)
            left_out = field.absent is not None and value == field.absent
            if not left_out and value != _default(self.control, field.option):
                found[field.option] = value
        return _nested({**found, **_flat(self._more(form, longest))})

    def _read(self, field: Field, form: Mapping[str, Any], longest: int) -> Any:
        if field.kind == "window":
            first, last = (
                self._number(form.get(f"{self.control}.{end}"), f"window {end}")
                for end in ("from", "to")
            )
            return f"{first:g}-{last:g}"
        value = form.get(f"{self.control}.{field.option}")
        if field.kind in ("number", "share"):
            return float(self._number(value, field.label))
        if field.kind == "whole":
            number = self._number(value, field.label)
            if number != int(number):
                self._refuse(f"{field.label} must be a whole number, got {number:g}")
            return int(number)
        if field.kind == "switch":
            return value is True
        if field.kind == "choice" and value not in field.choices:
            self._refuse(f"{field.label} must be one of {', '.join(field.choices)}, got {value!r}")
        if not isinstance(value, str):
            self._refuse(f"{field.label} must be text, got {type(value).__name__}")
        value = " ".join(value.split())
        if len(value) > longest:
            self._refuse(f"{field.label} has {len(value)} characters, at most {longest} are taken")
        if field.kind in ("heads", "layers") and not value:
            what = "head" if field.kind == "heads" else "layer"
            self._refuse(f"no {what} is chosen: click one in the grid, or write one, such as L3")
        return value

    def _number(self, value: Any, label: str) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value):
            self._refuse(f"{label} must be a number, got {value!r:.60}")
        return float(value)

    def _more(self, form: Mapping[str, Any], longest: int) -> dict[str, Any]:
        text = form.get(f"{self.control}.more") or ""
        if not isinstance(text, str) or len(text) > longest:
            self._refuse(f"'more options' takes at most {longest} characters of text")
        text = text.strip()
        if not text:
            return {}
        try:
            data = parse_yaml(text if text[0] == "{" else f"{{{text}}}", "more options").data
        except AttnControlError as error:
            raise Refused(self.control, str(error)) from None
        if not isinstance(data, dict):
            self._refuse("'more options' are written as {parallel: 0, limit: 0.3}")
        return data

    def fill(self, options: Mapping[str, Any]) -> Form:
        """The form of a control with these options: what has no field goes to 'more options'."""
        form = {**self.start(), f"{self.control}.on": True}
        rest = _flat(options)
        for field in self.fields:
            value = rest.pop(field.option, _default(self.control, field.option))
            if value is None and field.absent is not None:
                value = field.absent
            if self._fits(field, value):
                form.update(self._shown(field, value))
            else:
                rest[field.option] = value
        form[f"{self.control}.more"] = (
            dump_yaml(_nested(rest), one_line=True).strip() if rest else ""
        )
        return form

    def _fits(self, field: Field, value: Any) -> bool:
        if field.kind == "switch":
            return isinstance(value, bool)
        if field.kind == "share" and type(value) is not float:
            return False
        if field.kind in ("number", "whole", "share"):
            plain = isinstance(value, (int, float)) and not isinstance(value, bool)
            return plain and field.low <= value <= field.high
        if field.kind == "choice":
            return value in field.choices
        if field.kind == "window":
            try:
                return parse_window(value).kind == "progress"
            except AttnControlError:
                return False
        return isinstance(value, str)

    def _shown(self, field: Field, value: Any) -> Form:
        if field.kind == "window":
            window = parse_window(value)
            ends = {"from": window.first, "to": window.last}
            return {f"{self.control}.{end}": number for end, number in ends.items()}
        return {f"{self.control}.{field.option}": "" if value is None else value}

    def _refuse(self, sentence: str) -> None:
        raise Refused(self.control, sentence)


def controls_of(
    form: Mapping[str, Any], methods: Iterable[Method], longest: int
) -> tuple[ControlOptions, ...]:
    """The controls that are on, in the page's order, each built once so that its values are right.

    Raises:
        Refused: the first section that is wrong, with the control's own sentence.
    """
    found = []
    for method in methods:
        options = method.options(form, longest)
        if options is None:
            continue
        try:
            build_control(method.control, options)
        except AttnControlError as error:
            raise Refused(method.control, str(error)) from None
        found.append((method.control, options))
    return tuple(found)


def form_of(
    controls: Iterable[ControlOptions], methods: Iterable[Method]
) -> tuple[Form, list[ControlOptions]]:
    """The form of these controls, and those of them that the page has no section for (left)."""
    form: Form = {}
    by_name = {}
    for method in methods:
        by_name[method.control] = method
        form.update(method.start())
    used, left = set(), []
    for name, options in controls:
        if name in by_name and name not in used:
            form.update(by_name[name].fill(options))
            used.add(name)
        else:
            left.append((name, options))
    return form, left


def _default(control: str, option: str) -> Any:
    """The control's own default; None where it has none, and so is always written."""
    name, _, inner = option.partition(".")
    for each in fields(CONTROLS[control]):
        if each.name == name:
            value = None if each.default is MISSING else each.default
            return getattr(value, inner) if inner else value
    raise KeyError(f"{control} has no option {option!r}")


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """`{"policy": {"first": 2}}` as `{"policy.first": 2}`."""
    found = {}
    for name, value in options.items():
        if name == "policy" and isinstance(value, Mapping):
            found |= {f"policy.{inner}": each for inner, each in value.items()}
        else:
            found[name] = value
    return found


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """The other way."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        outer, dot, inner = str(name).partition(".")
        if dot:
            found.setdefault(outer, {})[inner] = value
        else:
            found[name] = value
    return found
