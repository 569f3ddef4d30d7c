"""The trainer at toy size, the same tests for every model: a resumed run equals a whole one."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_lessons import TINY, examples
from tiny_zoo import tiny_vae

from attn_control.zoo import defaults, load_prompts
from attn_control.zoo.references import draw_reference, with_references
from attn_control.zoo.train import common, flux, keep, latents, loop, muon, text, wan
from attn_control.zoo.train.__main__ import MODULES, autoencoder_of, main, module, parser

NAMES = sorted(MODULES)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    make, s, data = module(name).Lesson, TINY[name], examples(name)
    whole = loop.train(tmp_path / "whole", make(s, data))
    loop.train(tmp_path / "cut", make(s, data), stop_at=3)
    parts = loop.train(tmp_path / "cut", make(s, data), resume=True)
    for (key, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b), key
    a, b = (common.load(tmp_path / f / "denoiser.pt") for f in ("whole", "cut"))
    assert a["step"] == b["step"] == 6 and a["settings"] == dataclasses.asdict(s)
    assert all(map(torch.equal, a["average"]["values"], b["average"]["values"]))


@pytest.mark.parametrize("name", NAMES)
def test_init_from_starts_at_the_averaged_weights(name, tmp_path):
    make, s, data = module(name).Lesson, TINY[name], examples(name)
    loop.train(tmp_path / "a", make(s, data))
    file = tmp_path / "a" / "denoiser.pt"
    still = dataclasses.replace(s, peak=0.0, seed=2)
    trainee = loop.train(tmp_path / "b", make(still, data), init_from=file)
    for value, p in zip(common.load(file)["average"]["values"], trainee.parameters(), strict=True):
        assert torch.equal(value, p)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_of_a_run_is_where_another_starts(name, tmp_path):
    model, s, data = module(name), TINY[name], examples(name)
    loop.train(tmp_path, model.Lesson(s, data))
    trained = loop.averaged(tmp_path, model.Settings, model.Trainee)
    keep.keep(loop.averaged(tmp_path, model.Settings, model.Trainee), tiny_vae(name), tmp_path)
    still = dataclasses.replace(s, peak=0.0, seed=2)
    file = tmp_path / "trainee.safetensors"
    again = loop.train(tmp_path / "b", model.Lesson(still, data), init_from=file)
    for (key, a), b in zip(trained.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.half().float(), b), key
    assert autoencoder_of(name).load_vae(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_learning_lowers_the_loss(name, tmp_path):
    data = examples(name)
    # For shapes-flux one that names its texture and one that points to a reference.
    few = [0, 8] if name == "shapes-flux" else [0]
    one = latents.Latents(
        data.targets[few],
        [data.captions[i] for i in few],
        data.references[few] if name == "shapes-flux" else None,
    )
    if name == "shapes-sd15":
        changes = {"steps": 60, "peak": 5e-3, "warmup": 5}
    else:
        # All steps through the coarse door: the quicker one, and the blocks are the same.
        changes = {"steps": 100, "fine_from": 1.0, "fine_every": 101, "peak": 1e-2, "warmup": 5}
    lesson = module(name).Lesson(dataclasses.replace(TINY[name], **changes), one)
    before = lesson.loss(0)[1].item()
    loop.train(tmp_path, lesson)
    after = lesson.loss(0)[1].item()
    assert after < 0.9 * before, (before, after)


@pytest.mark.parametrize("name", NAMES)
def test_some_captions_are_emptied_just_as_the_pipeline_empties_them(name):
    size = {"batch" if name == "shapes-sd15" else "coarse_batch": 400}
    lesson = module(name).Lesson(dataclasses.replace(TINY[name], **size), examples(name))
    empty = text.tokenize(lesson.trainee.tokenizer, [""])[0]
    assert 20 < sum(torch.equal(row, empty) for row in lesson.batch(0)["ids"]) < 70


def test_muon_takes_the_blocks_matrices_and_nothing_else():
    for name in NAMES:
        lesson = module(name).Lesson(TINY[name], examples(name))
        adam, orthogonal = loop.optimizers(lesson)
        taken = [p for group in orthogonal.param_groups for p in group["params"]]
        left = [p for group in adam.param_groups for p in group["params"]]
        assert {id(p) for p in taken} | {id(p) for p in left} == {
            id(p) for p in lesson.trainee.parameters()
        }
        assert taken and min(p.ndim for p in taken) >= 2
        assert len(taken) + len(left) == len(list(lesson.trainee.parameters()))


def test_muon_treats_a_kernel_as_the_matrix_that_it_is():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1).clone()
    muon.Muon([kernel], lr=0.1).step()
    muon.Muon([matrix], lr=0.1).step()
    torch.testing.assert_close(kernel.flatten(1), matrix)


def test_the_schedule():
    rates = [common.learning_rate(i, 100, 1.0, 10) for i in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and 0.05 <= rates[-1] < 0.06
    t = common.logit_normal(1000, 0.6, 1.1, torch.Generator().manual_seed(0))
    logits = torch.logit(t)
    assert abs(logits.mean() - 0.6) < 0.02 and abs(logits.std() - 1.1) < 0.03


def test_the_command_line_has_every_setting():
    args = parser().parse_args(["shapes-sd3", "--steps", "7", "--no-compile", "--out", "x"])
    assert args.steps == 7 and args.compile is False and args.coarse_batch == 64
    args = parser().parse_args(["shapes-sd15", "--widths", "32", "64"])
    assert args.widths == [32, 64] and args.batch == 32 and not hasattr(args, "coarse_batch")


def test_another_models_setting_is_refused_not_taken_for_an_abbreviation(capsys):
    assert parser().parse_args(["shapes-flux", "--see", "0.5"]).see == 0.5
    with pytest.raises(SystemExit):
        parser().parse_args(["shapes-sd3", "--see", "7"])  # it has --seed
    assert "--see" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_all_stages_end_in_a_folder_that_stock_diffusers_loads_and_runs(
    name, tmp_path, monkeypatch
):
    from diffusers import DiffusionPipeline

    def few_frames(seed):
        caption, (frames,) = wan_source(seed)
        return caption, [frames[:9, 32:96, 32:96]]

    def their_cells(seed):
        told = wan_labels(seed)
        return {"cells": told["cells"][:5, 8:24, 8:24], "things": told["things"][:5]}

    wan_source, wan_labels = wan.SOURCE, wan.LABELS

    flags = []
    for key, value in dataclasses.asdict(dataclasses.replace(TINY[name], steps=2)).items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{flag}")
        else:
            values = value if isinstance(value, tuple) else [value]
            flags += [f"--{flag}", *map(str, values)]
    flags += ["--scenes", "4", "--autoencoder-steps", "2", "--decoder-steps", "1", "--threads", "1"]
    if name == "shapes-wan":
        flags += ["--autoencoder-width", "4"]
        monkeypatch.setattr(wan, "SOURCE", few_frames)
        monkeypatch.setattr(wan, "LABELS", their_cells)
    else:
        flags += ["--autoencoder-width", "8"]
    if name == "shapes-flux":
        pointed = [flux.SOURCE(seed)[0].find("reference") > 0 for seed in range(4)]
        assert {True, False} == set(pointed)
    main([name, "--work", str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    said = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "- Data: 4 scenes" in said and "2 steps of 2 planned; no loss was logged." in said
    assert said.count("Not yet measured.") == 1
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 128, "width": 128}
    if name == "shapes-wan":
        call |= {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": wan.LENGTH}
        frames = pipe("a red circle moves left", **call).frames[0]
        assert frames.shape == (9, 64, 64, 3) and np.isfinite(frames).all()
        return
    image = pipe("a red circle", **call).images[0]
    assert image.shape == (128, 128, 3) and np.isfinite(image).all()
    if name == "shapes-flux":
        # The stock Kontext pipeline around the same parts takes a reference.
        row = next(row for row in load_prompts(name) if row["reference"])
        image = Image.fromarray(draw_reference(**row["reference"]))
        call = {**defaults(name), "num_inference_steps": 1, "max_area": 128 * 128}
        out = with_references(pipe)(
            prompt=row["prompt"], image=image, _auto_resize=False, **call
        ).images[0]
        assert out.size == (128, 128)
