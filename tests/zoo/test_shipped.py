"""The shipped folders under a stock, offline diffusers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attn_control import zoo
from attn_control.zoo.prompts import spread

MODELS = Path(zoo.__file__).parent / "models"
# The pipeline, its denoiser's attribute and class.
PARTS = {
    "shapes-sd3": ("StableDiffusion3Pipeline", "transformer", "SD3Transformer2DModel"),
    "shapes-sd15": ("StableDiffusionPipeline", "unet", "UNet2DConditionModel"),
    "shapes-flux": ("FluxPipeline", "transformer", "FluxTransformer2DModel"),
    "shapes-wan": ("WanPipeline", "transformer", "WanTransformer3DModel"),
}
CAPTIONS = dict.fromkeys(PARTS, "a red circle") | {"shapes-wan": "a red circle moves right"}

pytestmark = pytest.mark.skipif(not MODELS.is_dir(), reason="no weights in this checkout")


def files(name):
    return [file for file in (MODELS / name).rglob("*") if file.is_file()]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_folder_is_small_and_complete(name):
    assert sum(f.stat().st_size for f in files(name)) <= 12e6
    assert {f.suffix for f in files(name)} <= {".json", ".safetensors", ".md", ".txt"}
    assert not [f for f in files(name) if ".fp16." in f.name]
    index = json.loads((MODELS / name / "model_index.json").read_text())
    pipeline, part, denoiser = PARTS[name]
    assert index["_class_name"] == pipeline and index[part] == ["diffusers", denoiser]
    assert (MODELS / name / "README.md").is_file()


def test_all_folders_together_are_small():
    assert {folder.name for folder in MODELS.iterdir()} == set(zoo.NAMES)
    assert sum(f.stat().st_size for name in zoo.NAMES for f in files(name)) <= 40e6


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_plain_from_pretrained_loads_and_renders_without_a_network(name):
    pipeline, part, _ = PARTS[name]
    call = zoo.defaults(name) | {"num_inference_steps": 2}
    if name == "shapes-sd3":
        call.pop("max_sequence_length")  # the stock default must do, too
    code = f"""
import socket, torch
def refuse(*a, **k): raise OSError("no network in this test")
socket.socket.connect = refuse
socket.create_connection = refuse
from diffusers import {pipeline}
pipe = {pipeline}.from_pretrained({str(MODELS / name)!r})
assert {{m.dtype for m in (pipe.{part}, pipe.vae, pipe.text_encoder)}} == {{torch.float32}}
out = pipe({CAPTIONS[name]!r}, **{call!r})
print(out.images[0].size if hasattr(out, "images") else out.frames[0].shape)
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-2000:]
    size = "(17, 128, 128, 3)" if name == "shapes-wan" else "(128, 128)"
    assert out.stdout.strip().endswith(size)
    assert "truncated" not in out.stderr


@pytest.mark.parametrize("name", zoo.NAMES)
def test_denoisers_have_at_most_five_million_parameters(name):
    denoiser = getattr(zoo.load(name), PARTS[name][1])
    assert 1e6 <= sum(p.numel() for p in denoiser.parameters()) <= 5e6


def test_shapes_sd3_has_256_image_tokens_and_normalises_its_queries():
    pipe = zoo.load("shapes-sd3")
    assert (128 // pipe.vae_scale_factor // pipe.transformer.config.patch_size) ** 2 == 256
    assert pipe.transformer.transformer_blocks[0].attn.norm_q is not None


def test_the_silent_t5_is_what_the_pipeline_does_without_one():
    pipe = zoo.load("shapes-sd3")
    call = {"prompt": "a red ring", "prompt_2": None, "prompt_3": None, "max_sequence_length": 1}
    with torch.no_grad():
        with_t5 = pipe.encode_prompt(**call)[0]
        parts = {**pipe.components, "text_encoder_3": None, "tokenizer_3": None}
        without = type(pipe)(**parts).encode_prompt(**call)[0]
    assert with_t5.shape == (1, 17, 128)
    assert torch.equal(with_t5, without)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name != "shapes-wan"])
def test_it_draws_what_it_is_told(name):
    rows = [r for r in zoo.load_prompts(name) if r["split"] == "seen" and r["objects"] == 1]
    pipe, call = zoo.load(name), zoo.defaults(name)
    call["true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"] = 3.0
    right = []
    for row in spread([row for row in rows if not row.get("reference")], 8):
        generator = torch.Generator().manual_seed(row["seed"])
        image = pipe(row["prompt"], generator=generator, **call).images[0]
        right.append(zoo.score(name, image, row["prompt"]).right)
    assert sum(right) >= 5, right
