"""Guide a pipeline by chosen heads: python examples/guide.py --model black-forest-labs/FLUX.1-dev

With --model zoo it runs on the model inside the package, without a download.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from attn_control import attach, zoo
from attn_control.processors import SoftPAG

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="hub id or zoo")
parser.add_argument("--prompt", default="a red circle left of a blue square on a white background")
parser.add_argument("--heads", default="L2", help="for example L38H18, L43H17 on FLUX")
parser.add_argument("--u", type=float, default=0.5)
parser.add_argument("--scale", type=float, default=1.0)
parser.add_argument("--out", default="guided.png")
args = parser.parse_args()

options = {}
if args.model == "zoo":
    pipe, options = zoo.load("shapes-sd3"), zoo.defaults("shapes-sd3")
else:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to(device)

with attach(pipe, SoftPAG(args.heads, u=args.u, scale=args.scale)) as session:
    image = pipe(args.prompt, generator=torch.Generator("cpu").manual_seed(0), **options).images[0]
print(session.report())
image.save(args.out)
