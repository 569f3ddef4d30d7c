"""What must hold on any model: sites are found, nothing asked changes nothing, undo is exact."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch

from attn_control import attach
from attn_control.call import Site
from attn_control.doctor.finding import Finding, Skipped
from attn_control.doctor.patient import Patient
from attn_control.doctor.watch import fingerprint
from attn_control.families import unwrap
from attn_control.processors import Control, HeadGate, SoftPAG


def sites(p: Patient) -> Finding:
    """Every site ran, with the heads that it claims, in the order in which layers are numbered.

    Stacks of blocks may take turns, or run in another order than they are numbered in: numbers rise
    within each then, which is worth knowing and not wrong.
    """
    order = {name: number for number, name in enumerate(p.seen)}
    wrong = []
    for site in p.sites:
        if site.name not in order:
            processor = type(getattr(site.module, "processor", None)).__name__
            wrong.append(f"{site.name} ({processor}) ran no attention that can be seen")
            continue
        first = p.seen[site.name][0]
        heads, width = first.q.shape[1], first.q.shape[3]
        if (heads, width) != (site.heads, site.head_dim):
            wrong.append(
                f"{site.name}: attach says {site.heads} heads of {site.head_dim}, it ran {heads} of"
                f" {width}"
            )
    ran = sorted((site for site in p.sites if site.name in order), key=lambda s: order[s.name])
    for path in dict.fromkeys(_path(site) for site in ran):
        mine = [site for site in ran if _path(site) == path]
        for earlier, later in zip(mine, mine[1:], strict=False):
            if later.layer < earlier.layer:
                wrong.append(f"{later.name} is L{later.layer}, but ran after L{earlier.layer}")
    interleaved = any(b.layer < a.layer for a, b in zip(ran, ran[1:], strict=False))
    others = sorted(set(p.seen) - {site.name for site in p.sites})
    kinds = Counter(site.slot for site in p.sites)
    heads_found = sorted({site.heads for site in p.sites})
    layers = len({site.layer for site in p.sites})
    figures: dict[str, Any] = {
        "layers": layers,
        "slots": dict(kinds),
        "heads": heads_found,
        "head_dims": sorted({site.head_dim for site in p.sites}),
        "left_alone": others,
        "interleaved": interleaved,
    }
    if wrong or not p.sites:
        text = "; ".join(wrong[:3]) or "none was found"
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        return Finding("FAIL", "sites", text + more, {**figures, "wrong": wrong})
    detail = (
        f"{', '.join(f'{count} {slot}' for slot, count in kinds.items())} in {layers} layers,"
        f" {' or '.join(map(str, heads_found))} heads each"
    )
    if others:
        detail += f"; {len(others)} more modules with attention are left alone"
    if interleaved:
        detail += "; layers are numbered stack by stack, which is not the order in which they ran"
    return Finding("WARN" if interleaved else "PASS", "sites", detail, figures)


def _path(site: Site) -> str:
    """The stack of blocks that a site belongs to."""
    return re.sub(r"\.\d+\b", ".#", site.name)


def family(p: Patient) -> Finding:
    """The row of the table of models that this denoiser got."""
    row = p.family
    name = getattr(row.layout, "__name__", "none: attach-only")
    name = name.replace("_", " ")
    figures = {
        "family": row.name,
        "denoiser": type(unwrap(p.model)).__name__,
        "layout": name,
        "cfg": row.cfg,
    }
    detail = f"{row.name}; tokens: {name}; classifier-free guidance: {row.cfg}"
    return Finding("PASS", "family", detail, figures)


def empty(p: Patient) -> Finding:
    """Attached with no control at all."""
    wrong = p.same(p.under(), "attached with no control")
    if wrong:
        return Finding("FAIL", "empty plan", wrong)
    return Finding("PASS", "empty plan", "attached with no control: every bit of the prediction")


def zero(p: Patient) -> Finding:
    """Controls that ask for nothing, one a kind."""
    quiet: list[Control] = [HeadGate(_everything(p), gain=1.0)]
    if any(site.slot in SoftPAG.slots for site in p.sites):
        quiet.append(SoftPAG("all", u=0.0))
    wrong = p.same(p.under(*quiet), ", ".join(map(str, quiet)))
    if wrong:
        return Finding("FAIL", "u = 0", wrong)
    names = " and ".join(
        "SoftPAG(u=0)" if isinstance(c, SoftPAG) else "HeadGate(gain=1)" for c in quiet
    )
    return Finding("PASS", "u = 0", f"{names} on every head: every bit of the prediction")


def _everything(p: Patient) -> str:
    return ", ".join(dict.fromkeys(site.label for site in p.sites))


def restore(p: Patient) -> Finding:
    """Everything is the same object of the same class afterwards, also after an exception."""
    models = {p.component: p.model}
    before = fingerprint(models)
    control = HeadGate(p.sites[-1].label, gain=0.5)
    with attach(p.model, control, strict=True):
        p.predict()
    after = _changes(before, fingerprint(models))
    if not after:
        try:
            with attach(p.model, control):
                raise Skipped
        except Skipped:
            pass
        after = _changes(before, fingerprint(models))
    if after:
        text = "; ".join(after[:3])
        return Finding("FAIL", "restore", f"not as before: {text}", {"changed": after})
    wrong = None
    if p.steady:
        wrong = p.same(p.predict(), "after everything was undone")
    if wrong:
        return Finding("FAIL", "restore", wrong)
    detail = (
        f"{len(before)} classes, attributes, hooks and names as before, also after an exception"
    )
    return Finding("PASS", "restore", detail, {"compared": len(before)})


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    keys = [*before, *(key for key in after if key not in before)]
    return [key for key in keys if before.get(key) != after.get(key)]


def finite(p: Patient) -> Finding:
    """The plain prediction is a number everywhere, and the same twice."""
    bad = int((~torch.isfinite(p.plain)).sum())
    if bad:
        detail = f"the plain prediction has {bad} values that are no numbers; try another dtype"
        return Finding("FAIL", "prediction", detail)
    shape = " x ".join(map(str, p.plain.shape))
    figures = {"shape": list(p.plain.shape), "seconds": p.seconds}
    if not p.steady:
        detail = f"{shape}; two plain calls differ, so bits cannot be compared on this device"
        return Finding("WARN", "prediction", detail, figures)
    detail = f"{shape} in {p.seconds:.2g} s, and the same bits twice"
    return Finding("PASS", "prediction", detail, figures)
