"""Silence heads through diffusers' own set_attn_processor, without attach.

python examples/set_processors.py --model stabilityai/stable-diffusion-3.5-medium --heads L3H1
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from attn_control import zoo
from attn_control.processors import HeadGate

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="stabilityai/stable-diffusion-3.5-medium", help="or zoo")
parser.add_argument("--prompt", default="a red circle on a white background")
parser.add_argument("--heads", default="L3H1")
parser.add_argument("--out", default="silenced.png")
args = parser.parse_args()

options = {}
if args.model == "zoo":
    pipe, options = zoo.load("shapes-sd3"), zoo.defaults("shapes-sd3")
else:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to(device)

before = pipe.transformer.attn_processors
pipe.transformer.set_attn_processor(HeadGate(args.heads, gain=0.0).processors(pipe.transformer))
image = pipe(args.prompt, generator=torch.Generator("cpu").manual_seed(0), **options).images[0]
pipe.transformer.set_attn_processor(before)
image.save(args.out)
