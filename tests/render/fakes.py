"""Stand-ins that are quick: a pipeline that paints noise, a session that does nothing, a zoo."""

from __future__ import annotations

import json
import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from attn_control.errors import AttnControlError

JOB = """\
model: shapes-sd3
prompts: [a red circle, a blue square]
seeds: 0-1
sampler: {num_inference_steps: 3, height: 32, width: 32}
variants:
  plain: {sampler: {guidance_scale: 1.0}}
  cfg: {}
  soft:
    controls:
      - SoftPAG: {heads: L1H0, u: 0.5, scale: 2.0}
"""


class FakePipe:
    """Text-to-image from noise and guidance alone; counts its calls, can be told to fail."""

    vae_scale_factor = 8
    scheduler = types.SimpleNamespace()

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.before_call: Any = None

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def __call__(
        self,
        prompt: str | None = None,
        height: int = 32,
        width: int = 32,
        num_inference_steps: int = 4,
        guidance_scale: float = 3.0,
        negative_prompt: str | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        max_sequence_length: int = 32,
        clip_skip: int | None = None,
    ) -> Any:
        self.calls.append(dict(locals()))
        if self.before_call is not None:
            self.before_call(len(self.calls))
        noise = torch.rand((height, width, 3), generator=generator).numpy()
        pixels = np.clip(noise * 40 * guidance_scale, 0, 255).astype(np.uint8)
        return types.SimpleNamespace(images=[Image.fromarray(pixels)])


@dataclass
class FakeSession:
    """What attach returns; knows ten layers of two heads."""

    pipe: Any
    controls: tuple[Any, ...]
    log: list[str] = field(default_factory=list)
    fired: bool = True

    def preview(self, steps: int) -> Any:
        for control in self.controls:
            low, high = (float(part) for part in control.window.split("-"))
            due = [i for i in range(steps) if low <= i / steps and (i / steps < high or high == 1)]
            if not due:
                raise AttnControlError(
                    f"{control}: window {control.window!r} holds no step of {steps}"
                )
        extra = steps * len(self.controls)
        return types.SimpleNamespace(
            steps=steps, row_forwards=lambda rows: rows * steps + extra, exact=True
        )

    step = None  # where the sampler was last: nowhere, for nothing runs

    def report(self) -> Any:
        rows = [
            {"name": str(c), "fired": self.fired, "idle": None, "reason": "no call"}
            for c in self.controls
        ]
        return types.SimpleNamespace(to_dict=lambda: {"controls": rows})

    def close(self) -> None:
        self.log.append("closed")


def fake_attach(log: list[str], fired: bool = True) -> Any:
    def attach(pipe: Any, *controls: Any) -> FakeSession:
        for control in controls:
            if "L99" in control.heads:
                raise AttnControlError(f"{control}: 'L99' matches no site; the model has L0 to L9")
        log.append("attached " + " + ".join(map(str, controls)))
        return FakeSession(pipe, controls, log, fired)

    return attach


@dataclass(frozen=True)
class FakeScore:
    right: bool
    present: bool = True


def install_zoo(monkeypatch: Any, folder: Any) -> FakePipe:
    """Let attn_control.zoo know one quick model, whose scorer likes bright pictures."""
    from attn_control import zoo

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FakePipe"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    pipe = FakePipe()
    prompts = [
        {"prompt": f"prompt {i}", "objects": 1 + i % 2, "split": "seen" if i < 6 else "heldout"}
        for i in range(8)
    ]

    def load_prompts(name: str) -> list[dict[str, Any]]:
        if name != "shapes-sd3":
            raise AttnControlError(f"no fixed prompts for {name!r}; there are some for: shapes-sd3")
        return [dict(each, seed=1000 + i) for i, each in enumerate(prompts)]

    fakes = {
        "NAMES": ("shapes-sd3",),
        "path": lambda name: folder,
        "defaults": lambda name: {"num_inference_steps": 4, "guidance_scale": 3.0},
        "load": lambda name, *, device="cpu", dtype=None: pipe,
        "is_scorable": lambda name, caption: caption.startswith(("a ", "prompt ")),
        "score": lambda name, image, caption: FakeScore(bool(np.asarray(image).mean() > 30)),
        "load_prompts": load_prompts,
    }
    for key, value in fakes.items():
        monkeypatch.setattr(zoo, key, value, raising=False)
    return pipe
