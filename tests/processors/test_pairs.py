"""Every pair of controls on four kinds of model: legal ones equal the composition by hand, the
others are refused when attached; and the table of both in docs/guidance.md."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import dense_pairs
import diffusers
import pytest
import tiny
import torch
from dense_pairs import Operation, Step, gain, leave_out, nag, toward
from guides_shared import combine
from tiny_oracle import close
from torch import Tensor

from attn_control import AttnControlError, attach
from attn_control.processors import NAG, SEG, HeadGate, SkipLayers, SoftPAG

DOCS = Path(__file__).parents[2] / "docs" / "guidance.md"
Heads = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """A control of block 1 and, apart from it, what it means.

    make: from a model's name and heads to the control; means: from heads to the operation by hand;
    guides: scale and options of its combine, or None for what acts in the pipeline's own passes.
    """

    group: str
    make: Callable[[str, Heads], Any]
    means: Callable[[Heads], Operation]
    guides: dict[str, float] | None = None
    joint: bool = False
    negative: bool = False


def _label(heads: Heads) -> str:
    return f"L1H{heads[0]}-{heads[-1]}" if len(heads) > 1 else f"L1H{heads[0]}"


def _pag(op: str, where: str = "all", u: float = 0.6, scale: float = 2.0, **options: Any) -> Kind:
    given = {"path": op} if op in ("slerp", "chord") else {"op": op}
    return Kind(
        GUIDE,
        lambda _, heads: SoftPAG(_label(heads), u=u, scale=scale, tokens=where, **given, **options),
        lambda heads: toward(op, u, heads, where, rows="cx", seed=options.get("seed", 0)),
        {"scale": scale, **{n: v for n, v in options.items() if n not in ("seed", "batched")}},
        joint=op.startswith("ii"),
    )


def _skip(what: str, u: float, **options: Any) -> Kind:
    """SkipLayers as a guide, or fused."""
    fused = "fused" in options
    way = next((name for name in ("fused", "batched") if name in options), "")
    part = ", u < 1" if u < 1 else ", u = 1"
    given = options if fused else {"scale": 1.5, **options}
    return Kind(
        f'`SkipLayers(what="{what}", {way}=True)`{part if fused else ""}' if way else GUIDE,
        lambda *_: SkipLayers("L0-1" if "stochastic" in options else "L1", u=u, what=what, **given),
        lambda _: leave_out(
            "attention branch" if what == "attention" else what, u, "n" if fused else "cx"
        ),
        None if fused else {"scale": 1.5},
    )


def _gates(name: str, heads: Heads) -> SoftPAG:
    gates = torch.zeros(2, 4 if name in ("sd15", "sd3") else 2)
    gates[1, list(heads)] = 0.5
    return SoftPAG.from_gates(gates, scale=1.2)


def _draws_block_1(seed: int) -> bool:
    generator = torch.Generator().manual_seed(seed * 1_000_003)  # at step 0
    return int(torch.randperm(2, generator=generator)[0]) == 1


GUIDE, BATCHED = "a guide: SoftPAG, SEG, SkipLayers", "`SoftPAG`, `SEG` with `batched=True`"
SHARPEN, GATE, NEGATIVE = "`SoftPAG(u < 0)`", "`HeadGate`", "`NAG`"
FUSED = "`SoftPAG`, `SEG` with `fused=True`"
KINDS = {
    "identity": _pag("identity"),
    "apg": _pag("identity", u=1.0, parallel=0.0, limit=0.3, rescale=0.7),
    "uniform": _pag("uniform", "image"),
    "mean_query": _pag("mean_query", "image"),
    "ii_softmax": _pag("ii_softmax", "image"),
    "ii_mass": _pag("ii_mass", "image"),
    "permute": _pag("permute", "image", seed=3),
    "slerp": _pag("slerp"),
    "chord": _pag("chord", "image"),
    "gates": Kind(
        GUIDE, _gates, lambda h: toward("identity", 0.5, h, "all", rows="cx"), {"scale": 1.2}
    ),
    "SEG": Kind(
        GUIDE,
        lambda _, heads: SEG(_label(heads), sigma=0.8, scale=2.0),
        lambda heads: toward("blur", 1.0, heads, "image", rows="cx", sigma=0.8),
        {"scale": 2.0},
    ),
    "SEG inf": Kind(
        GUIDE,
        lambda _, heads: SEG(_label(heads), scale=2.0),
        lambda heads: toward("mean_query", 1.0, heads, "image", rows="cx"),
        {"scale": 2.0},
    ),
    "block": _skip("block", 0.5),
    "whole block": _skip("block", 1.0),
    "attention": _skip("attention", 0.5),
    "feed-forward": _skip("feed_forward", 1.0),
    "stochastic": _skip(
        "block", 1.0, stochastic=1, seed=next(s for s in range(1, 9) if _draws_block_1(s))
    ),
    "batched": replace(_pag("uniform", "image", u=0.7, batched=True), group=BATCHED),
    "batched attention": _skip("attention", 1.0, batched=True),
    "sharpen": Kind(
        SHARPEN,
        lambda _, heads: SoftPAG(_label(heads), u=-0.5, cap=1.3),
        lambda heads: toward("identity", -0.5, heads, "all", rows="ncx", cap=1.3),
    ),
    "gate": Kind(
        GATE, lambda _, heads: HeadGate(_label(heads), gain=0.3), lambda heads: gain(0.3, heads)
    ),
    "nag": Kind(
        NEGATIVE,
        lambda name, _: NAG("L1", scale=3.0, alpha=0.5, tau=1.3, negative=_step(name).texts["x"]),
        lambda _: nag(3.0, 1.3, 0.5),
        negative=True,
    ),
    "fused": Kind(
        FUSED,
        lambda _, heads: SoftPAG(_label(heads), op="uniform", tokens="image", u=0.7, fused=True),
        lambda heads: toward("uniform", 0.7, heads, "image", rows="n"),
    ),
    "fused SEG": Kind(
        FUSED,
        lambda _, heads: SEG(_label(heads), sigma=0.8, fused=True),
        lambda heads: toward("blur", 1.0, heads, "image", rows="n", sigma=0.8),
    ),
    "fused block": _skip("block", 0.5, fused=True),
    "fused whole block": _skip("block", 1.0, fused=True),
    "fused attention": _skip("attention", 1.0, fused=True),
}
GROUPS = tuple(dict.fromkeys(kind.group for kind in KINDS.values()))
SKIPPED = KINDS["batched attention"].group
BLOCK, WHOLE, ATTENTION = (KINDS[f"fused {n}"].group for n in ("block", "whole block", "attention"))
# Of each of these one control would be lost: written here by hand, and nowhere derived.
ILLEGAL = {
    frozenset(pair)
    for pair in (
        (NEGATIVE, NEGATIVE), (NEGATIVE, BATCHED), (BLOCK, BLOCK), (BLOCK, WHOLE),
        (WHOLE, WHOLE), (WHOLE, ATTENTION), (WHOLE, FUSED), (ATTENTION, ATTENTION),
        (ATTENTION, FUSED), (NEGATIVE, SKIPPED), (SKIPPED, SKIPPED), (SKIPPED, ATTENTION),
    )
}  # fmt: skip


class Sampler:
    """What a session asks of a pipeline: a denoiser, a scheduler, and whether guidance is on."""

    do_classifier_free_guidance = True

    def __init__(self, step: Step) -> None:
        setattr(self, "unet" if step.name == "sd15" else "transformer", step.model)
        self.scheduler = _scheduler(step.name)


def _scheduler(name: str) -> Any:
    made = (
        diffusers.DDIMScheduler()
        if name == "sd15"
        else diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    )
    made.set_timesteps(4)
    return made


@functools.cache
def _step(name: str) -> Step:
    call = tiny.family_inputs(name, batch=3)
    sample = call["sample"][:, :, :8, :8] if name == "sd15" else call["hidden_states"]
    rows = dict(zip("ncx", range(3), strict=True))
    time = _scheduler(name).timesteps[0] / (1000 if name == "flux" else 1)
    pooled = call.get("pooled_projections")
    return Step(
        name,
        tiny.MODELS[name](),
        sample[:1],
        {row: call["encoder_hidden_states"][n : n + 1] for row, n in rows.items()},
        {row: pooled[1:2] for row in rows} if pooled is not None else {},
        {n: v for n, v in call.items() if n.endswith("_ids")},
        time,
    )


Asked = tuple[tuple[str, Heads], ...]


@functools.cache
def _pass(name: str, rows: tuple[str, ...], asked: Asked) -> dict[str, Tensor]:
    return _step(name).run(rows, [KINDS[kind].means(heads) for kind, heads in asked])


def _by_hand(name: str, asked: Asked) -> dict[str, Tensor]:
    """The prediction of the negative and the conditional row, composed from passes."""
    twice = ("x",) if any(KINDS[kind].negative for kind, _ in asked) else ()
    guides = tuple(one for one in asked if KINDS[one[0]].guides is not None)
    others = tuple(one for one in asked if one not in guides)
    in_both = tuple(one for one in others if "fused" not in one[0])  # without those of row n
    if _step(name).facts.split:
        rows = _pass(name, ("c", *twice), in_both) | _pass(name, ("n",), others)
    else:
        rows = dict(_pass(name, ("n", "c", *twice), others))
    cond = rows["c"]
    for one in guides:
        perturbed = _pass(name, ("c", *twice), (*in_both, one))["c"]
        added = combine(cond, perturbed, **KINDS[one[0]].guides) - cond.double()
        rows = {row: value + added for row, value in rows.items()}
    return rows


def _attached(name: str, controls: list[Any]) -> dict[str, Tensor]:
    step = _step(name)
    with torch.no_grad(), attach(Sampler(step), *controls, strict=True):
        if step.facts.split:
            return {r: step.model(**step.arguments((r,)), return_dict=False)[0] for r in "cn"}
        out = step.model(**step.arguments(("n", "c")), return_dict=False)[0]
        return {"n": out[:1], "c": out[1:]}


def _exists(name: str, kind: str) -> bool:
    """Whether the model has what the kind needs: text among the tokens of block 1's attention."""
    return not KINDS[kind].joint or dense_pairs.FACTS[name].text.stop > 0


CASES = [(m, kind) for m in dense_pairs.FACTS for kind in KINDS if _exists(m, kind)]


@pytest.mark.parametrize(("name", "first"), CASES)
def test_every_pair_equals_its_composition_or_is_refused(name, first):
    plain = _by_hand(name, ())
    for number, second in enumerate(KINDS):
        in_place = KINDS[first].guides is None and KINDS[second].guides is None
        if not _exists(name, second) or (number < list(KINDS).index(first) and not in_place):
            continue  # the other order has been here; in place, the order counts
        asked = ((first, (0, 1)), (second, (1,)))
        controls = [KINDS[kind].make(name, heads) for kind, heads in asked]
        if frozenset((KINDS[first].group, KINDS[second].group)) in ILLEGAL:
            with pytest.raises(AttnControlError, match="cannot act together") as refusal:
                attach(Sampler(_step(name)), *controls)
            assert all(str(control) in str(refusal.value) for control in controls)
            continue
        got, want = _attached(name, controls), _by_hand(name, asked)
        for row in "nc":
            close(got[row], want[row], 2e-5)
        assert any((want[row] - plain[row]).abs().max() > 1e-4 for row in "nc"), (first, second)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_each_one_alone_equals_its_composition(name, kind):
    asked = ((kind, (0, 1)),)
    got, want = _attached(name, [KINDS[kind].make(name, (0, 1))]), _by_hand(name, asked)
    for row in "nc":
        close(got[row], want[row], 2e-5)


def test_windows_that_do_not_meet_make_a_pair_legal():
    first, second = NAG(window="0-0.5"), NAG(scale=2.0, window="0.5-1")
    attach(tiny.sd3(), first, second).close()
    high, low = NAG(window="sigma 1-0.5"), NAG(window="sigma 0.4-0")
    attach(tiny.sd3(), high, low).close()
    for other in (NAG(window="0.25-1"), NAG(window="sigma 1-0")):
        with pytest.raises(AttnControlError, match="negative text of its own"):
            attach(tiny.sd3(), first, other)


def test_other_layers_or_an_idle_one_make_a_pair_legal():
    model = tiny.sd3()
    attach(model, SkipLayers("L0", fused=True), SkipLayers("L1", fused=True)).close()
    attach(model, SkipLayers("L0", fused=True), SoftPAG("L1", fused=True)).close()
    attach(model, NAG(), NAG(scale=1.0)).close()


def test_gates_by_row_do_not_go_with_rows_that_run_twice():
    with pytest.raises(AttnControlError, match="gates by row"):
        attach(tiny.sd3(), NAG(), SoftPAG.from_gates(torch.ones(2, 3, 4)))


def test_nested_sessions_are_pairs_too():
    model = tiny.sd3()
    with attach(model, NAG()), pytest.raises(AttnControlError, match="cannot act together"):
        attach(model, NAG("L1"))
    assert "_attn_control" not in vars(model)


def pairs_table() -> str:
    """Attached in earnest, kind by kind, on an SD3."""
    step = _step("sd3")
    found: dict[tuple[str, str], set[bool]] = {}
    for first, second in product(KINDS, KINDS):
        legal = True
        try:
            controls = [KINDS[kind].make("sd3", (0, 1)) for kind in (first, second)]
            attach(Sampler(step), *controls).close()
        except AttnControlError:
            legal = False
        found.setdefault((KINDS[first].group, KINDS[second].group), set()).add(legal)
    assert all(len(answers) == 1 for answers in found.values())
    lines = ["| | " + " | ".join(f"({n + 1})" for n in range(len(GROUPS))) + " |"]
    lines.append("|---|" + "---|" * len(GROUPS))
    for n, group in enumerate(GROUPS):
        cells = ["yes" if True in found[group, other] else "**no**" for other in GROUPS]
        lines.append(f"| ({n + 1}) {group} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_table_in_the_docs_is_what_attach_does():
    """After a change: ``UPDATE_DOCS=1 pytest tests/processors/test_pairs.py`` writes it anew."""
    begin, end = "<!-- pairs: made by tests/processors/test_pairs.py -->", "<!-- /pairs -->"
    before, rest = DOCS.read_text(encoding="utf-8").split(begin)
    old, after = rest.split(end)
    table = pairs_table()
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
    else:
        assert old.strip() == table
