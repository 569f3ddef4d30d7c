"""The zoo's lessons at toy size, and something to learn for each."""

import torch

from attn_control.zoo.train import flux, latents, sd3, sd15, wan
from attn_control.zoo.train.__main__ import MODULES

TINY = {
    "shapes-sd3": sd3.Settings(
        steps=6, coarse_batch=4, fine_batch=2, fine_every=3, fine_from=0.6, width=64, layers=2,
        warmup=2, compile=False, zeros=0.5,
    ),
    "shapes-sd15": sd15.Settings(steps=6, batch=4, widths=(16, 32), warmup=2),
    "shapes-flux": flux.Settings(
        steps=6, coarse_batch=4, fine_batch=2, fine_every=3, fine_from=0.6, width=64, layers=(1, 1),
        warmup=2, compile=False, read_first=2,
    ),
    "shapes-wan": wan.Settings(
        steps=6, coarse_batch=2, fine_batch=1, fine_every=3, fine_from=0.6, width=32, layers=2,
        warmup=2, compile=False, read_first=2, few=0.5, few_batch=3, few_frames=2,
    ),
}  # fmt: skip


def examples(name: str) -> latents.Latents:
    """Random latents with captions that the model's tokenizers know."""
    g = torch.Generator().manual_seed(0)
    if name == "shapes-wan":
        moving = ["a red circle moves left", "a blue cross moves up behind a red square"] * 2
        return latents.Latents(torch.randn(4, 4, 3, 16, 16, generator=g).half(), moving)
    captions = ["a red circle", "a blue ring above a cyan cross on a gray background"] * 4
    captions += ["a red circle with the texture of the reference"] * 8
    targets, references = torch.randn(2, 16, 4, 32, 32, generator=g).half()
    return latents.Latents(targets, captions, references)


assert set(TINY) == set(MODULES)
