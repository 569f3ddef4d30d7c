"""docs/models.md is made here, from what attaching finds on the published configs.

After a change: ``UPDATE_README=1 pytest tests/fullsize/test_models_page.py`` writes it anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
from fullsize.measure import NAMES, Seen, published, seen
from test_every_denoiser import exported, kind

from attn_control.families import FAMILIES, REFUSED, Family

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
CFG = {
    "batched": "one call, uncond first",
    "batched, cond first": "one call, cond first",
    "split": "two calls, or none",
}

INTRO = """\
# Models

<!-- made by tests/fullsize/test_models_page.py; UPDATE_README=1 pytest on it writes it anew -->

Of the {all} denoisers that diffusers {version} exports, {rows} have a row (the order of their
tokens is known), {attach} are attach-only (controls of all tokens work, those that name image or
text tokens are refused), and {refused} are refused with a reason. A class that is none of these
fails `tests/test_every_denoiser.py`.

Each checkpoint below was built from its published config, without its weights, and called at its
pipeline's default size.

- *Parameters* are all elements of its state dict.
- *Sites* are the attention modules that a selector can name, by slot; *heads* are those of the
  softmax, times their width.
- *Tokens* are the queries in order, and behind an arrow the keys where they are others; a grid is
  (frames x) height x width. Texts have the most tokens that the pipeline takes. FLUX.3, Qwen-Image
  and ERNIE-Image take them as long as the prompt: here 512, 512 and 256.
- *Text* says where it stands relative to the picture.

What a pipeline does not tell its denoiser, no layout can say: frames of reference that Wan VACE
puts before the video, and tokens of conditions that LTX-Video's condition pipeline puts there,
count as the video's.

Configs, and where each was read, are in `tests/fullsize/configs/`. A dagger: none was found, and
the class's defaults stand in.
"""


def _parameters(found: Seen) -> str:
    billions = found.elements / 1e9
    return f"{billions:.1f} B" if billions >= 1 else f"{found.elements / 1e6:.0f} M"


def _heads(found: Seen) -> str:
    spelt = []
    for heads, of_keys, width in found.heads:
        keys = "" if heads == of_keys else f" ({of_keys} of keys)"
        spelt.append(f"{heads}{keys} x {width}")
    return ", ".join(spelt)


def _sites(found: Seen) -> str:
    return ", ".join(f"{count} {slot}" for slot, count in found.sites.items())


def _tokens(found: Seen) -> str:
    """The layouts of each slot; what a cross-attention asks only once, without its queries."""
    lines = []
    for slot, layouts in found.layouts.items():
        asked = {layout.split(" -> ")[1] for layout in layouts if " -> " in layout}
        queries = list(dict.fromkeys(layout.split(" -> ")[0] for layout in layouts))
        if slot == "cross" and "self" in found.layouts:
            lines.append(f"cross -> {', '.join(asked)}")
            continue
        arrow = f" -> {', '.join(asked)}" if asked else ""
        name = f"{slot}: " if len(found.layouts) > 1 else ""
        lines.append(f"{name}{' / '.join(queries)}{arrow}")
    return "; ".join(lines)


def _text(found: Seen) -> str:
    """Where text stands relative to the picture."""
    places = []
    for layouts in found.layouts.values():
        for layout in layouts:
            queries, _, keys = layout.partition(" -> ")
            roles = [part.split()[0] for part in (keys or queries).split(", ")]
            if "text" not in roles:
                continue
            picture = [n for n, role in enumerate(roles) if role in ("image", "video")]
            if not picture:
                places.append("cross-attention")
            else:
                place = "before" if roles.index("text") < picture[0] else "behind"
                places.append(place + (", as keys" if keys else ""))
    return ", ".join(dict.fromkeys(places))


def _row(family: Family, name: str, with_layout: bool) -> str:
    one, found = published(name), seen(name)
    checkpoint = f"`{one['checkpoint']}`" if one["checkpoint"] else "†"
    cells = [family.name, f"`{family.denoiser}`", checkpoint]
    cells += [_parameters(found), _sites(found), _heads(found)]
    if with_layout:
        cells += [_tokens(found), _text(found)]
    return "| " + " | ".join([*cells, CFG[family.cfg]]) + " |"


def _head(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _page() -> Iterator[str]:
    counts = {"row": 0, "attach-only": 0, "refused": 0}
    for cls in exported():
        counts[kind(cls).split(":")[0]] += 1
    yield INTRO.format(
        all=sum(counts.values()),
        version=diffusers.__version__,
        rows=counts["row"],
        attach=counts["attach-only"],
        refused=counts["refused"],
    )
    by_class: dict[str, list[str]] = {}
    for name in NAMES:
        by_class.setdefault(published(name)["class"], []).append(name)
    columns = ["model", "denoiser", "checkpoint", "parameters", "sites", "heads"]
    for title, with_layout in (("With a row", True), ("Attach-only", False)):
        extra = ["tokens", "text"] if with_layout else []
        yield f"## {title}\n"
        yield from _head(*columns, *extra, "CFG")
        for family in FAMILIES:
            if (family.layout is not None) == with_layout:
                yield from (_row(family, n, with_layout) for n in by_class[family.denoiser])
        yield ""
    yield "## Refused\n"
    yield from _head("denoiser", "why")
    yield from (f"| `{cls}` | {REFUSED[cls]} |" for cls in exported() if cls in REFUSED)


@pytest.mark.slow  # alone; after test_fullsize.py all is known already
def test_the_page_of_models_is_what_attaching_finds():
    page = "\n".join(_page()) + "\n"
    if os.environ.get("UPDATE_README"):
        PAGE.write_text(page)
    assert page == PAGE.read_text(), "drifted: UPDATE_README=1 pytest " + __file__
