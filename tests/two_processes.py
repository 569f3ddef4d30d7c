"""What one of two processes runs: each case of ``CASES`` under Ulysses context parallelism (gloo).

``python two_processes.py RANK STORE OUT`` writes {case: prediction or gradient} to OUT.
"""

from __future__ import annotations

import sys
from typing import Any

import tiny
import torch

from attn_control import attach
from attn_control.processors import NAG, SEG, HeadGate, SkipLayers, SoftPAG

CASES: dict[str, tuple[str, dict[str, Any], tuple[Any, ...]]] = {
    "idle": ("flux", {}, ()),
    "identity": ("flux", {}, (SoftPAG("L1H0, L2", u=0.6, scale=2.0),)),
    "uniform": ("flux", {}, (SoftPAG("L0-3", op="uniform", scale=2.0),)),
    "image tokens": ("flux", {}, (SoftPAG("L0-3", op="mean_query", tokens="image", scale=2.0),)),
    "text mass": ("flux", {}, (SoftPAG("L0-3", op="ii_mass", tokens="image", scale=2.0),)),
    "permuted": ("flux", {}, (SoftPAG("L1", op="permute", tokens="image", scale=2.0),)),
    "blurred": ("flux", {}, (SEG("L1", sigma=1.0, scale=2.0),)),
    "geodesic": ("flux", {}, (SoftPAG("L1", u=0.5, path="slerp", scale=2.0),)),
    "gate on text": ("flux", {}, (HeadGate("L1H1", gain=0.2, tokens="text"),)),
    "negative text": ("flux", {}, (NAG(scale=3.0),)),
    "layers": ("flux", {}, (SkipLayers("L1", scale=2.0),)),
    "video": ("wan", {}, (SoftPAG("L0-1", op="uniform", scale=2.0),)),
    "text of video": ("wan", {}, (HeadGate("L0.crossH1", gain=0.2, tokens="video"),)),
    "uneven": ("flux uneven", {"ulysses_anything": True}, (SoftPAG("L0-3", op="uniform"),)),
}


def make(kind: str) -> tuple[Any, dict[str, Any]]:
    family = kind.split()[0]
    call = {**tiny.inputs(family), "return_dict": False}  # diffusers' hooks know tuples only
    if kind == "flux":  # as many text tokens as two processes can share out
        g = torch.Generator().manual_seed(5)
        call["encoder_hidden_states"] = torch.randn(2, 6, 32, generator=g)
        call["txt_ids"] = torch.zeros(6, 3)
    return tiny.MODELS[family](), call


def predict(model: Any, call: dict[str, Any], controls: tuple[Any, ...]) -> torch.Tensor:
    with torch.no_grad(), attach(model, *controls) as session:
        prediction = model(**call)[0]
    assert all(record.fired for record in session.report().controls)
    return prediction


def gradient(model: Any, call: dict[str, Any]) -> torch.Tensor:
    """Of the guided prediction's squares, by the image: every token feeds every other."""
    call["hidden_states"].requires_grad_()
    with attach(model, SoftPAG("L0-3", op="uniform", scale=2.0)):
        model(**call)[0].square().sum().backward()
    return call["hidden_states"].grad


def main(rank: int, store: str, out: str) -> None:
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers counts accelerators, modulo none
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    results = {}
    for name, (kind, options, controls) in CASES.items():
        model, call = make(kind)
        config = ContextParallelConfig(**{"ulysses_degree": 2, **options})
        if name == "video":  # also when switched on with the session open
            with torch.no_grad(), attach(model, *controls):
                model(**call)
                model.enable_parallelism(config=config)
                results[name] = model(**call)[0]
            continue
        model.enable_parallelism(config=config)
        results[name] = predict(model, call, controls)
    model, call = make("flux")
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    results["gradient"] = gradient(model, call)
    torch.save(results, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
