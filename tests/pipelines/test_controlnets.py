"""ControlNets beside the denoiser: their sites are taken by name only, their calls do not count."""

from __future__ import annotations

import contextlib

import diffusers
import pytest
import tiny
import tiny_pipelines
import torch
from tiny_by_hand import explicit
from tiny_editing import EDITING, controlnet_of, picture
from tiny_oracle import attention, close, fingerprint, gated, toward_identity
from tiny_pipelines import render

from attn_control import AttnControlError, attach
from attn_control.processors import NAG, HeadGate, SoftPAG

# Pipeline: a site of its ControlNet, by selector and by module name.
SITES = {
    "sd15_controlnet": ("L2H1", "mid_block.attentions.0.transformer_blocks.0.attn1"),
    "sd3_controlnet": ("L0H1", "transformer_blocks.0.attn"),
    "flux_controlnet": ("L1H1", "single_transformer_blocks.0.attn"),
}


@pytest.mark.parametrize("name", SITES)
def test_its_sites_are_named_and_taken_by_its_name_only(name):
    pipe, call, _ = EDITING[name]()
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    plain = render(pipe, call)
    before = fingerprint(denoiser, pipe.controlnet)
    place, module = SITES[name]
    with attach(pipe, HeadGate("all", gain=0.5)) as session:
        models = {site.model for site in session.sites}
        assert models == {"controlnet", "unet" if name.startswith("sd15") else "transformer"}
        own = [site for site in session.sites if site.model != "controlnet"]
        assert {site.name for site in own} == {
            n for n, m in denoiser.named_modules() if hasattr(m, "processor")
        }
        render(pipe, call)
    assert not any(s.startswith("controlnet") for s in session.report().controls[0].sites)
    with attach(pipe, HeadGate(f"controlnet:{place}", gain=0.0)) as session:
        got = render(pipe, call)
    with attention(pipe.controlnet, {module: gated((1,), 0.0)}):
        close(got, render(pipe, call))
    assert not torch.equal(got, plain)
    assert [*session.report().controls[0].sites] == [f"controlnet.{module}"]
    assert torch.equal(render(pipe, call), plain)
    assert fingerprint(denoiser, pipe.controlnet) == before


def sd35_large():
    """The ControlNets of SD3.5 large: no text, and the denoiser's own embedding of the picture."""
    pipe, call, layout = EDITING["sd3_controlnet"]()
    torch.manual_seed(2)
    config = {n: v for n, v in pipe.controlnet.config.items() if not n.startswith("_")}
    config |= {"joint_attention_dim": None, "use_pos_embed": False, "num_layers": 1}
    net = tiny._spread(diffusers.SD3ControlNetModel(**config))
    net.pos_embed = net._get_pos_embed_from_transformer(pipe.transformer)
    pipe.controlnet = net
    return pipe, call, layout


SPANS = {
    "sd15_controlnet": (EDITING["sd15_controlnet"], slice(None)),
    "sd3_controlnet": (EDITING["sd3_controlnet"], slice(0, 16)),
    "sd35_large": (sd35_large, slice(None)),
    "flux_controlnet": (EDITING["flux_controlnet"], slice(5, 21)),
}


@pytest.mark.parametrize("name", SPANS)
def test_the_picture_among_its_tokens(name):
    make, span = SPANS[name]
    module = SITES.get(name, ("", "transformer_blocks.0.attn"))[1]
    pipe, call, _ = make()
    with attach(pipe) as session:
        label = next(s.label for s in session.sites if s.beside and s.name == module)
    with attach(pipe, HeadGate(f"controlnet:{label}H1", gain=0.0, tokens="image")):
        got = render(pipe, call)
    with attention(pipe.controlnet, {module: gated((1,), 0.0, span)}):
        want = render(pipe, call)
    close(got, want)
    assert not torch.equal(got, render(pipe, call))


@pytest.mark.parametrize("control", [SoftPAG, NAG])
def test_what_needs_the_denoiser_again_is_refused_there(control):
    pipe, _, _ = EDITING["sd3_controlnet"]()
    with pytest.raises(AttnControlError, match="controlnet runs before the denoiser"):
        attach(pipe, control("controlnet:L1"))
    assert not any("_attn_control" in key for m in pipe.controlnet.modules() for key in m.__dict__)
    attach(pipe, SoftPAG("controlnet:L1", u=-0.5)).close()  # in place


def test_unknown_components_say_what_there_is():
    pipe, _, _ = EDITING["sd15_controlnet"]()
    with pytest.raises(AttnControlError, match="'transformer'; there is: unet, controlnet$"):
        attach(pipe, HeadGate("transformer:L1"))
    with pytest.raises(AttnControlError, match="asks for layer 3.*L0 to L2"):
        attach(pipe, HeadGate("controlnet:L1-3"))
    pipe, _ = tiny_pipelines.sd15()
    with pytest.raises(AttnControlError, match="'controlnet'; there is: unet$"):
        attach(pipe, HeadGate("controlnet:all"))


SCHEDULERS = [
    # Without a step index, and with a timestep that comes twice: as SD 1.5 is shipped.
    lambda: diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    diffusers.DDIMScheduler,  # without a step index
    diffusers.HeunDiscreteScheduler,
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=["pndm", "ddim", "heun"])
def test_its_calls_do_not_count_as_steps(scheduler):
    """With the ControlNet under control, or not, the denoiser's steps are those without one."""
    seen = {}
    for kind in ("none", "beside", "both"):
        pipe, call, _ = EDITING["sd15_controlnet"]()
        if kind == "none":
            pipe, call = tiny_pipelines.sd15()
        pipe.scheduler = scheduler()
        controls = [SoftPAG("L2H1", window="0.3-0.8")]
        if kind == "both":
            controls.append(HeadGate("controlnet:L1", gain=0.5, window="0.3-0.8"))
        with attach(pipe, *controls) as session, _steps(pipe, session) as steps:
            for _ in range(2):
                render(pipe, call | {"num_inference_steps": 4})
        seen[kind] = steps, [sorted(s) for s in session.report().controls[0].steps.values()]
        if kind == "both":
            ours, theirs = (c.steps for c in session.report().controls)
            assert [sorted(s) for s in theirs.values()] == [sorted(s) for s in ours.values()]
    assert seen["beside"] == seen["none"] == seen["both"]


@contextlib.contextmanager
def _steps(pipe, session):
    found = []

    def note(*_):
        step = session.step
        found.append((step.index, step.total, step.branch))

    hook = pipe.unet.register_forward_pre_hook(note)
    yield found
    hook.remove()


@pytest.mark.parametrize("name", ["sd15_controlnet", "flux_controlnet"])
def test_a_control_on_both_equals_both_by_hand(name):
    pipe, call, layout = EDITING[name]()
    place, module = SITES[name]
    inside = {"sd15_controlnet": module, "flux_controlnet": "transformer_blocks.0.attn"}[name]
    where = {"sd15_controlnet": "L2H1", "flux_controlnet": "L0H1"}[name]
    controls = HeadGate(f"controlnet:{place}", gain=0.5), SoftPAG(where, u=0.6, scale=2.0)
    with attach(pipe, *controls):
        got = render(pipe, call)

    net, forward = pipe.controlnet, pipe.controlnet.forward

    def gated_forward(*args, **kwargs):
        with attention(net, {module: gated((1,), 0.5)}):
            return forward(*args, **kwargs)

    net.forward = gated_forward
    want, _ = explicit(pipe, call, layout, {inside: toward_identity((1,), 0.6)}, 2.0)
    close(got, want)


def test_guess_mode_gives_it_the_cond_rows_alone():
    pipe, call, _ = EDITING["sd15_controlnet"]()
    call |= {"guess_mode": True}
    gate = HeadGate("controlnet:L2H1", gain=0.0)
    with attach(pipe, gate, SoftPAG("L2H1", u=0.6)) as session:
        render(pipe, call)
    controls = session.report().controls
    assert all(control.fired for control in controls)
    assert session.step.branch == ("uncond", "cond")
    assert session._denoisers[1].step.branch == ("other:controlnet",)


def test_several_are_numbered_and_one_given_twice_counts_once():
    nets = [controlnet_of(tiny_pipelines.sd15()[0].unet) for _ in range(2)]
    for given, names in ((nets, {"controlnet_0", "controlnet_1"}), ([nets[0]] * 2, {"controlnet"})):
        pipe, call, _ = EDITING["sd15_controlnet"]()
        many = diffusers.MultiControlNetModel(given)
        pipe.controlnet = many
        call |= {"image": [picture(32)] * 2, "controlnet_conditioning_scale": [1.0, 0.5]}
        name = max(names)
        with attach(pipe, HeadGate(f"{name}:L2H1", gain=0.0)) as session:
            assert {site.model for site in session.sites} - {"unet"} == names
            got = render(pipe, call)
        module = SITES["sd15_controlnet"][1]
        with attention(given[1], {module: gated((1,), 0.0)}):
            close(got, render(pipe, call))


def test_a_bare_controlnet():
    net = controlnet_of(tiny_pipelines.sd15()[0].unet)
    with attach(net, HeadGate("controlnet:L0", gain=0.5)) as session:
        assert {site.model for site in session.sites} == {"controlnet"}


def test_the_sessions_step_is_the_denoisers():
    pipe, call, _ = EDITING["sd15_controlnet"]()
    seen = []
    with attach(pipe, HeadGate("all, controlnet:all", gain=0.5)) as session:
        hook = pipe.controlnet.register_forward_pre_hook(lambda *_: seen.append(session.step))
        render(pipe, call)
        hook.remove()
    # Before the denoiser's first call there is none; then it is one behind the ControlNet's.
    assert [step and step.index for step in seen] == [None, 0, 1]
    assert session.step.index == 2
