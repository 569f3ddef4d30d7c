"""torch.compile, fullgraph: agrees with eager, one graph more while guidance is on, none per u.

Graphs are counted by a backend that runs them eagerly, so that no C++ compiler is needed.
"""

from __future__ import annotations

import threading

import pytest
import tiny
import tiny_odd_processors
import tiny_pipelines
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny_oracle import close

from attn_control import AttnControlError, attach
from attn_control.processors import NAG, HeadGate, SkipLayers, SoftPAG

SLOW = pytest.mark.slow
FAMILIES = ("sd3", "flux", pytest.param("wan", marks=SLOW), pytest.param("sd15", marks=SLOW))
GUIDE = SoftPAG("L1H0", u=0.5, scale=2.0)


class Graphs:
    """A dynamo backend: counts the graphs it is given, and how often they run."""

    def __init__(self) -> None:
        self.count = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> object:
        self.count += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs() -> Graphs:
    torch._dynamo.utils.counters.clear()  # breaks of other tests are not these tests'
    return Graphs()


def _compiled(model, graphs):
    return torch.compile(model, backend=graphs, fullgraph=True)


def _eager(family: str, *controls):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    with torch.no_grad(), attach(model, *controls):
        return model(**call)[0]


@SLOW
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compile_then_attach(family, graphs):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    compiled = _compiled(model, graphs)
    plain = compiled(**call)[0]
    assert graphs.count == 1
    with attach(compiled, GUIDE):
        close(compiled(**call)[0], _eager(family, GUIDE))
        close(compiled(**call)[0], _eager(family, GUIDE))
    close(compiled(**call)[0], plain)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attach_then_compile(family, graphs):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    with attach(model, GUIDE):
        compiled = _compiled(model, graphs)
        close(compiled(**call)[0], _eager(family, GUIDE))
        assert graphs.count == 2 and graphs.runs == 2  # one plain, one perturbed: both compiled
        compiled(**call)
        assert graphs.count == 2 and graphs.runs == 4
    close(compiled(**call)[0], _eager(family))


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("first", ["compile", "attach"])
@torch.no_grad()
def test_compiled_in_place(family, first, graphs):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    if first == "compile":
        model.compile(backend=graphs, fullgraph=True)
    with attach(model, GUIDE):
        if first == "attach":
            model.compile(backend=graphs, fullgraph=True)
        close(model(**call)[0], _eager(family, GUIDE))
        assert graphs.count == 2 and graphs.runs == 2


def _breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


@torch.no_grad()
def test_repeated_blocks_compiled_one_by_one(graphs):  # not offered by diffusers for SD3
    family = "flux"
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    model.compile_repeated_blocks(backend=graphs, fullgraph=True)
    model(**call)
    plain = graphs.count
    with attach(model):
        model(**call)
    idle = graphs.count
    assert idle <= 2 * plain  # the processors' classes are others now
    busy = None
    for u, scale in ((0.5, 2.0), (0.25, 2.0), (1.0, 5.0)):
        control = SoftPAG("L0-2H0", u=u, scale=scale)
        with attach(model, control):
            close(model(**call)[0], _eager(family, control))
        busy = busy or graphs.count
        assert idle < graphs.count == busy <= idle + plain, f"{u=} {scale=}"
    runs = graphs.runs
    with attach(model, control):
        model(**call)
    assert graphs.runs == runs + 8 and not _breaks()  # four blocks, plain and perturbed


PHASES = {  # controls with a window, and the graphs beside the plain one that they may cost
    "guidance": (lambda n: (SoftPAG("L1H1", u=n / 4, scale=n, window="0.25-0.75"),), 1),
    "rows": (lambda n: (NAG(scale=1.0 + n, window="0.25-0.75"),), 1),
    "layers": (lambda n: (SkipLayers("L1", u=n / 4, scale=n, window="0.25-0.75"),), 1),
    "two windows": (
        lambda n: (
            HeadGate("L0H1", gain=n / 4, window="0.5-1"),
            SoftPAG("L1H1", scale=n, window="0-0.75"),
        ),
        3,  # gate; guidance; both
    ),
}


@pytest.mark.parametrize("phases", PHASES)
@torch.no_grad()
def test_at_most_one_graph_a_phase_and_none_for_other_numbers(phases, graphs):
    controls, more = PHASES[phases]
    pipe, call = tiny_pipelines.flux()
    expected = []
    for n in (1, 2, 3):
        with attach(pipe, *controls(n)):
            expected.append(tiny_pipelines.render(pipe, call))
    pipe.transformer = _compiled(pipe.transformer, graphs)
    counts = []
    for n in (1, 2, 3):
        with attach(pipe, *controls(n)):
            close(tiny_pipelines.render(pipe, call), expected[n - 1])
        counts.append(graphs.count)
    assert counts == [1 + more] * 3
    assert not _breaks()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_idle_is_one_graph_and_guidance_exactly_one_more_and_none_when_u_changes(family, graphs):
    model, call = tiny.MODELS[family](), tiny.family_inputs(family)
    compiled = _compiled(model, graphs)
    with attach(compiled):
        compiled(**call)
        compiled(**call)
    assert graphs.count == 1
    for u in (0.5, 0.25, 1.0):
        control = SoftPAG("L1H0", u=u, scale=2.0)
        with attach(compiled, control):
            close(compiled(**call)[0], _eager(family, control))
        assert graphs.count == 2, f"{u=}"


@torch.no_grad()
def test_gates_share_a_graph_whatever_their_gain(graphs):
    model, call = tiny.sd3(), tiny.inputs("sd3")
    compiled = _compiled(model, graphs)
    for gain in (0.0, 0.5, 3.0):
        with attach(compiled, HeadGate("L1H0", gain=gain)):
            close(compiled(**call)[0], _eager("sd3", HeadGate("L1H0", gain=gain)))
        assert graphs.count == 1


@torch.no_grad()
def test_counters_count_inside_graphs(graphs):
    model, call = tiny.flux(), tiny.inputs("flux")
    with attach(_compiled(model, graphs), SoftPAG("L0-3H0")) as session:
        compiled = session._denoisers[0].model
        for _ in range(3):
            compiled(**call)
    assert [s["calls"] for s in session.report().controls[0].sites.values()] == [3] * 4


@SLOW
@pytest.mark.parametrize("family", ["sd3", "flux_true_cfg", "wan"])
def test_a_compiled_pipeline_draws_what_the_eager_one_draws(family, graphs):
    pipe, call = tiny_pipelines.PIPELINES[family]()
    control = SoftPAG("L1H0", u=0.5, scale=2.0, window="0.25-0.75")
    with attach(pipe, control):
        expected = tiny_pipelines.render(pipe, call)
    pipe.transformer = _compiled(pipe.transformer, graphs)
    with attach(pipe, control) as session:
        close(tiny_pipelines.render(pipe, call), expected)
        count = graphs.count
        close(tiny_pipelines.render(pipe, call), expected)
    assert graphs.count == count  # steps in and out of the window recompile nothing
    assert list(session.report().controls[0].steps.values()) == [[1, 2], [1, 2]]


@SLOW
@torch.no_grad()
def test_one_processor_for_all_modules_under_compile(graphs):
    model, call = tiny.unet(), tiny.inputs("unet")
    model.set_attn_processor(AttnProcessor2_0())
    compiled = _compiled(model, graphs)
    with attach(compiled, GUIDE):
        close(compiled(**call)[0], _eager("sd15", GUIDE))
    assert graphs.count == 2


@SLOW
@torch.no_grad()
def test_processors_healed_under_compile(graphs):
    model, call = tiny.unet(), tiny.inputs("unet")
    compiled = _compiled(model, graphs)
    with attach(compiled, GUIDE) as session:
        compiled(**call)
        model.set_attn_processor(AttnProcessor2_0())
        close(compiled(**call)[0], _eager("sd15", GUIDE))
    assert session.report().notes


def test_two_threads_with_a_compiled_model_each():
    results: dict[int, torch.Tensor] = {}
    errors: list[BaseException] = []

    families = ("sd3", "flux")
    models = [tiny.MODELS[family]() for family in families]

    def work(number: int, family: str) -> None:
        try:
            with torch.no_grad():
                model = _compiled(models[number], Graphs())
                with attach(model, GUIDE):
                    for _ in range(2):
                        results[number] = model(**tiny.family_inputs(family))[0]
        except BaseException as error:
            errors.append(error)

    expected = [_eager(family, GUIDE) for family in families]
    threads = [threading.Thread(target=work, args=item) for item in enumerate(families)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number in range(2):
        close(results[number], expected[number])


@SLOW
@torch.no_grad()
def test_a_processor_that_cannot_be_seen_raises_under_compile_too(graphs):
    model, call = tiny.unet(), tiny.inputs("unet")
    site = model.mid_block.attentions[0].transformer_blocks[0].attn1
    site.set_processor(tiny_odd_processors.Matmul())
    compiled = _compiled(model, graphs)
    with pytest.raises(AttnControlError, match="did not act at L2.self"):
        with attach(compiled, HeadGate("L2")):
            compiled(**call)


@torch.no_grad()
def test_a_model_and_its_compiled_wrapper_are_not_attached_together(graphs):
    model, call = tiny.sd3(), tiny.inputs("sd3")
    compiled, gate = _compiled(model, graphs), HeadGate("L0H1")
    for outer, inner in ((model, compiled), (compiled, model)):
        with attach(outer, GUIDE):
            with pytest.raises(AttnControlError, match="attached already.*attach to the same obj"):
                attach(inner, gate)
            close(outer(**call)[0], _eager("sd3", GUIDE))
    close(compiled(**call)[0], _eager("sd3"))
