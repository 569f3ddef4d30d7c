"""examples/train_long_video_lora.py: gradients through its mask, a whole run of a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig
from tiny_oracle import attention
from tiny_zoo import export_tiny

from attn_control import AttnControlError, attach

FILE = Path(__file__).parent.parent / "examples" / "train_long_video_lora.py"
SMALL = "--frames 5 --clips 3 --held-out 2 --steps 6 --rate 0.01 --rank 4 --prompts 1"
SMALL += " --sampling-steps 2"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_long_video_lora", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def eq4_with_a_sink(frames: int, tokens: int, decay: float) -> torch.Tensor:
    """Who reads whom, bool (frames * tokens,) * 2: Eq. 4 of the paper and the first frame."""
    on = torch.zeros(frames, tokens, frames, tokens, dtype=torch.bool)
    places = torch.arange(tokens)
    for i in range(frames):
        for j in range(frames):
            width = decay * tokens / 2 ** math.floor(math.log2(max(abs(i - j), 1)))
            on[i, :, j] = (places[:, None] - places).abs() + 1 <= (width if j else tokens)
    return on.reshape(frames * tokens, -1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_lora_are_those_of_dense_attention_masked_by_hand(checkpointing):
    frames, side = 6, 8
    on = eq4_with_a_sink(frames, side * side, 0.5)
    assert 0.3 < on.float().mean() < 0.8
    module, model = script(), tiny.wan().requires_grad_(False).train()
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, target_modules=module.TARGETS, init_lora_weights=False))
    if checkpointing:
        model.enable_gradient_checkpointing()
    g = torch.Generator().manual_seed(2)
    x, noise = torch.randn(2, 2, 4, frames, 2 * side, 2 * side, generator=g)
    example = x, torch.randn(2, 6, 16, generator=g), torch.tensor([0.3, 0.8]), noise
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 2 * 4 and all("lora" in name for name in names)

    def gradients() -> torch.Tensor:
        model.zero_grad()
        module.loss_of(model, *example).backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    def masked(a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (a * on / (a * on).sum(-1, keepdim=True)) @ v

    control = module.mask(module.options(["--out", "none"]))
    with attach(model, replace(control, revision="paper", sink=True, decay_factor=0.5)) as session:
        got = gradients()
    assert session.report().controls[0].sites.keys() == {"transformer.blocks.1.attn1"}
    with attach(model, session.controls[0]), torch.autocast("cpu", torch.bfloat16):
        rounded = gradients()
    dense = gradients()
    model.disable_gradient_checkpointing()  # the oracle knows no second forward
    with attention(model, {"blocks.1.attn1": masked}):
        expected = gradients()
    largest = expected.abs().max()
    assert (got - expected).abs().max() < 1e-5 * largest
    assert (dense - expected).abs().max() > 5e-3 * largest
    assert torch.cosine_similarity(rounded, expected, 0) > 0.999


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("zoo"), "shapes-wan")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    return {name: p.detach() for name, p in named.items() if "lora" not in name}


def test_a_run_learns_through_the_mask_and_goes_on_where_it_was_left(
    model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(model_folder))
    module, made = script(), []
    step = module.Arm.step

    class Kept(module.Arm):
        def __init__(self, *args: Any):
            super().__init__(*args)
            made.append(self)

        def step(self, *args: Any) -> None:
            if broken and len(self.losses) == 5:
                raise KeyboardInterrupt
            step(self, *args)

    module.Arm, module.SAVE_EVERY, broken = Kept, 3, True
    call = ["--out", str(tmp_path / "run"), *SMALL.split()]
    with pytest.raises(KeyboardInterrupt):
        module.main(call)
    broken = False
    module.main(call)  # from step 3 on
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "results.json").read_text())

    straight = module.options(["--out", str(tmp_path / "straight"), *SMALL.split()])
    straight.out.mkdir()
    training = module.train(straight, module.encode(straight))
    for name in module.ARMS:
        assert len(training[name]["losses"]) == len(training[name]["seconds"]) == 6
        assert found["training"][name]["losses"] == training[name]["losses"]
    assert training["dense"]["losses"] != training["radial"]["losses"]

    stock = weights(module.load().transformer)
    for arm in made:
        own = weights(arm.model)
        assert own.keys() == stock.keys()
        assert all(torch.equal(own[name], stock[name]) for name in stock)
        lora = [p for name, p in arm.model.named_parameters() if "lora_B" in name]
        assert len(lora) == 16 and all(p.abs().max() > 0 for p in lora)  # they begin at zero

    cells = {(cell["tuned"], cell["runs"]): cell for cell in found["cells"]}
    losses = {key: np.mean(cell["losses"]) for key, cell in cells.items()}
    assert len(losses) == 6
    for name in module.ARMS:
        assert losses[name, name] < 0.98 * losses["no", name]
    assert cells["no", "dense"]["computed"] == 1 > cells["no", "radial"]["computed"]
    rows = re.findall(r"^\| (\w+) \| (dense|radial) \|.* \| (.*?) \|$", told, re.M)
    assert [row[:2] for row in rows] == list(cells)
    assert all(row[2] in ("0 of 1", "1 of 1") for row in rows)
    assert "median of 6 pairs in turns" in told
    assert len(list((tmp_path / "run").glob("*.mp4"))) == 6

    with pytest.raises(AttnControlError, match="run of other settings.*'rank': 4.*'rank': 8"):
        module.main([*call, "--rank", "8"])


def test_what_was_saved_is_what_was_learnt(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_CONTROL_ZOO_DIR", str(model_folder))
    module = script()
    args = module.options(["--out", str(tmp_path), *SMALL.split(), "--steps", "1"])
    arms = []
    module.Arm = type("Kept", (module.Arm,), {"state": lambda self: arms.append(self) or {}})
    data = module.encode(args)
    module.train(args, data)
    example = module.batch(data, 7, args)
    for name, arm in zip(module.ARMS, arms, strict=True):
        pipe = module.load()
        plain = module.loss_of(pipe.transformer, *example)
        pipe.load_lora_weights(tmp_path / name)
        loaded = module.loss_of(pipe.transformer, *example)
        torch.testing.assert_close(loaded, module.loss_of(arm.model, *example).detach())
        assert abs(loaded - plain) > 1e-4


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match=r"attn-control\[train\]"):
        script()


def test_says_what_is_wrong_with_an_option(capsys):
    module = script()
    for given, said in (
        ("--steps 0", "expected steps of 1 or more, got 0"),
        ("--frames 32", "expected an odd number of frames, 5 or more, got 32"),
    ):
        with pytest.raises(SystemExit):
            module.options(["--out", "x", *given.split()])
        assert said in capsys.readouterr().err


def test_quick_changes_defaults_only():
    module = script()
    args = module.options(["--out", "x", "--quick", "--steps", "7"])
    assert args.steps == 7 and args.clips == module.QUICK["clips"]
    assert module.options(["--out", "x"]).clips > args.clips
