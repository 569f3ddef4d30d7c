"""One head perturbed, held against a dense softmax in float64 on the CPU; the rest keeps its bits.

The reference takes a sample of query rows, so that no map of tokens by tokens is made, and uses
nothing of the package: scores, mask, softmax and the method's formula are written out here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_control.call import Layout, Site
from attn_control.doctor.finding import Finding, Skipped
from attn_control.doctor.patient import Patient
from attn_control.doctor.watch import Softmax
from attn_control.processors import Control, HeadGate, SoftPAG

QUERIES = 16  # sampled a head
U, GAIN = 0.5, 0.5
UNLIKE = 0.05  # of the largest output: further off, plain attention is no softmax that we know


def one_head(p: Patient) -> list[Finding]:
    """A finding for a few sites: the first, the last, and one in the middle of each slot."""
    return [_one_head(p, site) for site in _spots(p)]


def _spots(p: Patient) -> list[Site]:
    by_slot: dict[str, list[Site]] = {}
    for site in p.sites:
        by_slot.setdefault(site.slot, []).append(site)
    middles = [sites[len(sites) // 2] for sites in by_slot.values()]
    return sorted({p.sites[0], *middles, p.sites[-1]}, key=p.sites.index)


def _one_head(p: Patient, site: Site) -> Finding:
    head = site.heads // 2
    name, layout = f"head {site.label}H{head}", p.layout(site)
    tokens, span = _tokens(layout)
    control: Control
    guided = p.guides(site)
    if guided:
        control = SoftPAG(f"{site.label}H{head}", u=U, scale=1.0, tokens=tokens)
    else:
        control = HeadGate(f"{site.label}H{head}", gain=GAIN, tokens=tokens)
    calls = _perturbed(p, site, p.watched(control, keep=(site.name,))[site.name])
    worst = bound = 0.0
    for index in p.main(site):
        call = calls[index]
        start, stop = span or (0, call.q.shape[2])
        touched = torch.zeros(call.out.shape[:3], dtype=torch.bool)
        touched[:, head, start:stop] = True
        wrong = _elsewhere(call, touched)
        if wrong:
            return Finding("FAIL", name, f"{control}: {wrong}")
        rows = torch.linspace(start, stop - 1, min(QUERIES, stop - start)).long()
        dense = dense_rows(call, head, rows)
        wanted = (1 - U) * dense + U * _own(call, head, rows) if guided else GAIN * dense
        size = wanted.abs().max().item()
        error = (_cpu(call.out[:, head])[:, rows] - wanted).abs().max().item()
        assert call.plain is not None
        usual = (_cpu(call.plain[:, head])[:, rows] - dense).abs().max().item()
        if usual > UNLIKE * dense.abs().max().item():
            raise Skipped(
                f"plain attention at {site.label} is {usual:.3g} off a dense softmax of what it was"
                " given: a mask, scale or backend that is not understood here"
            )
        # Twice the rounding of plain attention here, and that of writing the result down.
        allowed = 2 * usual + 4 * torch.finfo(call.out.dtype).eps * max(size, 1e-6)
        if error > allowed:
            detail = (
                f"{control}: {error:.3g} from a dense softmax of {len(rows)} rows, expected at most"
                f" {allowed:.3g}"
            )
            return Finding("FAIL", name, detail, {"error": error, "allowed": allowed})
        worst, bound = max(worst, error), max(bound, allowed)
    method = "SoftPAG" if guided else "HeadGate"
    detail = (
        f"{method} within {worst:.1e} of a dense softmax (allowed {bound:.1e}); all other heads and"
        " tokens keep their bits"
    )
    return Finding("PASS", name, detail, {"error": worst, "allowed": bound, "tokens": tokens})


def one_row(p: Patient) -> Finding:
    """One row of the batch perturbed: the others keep their bits."""
    own = [site for site in p.sites if site.slot in SoftPAG.slots]
    layers = {site.layer for site in own}
    if not own or not all(p.guides(site) for site in own):
        raise Skipped("no attention here in which every row of the batch attends to itself alone")
    if len({site.heads for site in own}) > 1 or layers != set(range(len(layers))):
        raise Skipped("layers differ in their heads, and a tensor of gates has one shape")
    site = own[len(own) // 2]
    rows = p.seen[site.name][0].q.shape[0]
    if rows < 2:
        raise Skipped("the batch has one row")
    gates = torch.zeros(rows, len(layers), site.heads)
    gates[0, site.layer, 0] = U
    control = SoftPAG.from_gates(gates, scale=1.0)
    calls = _perturbed(p, site, p.watched(control, keep=(site.name,))[site.name])
    for index in p.main(site):
        touched = torch.zeros(calls[index].out.shape[:3], dtype=torch.bool)
        touched[0, 0] = True
        wrong = _elsewhere(calls[index], touched)
        if wrong:
            return Finding("FAIL", "one row", f"{site.label}, row 0 of {rows}: {wrong}")
    detail = f"{site.label}H0 perturbed in row 0 of {rows}: the other rows keep their bits"
    return Finding("PASS", "one row", detail)


def _tokens(layout: Layout | None) -> tuple[str, tuple[int, int] | None]:
    """The picture's tokens where there are others beside them, which can be seen to stay."""
    if layout is None:
        return "all", None
    spans = layout.span("image")
    if len(spans) == 1 and spans[0] != (0, layout.q_len):
        return "image", spans[0]
    return "all", None


def _perturbed(p: Patient, site: Site, calls: list[Softmax]) -> list[Softmax]:
    """The softmaxes of the forward that a control changes: guidance runs the plain one first."""
    count = len(p.seen[site.name])
    return calls[count : 2 * count] if len(calls) > count else calls


def _elsewhere(call: Softmax, touched: Tensor) -> str | None:
    """What is wrong if the touched part did not change, or anything else did."""
    assert call.plain is not None
    changed = (call.out != call.plain).any(dim=-1).cpu()
    outside = int((changed & ~touched).sum())
    if outside:
        return f"{outside} outputs of other heads, tokens or rows changed"
    return None if changed.any() else "nothing changed"


def dense_rows(call: Softmax, head: int, rows: Tensor) -> Tensor:
    """softmax(q k^T scale + mask) v of one head, float64 (batch, rows, head_dim), on the CPU."""
    q, k, v = _cpu(call.q[:, head])[:, rows], *(_keys(call, head))
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = q @ k.transpose(-1, -2) * scale
    mask = call.mask
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise Skipped(f"the mask is a {type(mask).__name__}, which is not read here")
        scores = _masked(scores, mask, head, rows, call.q.shape[2])
    if call.causal:
        scores = scores.masked_fill(torch.arange(k.shape[1]) > rows[:, None], float("-inf"))
    scores = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    return scores / scores.sum(-1, keepdim=True) @ v


def _masked(scores: Tensor, mask: Tensor, head: int, rows: Tensor, queries: int) -> Tensor:
    """Scores of some rows of one head under a mask of keys, or of queries by keys."""
    if mask.ndim == 2:  # (batch, keys), or (queries, keys) for all
        per_query = mask.shape[0] == queries and queries != scores.shape[0]
        mask = mask[None] if per_query else mask[:, None]
    elif mask.ndim == 4:
        mask = mask[:, head if mask.shape[1] > 1 else 0]
    if mask.shape[1] == queries and queries > 1:
        mask = mask[:, rows.to(mask.device)]
    mask = mask.to("cpu")
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask.double()


def _keys(call: Softmax, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a query head; several may share one."""
    shared = head * call.k.shape[1] // call.q.shape[1]
    return _cpu(call.k[:, shared]), _cpu(call.v[:, shared])


def _own(call: Softmax, head: int, rows: Tensor) -> Tensor:
    return _keys(call, head)[1][:, rows]


def _cpu(tensor: Tensor) -> Tensor:
    """In float64, which some devices do not have: moved first, widened then."""
    return tensor.detach().to("cpu").double()
