"""Named sets of controls: what papers and public code set, for which model, and who verified it.

The data is ``presets.yaml``, beside this file; a new preset is an entry there.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from attn_control.call import Site
from attn_control.errors import AttnControlError
from attn_control.processors import Control, build_control

_FILE = Path(__file__).with_name("presets.yaml")


@dataclass(frozen=True)
class Preset:
    """One entry of ``presets.yaml``.

    Attributes:
        name, title: its short name, and what it is in one line.
        model: the checkpoint that it was published for.
        family: name of that model's row in ``families``.
        layers, heads, slots: of that whole model: number of layers, every number of heads that a
            site of it has, every slot. Layers and heads are numbered within these.
        options: control class and its options, one a control.
        settings: sampler settings of the source, as text to go by: a preset never applies them.
        source: paper and public code that the figures are from.
        verified_on: where we ran it; "nothing: ..." where we did not.
        note: where our control differs from what the source runs.
    """

    name: str
    title: str
    model: str
    family: str
    layers: int
    heads: tuple[int, ...]
    slots: tuple[str, ...]
    options: tuple[tuple[str, dict[str, Any]], ...] = field(repr=False)
    source: str = field(repr=False)
    verified_on: str = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    note: str = field(default="", repr=False)

    @property
    def verified(self) -> bool:
        return not self.verified_on.startswith("nothing")

    def controls(self) -> list[Control]:
        """Fresh controls, which refuse any other model when they are attached."""
        made = []
        for name, options in self.options:
            control = build_control(name, options)
            object.__setattr__(control, "made_for", self)  # not an option: nothing to set or print
            made.append(control)
        return made

    def check(self, control: Control, family: str, sites: Sequence[Site]) -> None:
        """Refuse a model that the preset is not for.

        Args:
            control: one of its controls, named in the error.
            family: name of the model's row in ``families``.
            sites: all attention sites of one denoiser.

        Raises:
            AttnControlError: another family, or another size of the same one.
        """
        layers = len({site.layer for site in sites})
        heads = tuple(sorted({site.heads for site in sites}))
        slots = tuple(sorted({site.slot for site in sites}))
        got = _shape(family, layers, heads, slots)
        wanted = _shape(self.family, self.layers, self.heads, self.slots)
        if got != wanted:
            raise AttnControlError(
                f"preset {self.name!r}: {control} is for {self.model} ({wanted}), but this model is"
                f" {got}; for a model of your own write the control out, with its layers and heads"
            )


def preset(name: str) -> list[Control]:
    """The controls of a preset, for ``attach(pipe, *preset(name))``.

    They refuse another model than the preset's; a control that you change with
    ``dataclasses.replace`` is yours, and is no longer held to it.

    Raises:
        AttnControlError: no preset of that name.

    Example:
        >>> preset("sd35-medium-slg")
        [SkipLayers(heads='L7-9', window='0.01-0.2')]
    """
    return find_preset(name).controls()


def presets() -> list[Preset]:
    """Every preset, in the order of the file."""
    return list(_presets().values())


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises AttnControlError if there is none, with the nearest one."""
    known = _presets()
    if name not in known:
        close = difflib.get_close_matches(str(name), list(known), n=1)
        hint = f"; did you mean {close[0]!r}" if close else ""
        raise AttnControlError(f"no preset {name!r}{hint}; there are: {', '.join(known)}")
    return known[name]


def describe(each: Preset) -> str:
    """A preset in full, as lines of text; its controls as a job writes them."""
    import yaml

    lines = [f"{each.name}: {each.title}", f"model        {each.model}"]
    lines.append(f"family       {_shape(each.family, each.layers, each.heads, each.slots)}")
    for cls, options in each.options:
        flow = yaml.safe_dump(options, default_flow_style=True, sort_keys=False, width=1000)
        lines.append(f"control      {cls}: {flow.strip()}")
    if each.settings:
        settings = ", ".join(f"{key} {value}" for key, value in each.settings.items())
        lines.append(f"with         {settings} (of the source; not applied)")
    lines += [f"source       {each.source}", f"verified on  {each.verified_on}"]
    return "\n".join([*lines, *([f"note         {each.note}"] if each.note else [])])


def _shape(family: str, layers: int, heads: tuple[int, ...], slots: tuple[str, ...]) -> str:
    return (
        f"{family}: {layers} layers of {' or '.join(map(str, sorted(heads)))} heads,"
        f" {' and '.join(sorted(slots))} attention"
    )


@lru_cache(1)
def _presets() -> dict[str, Preset]:
    import yaml

    entries = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return {name: _read(name, entry) for name, entry in entries.items()}


def _read(name: str, entry: dict[str, Any]) -> Preset:
    controls = tuple(pair for control in entry.pop("controls") for pair in control.items())
    heads, slots = tuple(entry.pop("heads")), tuple(entry.pop("slots"))
    return Preset(name=name, options=controls, heads=heads, slots=slots, **entry)
