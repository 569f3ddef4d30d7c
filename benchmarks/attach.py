"""What attaching costs: ``python benchmarks/attach.py [--device cuda]``.

Two triples of setup, benchmark and verify; a benchmark that does not verify is not one.

1. attach and restore on 60 blocks: under 100 ms.
2. attached but idle, in microseconds a call x sites, over the step at 1,024 tokens: under 1 %.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from timing import Row, paired_difference, report, side_by_side

from attn_control import attach
from attn_control.processors import HeadGate, SoftPAG


def sd3_like(blocks: int, heads: int, head_dim: int) -> Any:
    """An SD3 with random weights."""
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=64,
        patch_size=2,
        in_channels=16,
        num_layers=blocks,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=64,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=64,
        qk_norm="rms_norm",
    ).eval()


def arguments(model: Any, side: int, text: int) -> dict[str, torch.Tensor]:
    """One call on side x side latents, so (side / 2) squared image tokens."""
    like = next(model.parameters())
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(like)

    return {
        "hidden_states": rand(1, 16, side, side),
        "encoder_hidden_states": rand(1, text, 64),
        "pooled_projections": rand(1, 64),
        "timestep": torch.full((1,), 500.0).to(like),
    }


class AttachRestore:
    """attach + close with one control on half of the sites of a 60-block model."""

    blocks = 60

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model = sd3_like(self.blocks, heads=2, head_dim=8).to(device)
        self.before = self.identities()
        self.control = SoftPAG("L0-29H0", u=0.5)

    def identities(self) -> list[tuple[int, int]]:
        processors = self.model.attn_processors.values()
        return [(id(type(self.model)), 0), *((id(p), id(type(p))) for p in processors)]

    def benchmark(self, rounds: int) -> list[Row]:
        def both() -> None:
            attach(self.model, self.control).close()

        spent = side_by_side({"both": both}, self.device, rounds)["both"]
        note = f"{self.blocks} blocks, one control on 30 sites; median of {rounds}"
        return [Row("attach and restore", statistics.median(spent) * 1e3, "ms", 100.0, note)]

    def verify(self) -> None:
        session = attach(self.model, self.control)
        assert len(session.sites) == self.blocks
        assert self.identities() != self.before, "nothing was attached"
        session.close()
        assert self.identities() == self.before, "not everything was restored"


class Bare:
    """A processor that does next to nothing: what an idle session adds is not lost in it."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)


def only_attention(model: Any) -> Any:
    """A model whose forward runs its sites' processors, one token each, and nothing else."""
    for block in model.transformer_blocks:
        block.attn.set_processor(Bare())
    token = torch.ones(1, 1, 1, 8)
    sites = [block.attn for block in model.transformer_blocks]

    def forward(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        out = [attn.processor(attn, token) for attn in sites]
        return (hidden_states + torch.cat(out).sum(),)

    model.forward = forward
    return model


class Idle:
    """What an idle session adds a site and call, all of it: the denoiser's own wrapper, the watched
    processor, the watched softmax. Set against one block of the width of SD3-medium.
    """

    sites, heads, head_dim, depth = 60, 24, 64, 24

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.plain = only_attention(sd3_like(self.sites, heads=1, head_dim=8))
        self.idle = only_attention(sd3_like(self.sites, heads=1, head_dim=8))
        self.few = arguments(self.plain, side=4, text=1)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.measured = self.depth if device.type == "cuda" else 1
        self.wide = sd3_like(self.measured, self.heads, self.head_dim).to(device, dtype)
        self.many = arguments(self.wide, side=64, text=77)  # 1,024 image tokens

    @torch.no_grad()
    def benchmark(self, rounds: int) -> list[Row]:
        rounds *= 20
        calls = {
            "plain": lambda: self.plain(**self.few),
            "idle": lambda: self.idle(**self.few),
        }
        with attach(self.idle):
            taken = side_by_side(calls, torch.device("cpu"), rounds)
        site = paired_difference(taken, "idle", "plain") / self.sites
        step = {"wide": lambda: self.wide(**self.many)}
        spent = side_by_side(step, self.device, max(3, rounds // 200))["wide"]
        block = statistics.median(spent) / self.measured
        dtype = str(next(self.wide.parameters()).dtype).removeprefix("torch.")
        size = f"width {self.heads * self.head_dim}, {dtype}, {self.measured} block(s)"
        how = f"{self.sites} sites, {rounds} interleaved pairs, median"
        return [
            Row("idle session, a site and call", site * 1e6, "us", None, how),
            Row("one block at 1,024 image tokens", block * 1e3, "ms", None, size),
            Row("idle over the step", 100 * site / block, "%", 1.0, "the first over the second"),
            Row("shortest block that keeps it so", 100 * site * 1e6, "us", None, "100 x the first"),
        ]

    @torch.no_grad()
    def verify(self) -> None:
        plain = self.plain(**self.few)[0]
        with attach(self.idle):
            assert torch.equal(self.idle(**self.few)[0], plain), "idle is not bit-identical"
        with attach(self.idle, HeadGate("all", gain=2.0)) as session:  # the path is the watched one
            assert not torch.equal(self.idle(**self.few)[0], plain)
        assert session.report().controls[0].calls == self.sites


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    device = torch.device(options.device)
    rows: list[Row] = []
    for triple in (AttachRestore, Idle):
        subject = triple(device)
        subject.verify()
        rows += subject.benchmark(options.rounds)
        subject.verify()
    report("attach", rows, device)


if __name__ == "__main__":
    main()
