"""Steps and branches: a control acts at exactly the steps of its window, whatever the scheduler
does."""

from __future__ import annotations

import copy
import threading

import diffusers
import pytest
import tiny
import tiny_loops
import tiny_pipelines
import torch
from tiny_oracle import close, forwards, toward_identity

from attn_control import AttnControlError, attach
from attn_control.processors import HeadGate, SoftPAG

pytestmark = pytest.mark.filterwarnings("ignore:::diffusers", "ignore:::numpy")

MID = {"mid_block.attentions.0.transformer_blocks.0.attn1": toward_identity((1,), 1.0)}
GUIDE = SoftPAG("L2H1", scale=2.0, window="0.25-0.75")

SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler,  # has no step_index
    "Euler": diffusers.EulerDiscreteScheduler,
    "EulerAncestral": diffusers.EulerAncestralDiscreteScheduler,
    "Heun": diffusers.HeunDiscreteScheduler,  # repeats timesteps
    "PNDM": lambda **o: diffusers.PNDMScheduler(skip_prk_steps=True, **o),  # repeats one, no index
    "DPM++ 2M": diffusers.DPMSolverMultistepScheduler,
    "DPM2": diffusers.KDPM2DiscreteScheduler,  # two evaluations a step
    "LCM": diffusers.LCMScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "DDPM": diffusers.DDPMScheduler,
}


def _make(name: str):
    scheduler = SCHEDULERS[name](num_train_timesteps=1000)
    pipe, call = tiny_pipelines.sd15(scheduler)
    return pipe, {**call, "num_inference_steps": 5}


def _guided_calls(sizes: list[int]) -> list[int]:
    """Numbers of the pipeline's calls ([uncond, cond]: 2 rows) that an extra forward (1 row)
    followed."""
    numbers, count = [], -1
    for size in sizes:
        if size == 2:
            count += 1
        else:
            numbers.append(count)
    return numbers


@pytest.mark.parametrize("name", SCHEDULERS)
def test_window_acts_at_the_steps_that_counting_the_loop_gives(name):
    pipe, call = _make(name)
    with attach(pipe, GUIDE) as session, forwards(pipe.unet) as sizes:
        for _ in range(2):  # and again in the second call of the same pipeline
            tiny_pipelines.render(pipe, call)
    total = len(pipe.scheduler.timesteps)
    due = [n for n in range(total) if total <= 4 * n < 3 * total]
    assert sizes.count(2) == 2 * total
    assert _guided_calls(sizes) == due + [total + n for n in due]
    assert list(session.report().controls[0].steps.values()) == [due, due]


@pytest.mark.parametrize("name", ["DDIM", "Heun", "PNDM", "DPM++ 2M", "UniPC", "DPM2"])
def test_multi_order_schedulers_draw_what_the_explicit_loop_draws(name):
    pipe, call = _make(name)
    call["latents"] = tiny_loops.start("sd15")
    scheduler = copy.deepcopy(pipe.scheduler)
    with attach(pipe, GUIDE):
        got = tiny_pipelines.render(pipe, call)
    expected = tiny_loops.batched(
        pipe.unet, scheduler, call, call["latents"], MID, 2.0, lambda n, t: t <= 4 * n < 3 * t
    )
    close(got, expected, 2e-5)  # a multistep solver adds up several predictions' rounding


def test_flow_match_heun():
    pipe, call = tiny_pipelines.sd3(scheduler=diffusers.FlowMatchHeunDiscreteScheduler())
    control = SoftPAG("L1H1", window="0.3-0.7")
    with attach(pipe, control) as session, forwards(pipe.transformer) as sizes:
        tiny_pipelines.render(pipe, call)
    assert len(pipe.scheduler.timesteps) == 7
    assert _guided_calls(sizes) == [3, 4]  # 3/7 = 0.43, 4/7 = 0.57
    assert list(session.report().controls[0].steps.values()) == [[3, 4]]


@pytest.mark.parametrize(
    ("window", "due"),
    [
        ("0-0.25", [0]),
        ("0-0.26", [0, 1]),
        ("0.25-0.5", [1]),
        ("0.75-1", [3]),
        ("0-1", [0, 1, 2, 3]),
    ],
)
def test_progress_windows_on_a_run_of_four(window, due):
    pipe, call = tiny_pipelines.sd3()
    with attach(pipe, HeadGate("L0", gain=0.5, window=window)) as session:
        tiny_pipelines.render(pipe, call)
    assert list(session.report().controls[0].steps.values()) == [due]


@pytest.mark.parametrize("name", ["DDIM", "Euler", "Heun", "PNDM"])
def test_sigma_windows_use_the_noise_level_of_each_evaluation(name):
    pipe, call = _make(name)
    pipe.scheduler.set_timesteps(5)
    abar = pipe.scheduler.alphas_cumprod.double()
    # Written down from the definition: x = sqrt(abar) x0 + sqrt(1 - abar) noise.
    sigma = [float(((1 - abar[int(t)]) / abar[int(t)]).sqrt()) for t in pipe.scheduler.timesteps]
    high, low = sigma[1] * 1.01, sigma[-1] * 1.01
    due = [n for n, s in enumerate(sigma) if low <= s <= high]
    assert 0 < len(due) < len(sigma)
    with attach(pipe, HeadGate("L2", window=f"sigma {high:.6f}-{low:.6f}")) as session:
        tiny_pipelines.render(pipe, call)
    assert list(session.report().controls[0].steps.values()) == [due]


def test_under_zero_terminal_snr_the_first_step_is_above_every_sigma():
    pipe, call = _make("DDIM")
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **options)
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    call["num_inference_steps"] = 4
    with attach(pipe, HeadGate("L2", window="sigma 1e9-0")) as session:
        session.preview(4)
        tiny_pipelines.render(pipe, call)
    assert list(session.report().controls[0].steps.values()) == [[1, 2, 3]]


def test_sigma_window_of_a_flow_model():
    pipe, call = tiny_pipelines.flux()  # sigmas 1, 0.75, 0.5, 0.25
    with attach(pipe, HeadGate("L0", window="sigma 0.8-0.5")) as session:
        tiny_pipelines.render(pipe, call)
    assert list(session.report().controls[0].steps.values()) == [[1, 2]]


@pytest.mark.parametrize("name", ["DDIM", "Euler", "PNDM", "Heun"])
def test_img2img_starts_in_the_middle(name):
    base, call = _make(name)
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        **base.components, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in call.items() if k not in ("height", "width")}
    call |= {"image": torch.zeros(1, 3, 32, 32), "strength": 0.6, "num_inference_steps": 10}
    control = HeadGate("L2", gain=0.5, window="0.4-0.7")
    with attach(pipe, control) as session, forwards(pipe.unet) as sizes:
        tiny_pipelines.render(pipe, call)
    total = len(pipe.scheduler.timesteps)
    first = total - len(sizes)
    due = [n for n in range(first, total) if 0.4 <= n / total < 0.7]
    assert first > 0 and due
    assert list(session.report().controls[0].steps.values()) == [due]


def test_img2img_refuses_a_window_before_its_first_step():
    base, call = _make("DDIM")
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        **base.components, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in call.items() if k not in ("height", "width")}
    call |= {"image": torch.zeros(1, 3, 32, 32), "strength": 0.5, "num_inference_steps": 10}
    with pytest.raises(AttnControlError, match="holds no step.*progress 0.5 to 0.9"):
        with attach(pipe, HeadGate("L2", window="0-0.4")):
            tiny_pipelines.render(pipe, call)


def test_custom_timesteps_are_followed():
    pipe, call = tiny_pipelines.sd15(diffusers.EulerDiscreteScheduler())
    call["timesteps"] = [900, 400, 50]
    del call["num_inference_steps"]
    with attach(pipe, HeadGate("L2", window="0.3-1")) as session:
        tiny_pipelines.render(pipe, call)
    assert list(session.report().controls[0].steps.values()) == [[1, 2]]


def test_runs_of_different_length_follow_each_other():
    pipe, call = tiny_pipelines.sd3()
    with attach(pipe, HeadGate("L0", window="0.5-1")) as session:
        for steps in (4, 2, 6):
            tiny_pipelines.render(pipe, {**call, "num_inference_steps": steps})
    assert list(session.report().controls[0].steps.values()) == [[2, 3], [1], [3, 4, 5]]


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "Euler"])
def test_a_run_after_an_interrupted_one_starts_anew(name):
    pipe, call = _make(name)

    def stop(pipe, index, t, kwargs):
        pipe._interrupt = index == 1
        return {}

    with attach(pipe, HeadGate("L2", window="0-0.4")) as session:
        tiny_pipelines.render(pipe, {**call, "callback_on_step_end": stop})
        tiny_pipelines.render(pipe, call)
    first, second = session.report().controls[0].steps.values()
    total = len(pipe.scheduler.timesteps)
    assert first == [0, 1]
    assert second == [n for n in range(total) if n / total < 0.4]


def test_step_tells_where_the_sampler_is():
    pipe, call = tiny_pipelines.sd3()
    seen = []

    def look(pipe, index, t, kwargs):
        seen.append(session.step)
        return {}

    with attach(pipe, HeadGate("L0")) as session:
        assert session.step is None
        tiny_pipelines.render(pipe, {**call, "callback_on_step_end": look})
    assert [(s.index, s.total, s.progress) for s in seen] == [
        (0, 4, 0.0), (1, 4, 0.25), (2, 4, 0.5), (3, 4, 0.75),
    ]  # fmt: skip
    assert {s.branch for s in seen} == {("uncond", "cond")}
    assert [s.sigma for s in seen] == pytest.approx(pipe.scheduler.sigmas[:4].tolist())


def test_sd3_skip_layer_guidance_and_softpag_add_up():
    pipe, call = tiny_pipelines.sd3()
    call |= {
        "latents": tiny_loops.start("sd3"),
        "skip_guidance_layers": [1],
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0,
        "skip_layer_guidance_scale": 2.8,
    }
    scheduler, model = copy.deepcopy(pipe.scheduler), pipe.transformer
    with attach(pipe, SoftPAG("L0H1", scale=2.0)), forwards(model) as sizes:
        got = tiny_pipelines.render(pipe, call)
    assert sizes == [2, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1]  # main, perturbed, then skipped layers

    from tiny_oracle import attention

    scheduler.set_timesteps(4)
    latents = call["latents"]
    changes = {"transformer_blocks.0.attn": toward_identity((1,), 1.0)}
    with torch.no_grad():
        for number, t in enumerate(scheduler.timesteps):

            def predict(prefix="", latents=latents, t=t, **more):
                return model(
                    hidden_states=latents,
                    timestep=t.expand(1),
                    encoder_hidden_states=call[f"{prefix}prompt_embeds"],
                    pooled_projections=call[f"{prefix}pooled_prompt_embeds"],
                    **more,
                )[0]

            uncond, cond = predict("negative_"), predict()
            with attention(model, changes):
                perturbed = predict()
            prediction = uncond + 4.0 * (cond - uncond) + 2.0 * (cond - perturbed)
            if number > 0:
                prediction = prediction + 2.8 * (cond - predict(skip_layers=[1]))
            latents = scheduler.step(prediction, t, latents)[0]
    close(got, latents)


def _pag():
    base, call = tiny_pipelines.sd15()
    pipe = diffusers.StableDiffusionPAGPipeline(
        **base.components, requires_safety_checker=False, pag_applied_layers=["mid"]
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def test_a_pipeline_with_its_own_perturbed_rows_is_refused():
    pipe, call = _pag()
    with pytest.raises(AttnControlError, match="runs its own perturbed rows"):
        with attach(pipe, SoftPAG("L2")):
            tiny_pipelines.render(pipe, {**call, "pag_scale": 3.0})


def test_with_its_own_guidance_off_it_is_a_plain_pipeline():
    pipe, call = _pag()
    with attach(pipe, SoftPAG("L2")) as session:
        tiny_pipelines.render(pipe, {**call, "pag_scale": 0.0})
    assert session.report().controls[0].fired


def test_two_threads_with_a_pipeline_each():
    pipes = [tiny_pipelines.sd3() for _ in range(2)]
    control = SoftPAG("L1H1", scale=2.0, window="0-0.5")
    expected = []
    for seed, (pipe, call) in enumerate(pipes):
        with attach(pipe, control):
            expected.append(tiny_pipelines.render(pipe, call, seed))
    got: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        pipe, call = pipes[seed]
        for _ in range(3):
            with attach(pipe, control):
                got[seed] = tiny_pipelines.render(pipe, call, seed)

    _threads(work)
    for seed in range(2):
        assert torch.equal(got[seed], expected[seed])


@pytest.mark.parametrize("family", ["sd3", "flux_true_cfg"])
def test_two_threads_with_pipelines_that_share_a_model(family):
    model = tiny.sd3() if family == "sd3" else tiny.flux()
    make = tiny_pipelines.sd3 if family == "sd3" else tiny_pipelines.flux
    more = {} if family == "sd3" else {"true_cfg": True}
    pipes = [make(model, **more) for _ in range(2)]
    pipes[1][1]["num_inference_steps"] = 6
    control = SoftPAG("L1H1", scale=2.0, window="0-0.5")
    expected = []
    for seed, (pipe, call) in enumerate(pipes):
        with attach(pipe, control):
            expected.append(tiny_pipelines.render(pipe, call, seed))
    got: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        got[seed] = tiny_pipelines.render(*pipes[seed], seed)

    with attach(pipes[0][0], control):
        _threads(work)
    for seed in range(2):
        assert torch.equal(got[seed], expected[seed])


def _threads(work) -> None:
    errors: list[BaseException] = []

    def guarded(seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0)])
@pytest.mark.parametrize("same_scheduler", [True, False])
def test_two_pipelines_that_share_a_transformer_in_one_session(order, same_scheduler):
    one, call = tiny_pipelines.sd3()
    two, _ = tiny_pipelines.sd3(one.transformer, one.scheduler if same_scheduler else None)
    calls = [call, {**call, "guidance_scale": 1.0, "num_inference_steps": 3}]
    control = SoftPAG("L1H1", scale=2.0, window="0-0.5")
    expected = []
    for pipe, arguments in zip((one, two), calls, strict=True):
        with attach(pipe, control):
            expected.append(tiny_pipelines.render(pipe, arguments))
    with attach(one, control):  # two is not attached: its transformer is
        for n in order:
            assert torch.equal(tiny_pipelines.render((one, two)[n], calls[n]), expected[n])


def test_a_session_on_the_bare_model_inside_one_on_the_pipeline_keeps_the_pipelines_steps():
    pipe, call = tiny_pipelines.sd3()
    with attach(pipe.transformer, HeadGate("L0")):
        with attach(pipe, HeadGate("L1", window="0.5-1")) as session:
            tiny_pipelines.render(pipe, call)
        with attach(pipe.transformer, SoftPAG("L1")) as bare:  # the pipeline is no longer attached
            tiny_pipelines.render(pipe, call)
    assert list(session.report().controls[0].steps.values()) == [[2, 3]]
    assert bare.step.branch == ("cond", "cond")


def test_timesteps_rounded_to_bf16_are_recognised():
    pipe, call = tiny_pipelines.flux(tiny.flux().to(torch.bfloat16))
    call = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in call.items()}
    pipe.scheduler.set_begin_index = lambda index: None  # as in pipelines that do not call it
    with attach(pipe, HeadGate("L0", window="0-0.3")) as session:
        tiny_pipelines.render(pipe, {**call, "num_inference_steps": 7})
    assert list(session.report().controls[0].steps.values()) == [[0, 1, 2]]


def test_an_own_loop_at_other_timesteps_is_refused():
    pipe, call = tiny_pipelines.sd15()
    pipe.scheduler.set_timesteps(4)  # 751, 501, 251, 1
    with pytest.raises(AttnControlError, match="timestep 640, which is not among"):
        with torch.no_grad(), attach(pipe, HeadGate("L2")):
            pipe.unet(tiny_loops.start("sd15"), 640, call["prompt_embeds"])


class Sampler:
    """A user's class around the parts of a pipeline; unhashable, as dataclasses are."""

    __hash__ = None

    def __init__(self, pipe):
        self.transformer, self.scheduler = pipe.transformer, pipe.scheduler

    def predict(self, *args):
        return self.transformer(*args)[0]


def test_an_own_loop_over_the_pipelines_parts_is_followed():
    pipe, call = tiny_pipelines.sd3()
    sampler = Sampler(pipe)
    pipe._guidance_scale = 4.0  # what pipe.do_classifier_free_guidance reads
    pipe.scheduler.set_timesteps(4)
    latents = tiny_loops.start("sd3")
    with torch.no_grad(), attach(pipe, HeadGate("L0", window="0.5-1")) as session:
        for t in pipe.scheduler.timesteps:
            out = sampler.predict(
                torch.cat([latents] * 2),
                torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]]),
                torch.cat([call["negative_pooled_prompt_embeds"], call["pooled_prompt_embeds"]]),
                t.expand(2),
            )
            latents = pipe.scheduler.step(out[:1] + 4 * (out[1:] - out[:1]), t, latents)[0]
    assert list(session.report().controls[0].steps.values()) == [[2, 3]]
