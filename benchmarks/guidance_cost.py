"""What guidance costs: ``python benchmarks/guidance_cost.py [--device cuda] [--rounds 60]``.

Two triples of setup, benchmark and verify; a benchmark that does not verify is not one.

1. One step of `shapes-sd3` with SoftPAG (three rows) over one with classifier-free guidance alone
   (two rows): at most 1.55 x its time and 1.6 x its memory.
2. SoftPAG's own arithmetic over the attention that it modifies, at 4,096 tokens: under 5 %.

Times are ratios of neighbours in one interleaved run, and their median; with one thread, of
processor time. glibc is told to keep freed memory: by default it hands a step's larger blocks back
to the system and has them faulted in anew, which on so small a model costs as much as a tenth of a
step, more for three rows than for two (``--malloc default`` shows it).

Memory on a CPU is what the step's tensors hold at their highest, counted byte by byte as storages
come and go (the doctor's ``LiveBytes``): the resident memory of a process also holds the model, the
allocator's reserve and whatever ran before. On CUDA it is the allocator's own peak.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
from typing import Any

import diffusers
import torch
from timing import Row, report, side_by_side
from torch import Tensor

from attn_control import attach, zoo
from attn_control.call import Call
from attn_control.doctor.memory import LiveBytes, peak_bytes
from attn_control.kernels import Blend, Region
from attn_control.processors import NAG, SEG, SkipLayers, SoftPAG


def keep_freed_memory() -> bool:
    """Have glibc serve large blocks from the heap and never trim it. False on another libc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold, at = -1, -3, 1 << 30
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(trim_threshold, at) and libc.mallopt(mmap_threshold, at))


class Step:
    """One step of `shapes-sd3`: its denoiser on [negative, conditional], and the combine."""

    scale = 5.0
    controls = {
        "SoftPAG": SoftPAG("L3", batched=True),
        "SoftPAG, separate forward": SoftPAG("L3"),
        "SoftPAG, all heads": SoftPAG("all", u=0.5, batched=True),
        "SoftPAG ii_mass": SoftPAG("L3", op="ii_mass", tokens="image", batched=True),
        "SEG, sigma 2": SEG("L3", sigma=2.0, batched=True),
        "SkipLayers, separate forward": SkipLayers("L3"),
        "NAG": NAG(),
        "SoftPAG, fused": SoftPAG("L3", fused=True),
    }
    held_to = "SoftPAG"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.plain = self._pipe()
        self.guided = {name: self._pipe() for name in self.controls}
        with torch.no_grad():
            good, bad, pooled, poor = self.plain.encode_prompt(
                "a red circle left of a blue square", None, None, max_sequence_length=1
            )
        g = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 4, 32, 32, generator=g).to(device)
        self.arguments = {
            "hidden_states": latents.repeat(2, 1, 1, 1),
            "encoder_hidden_states": torch.cat([bad, good]),
            "pooled_projections": torch.cat([poor, pooled]),
            "timestep": self.plain.scheduler.timesteps[:1].expand(2).to(device),
            "return_dict": False,
        }

    def _pipe(self) -> Any:
        pipe: Any = zoo.load("shapes-sd3", device=self.device)
        pipe.scheduler.set_timesteps(25)
        pipe._guidance_scale = self.scale  # as inside the pipeline's own call
        return pipe

    def _step(self, pipe: Any) -> Tensor:
        uncond, cond = pipe.transformer(**self.arguments)[0].chunk(2)
        return uncond + self.scale * (cond - uncond)

    @torch.no_grad()
    def benchmark(self, rounds: int) -> list[Row]:
        # What three rows cost the stock model here: no control can be quicker, batched.
        three = {
            name: torch.cat([value, value[1:]]) if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }
        calls = {
            "cfg": lambda: self._step(self.plain),
            "three": lambda: self.plain.transformer(**three)[0],
        }
        sessions = []
        for name, pipe in self.guided.items():
            sessions.append(attach(pipe, self.controls[name]))
            calls[name] = lambda pipe=pipe: self._step(pipe)
        taken = side_by_side(calls, self.device, rounds)
        size = {name: peak_bytes(call, self.device)[0] for name, call in calls.items()}
        for session in sessions:
            session.close()
        rows = [
            Row("a CFG step", statistics.median(taken["cfg"]) * 1e3, "ms", None, "2 rows"),
            Row("a CFG step", size["cfg"] / 2**20, "MiB", None, "2 rows"),
        ]
        ratio = statistics.median(b / a for a, b in zip(taken["cfg"], taken["three"], strict=True))
        rows.append(Row("time of three stock rows", ratio, "x CFG", None, "no control, no combine"))
        for name in self.controls:
            ratio = statistics.median(b / a for a, b in zip(taken["cfg"], taken[name], strict=True))
            bars = (1.55, 1.6) if name == self.held_to else (None, None)
            how = f"median of {rounds} pairs"
            rows.append(Row(f"time of a step with {name}", ratio, "x CFG", bars[0], how))
            how = "allocator's peak" if self.device.type == "cuda" else "peak of live storages"
            share = size[name] / size["cfg"]
            rows.append(Row(f"memory of a step with {name}", share, "x CFG", bars[1], how))
        return rows

    @torch.no_grad()
    def verify(self) -> None:
        plain = self._step(self.plain)
        for name, pipe in self.guided.items():
            assert torch.equal(self._step(pipe), plain), "not restored"
            with attach(pipe, self.controls[name], strict=True):
                assert not torch.equal(self._step(pipe), plain), f"{name} did nothing"
        pipe, seen = self.guided[self.held_to], []
        hook = pipe.transformer.pos_embed.register_forward_pre_hook(
            lambda _, args: seen.append(len(args[0]))
        )
        with attach(pipe, self.controls[self.held_to]):
            self._step(pipe)
        hook.remove()
        assert seen == [3], f"three rows against two, got {seen}"
        with LiveBytes() as held:
            a = torch.ones(1000, dtype=torch.float32)
            b = a.view(10, 100) + 1
            del b
            c = a * 2  # noqa: F841
        assert held.peak == 8000, "the counting of bytes is wrong"


class OwnCost:
    """The closed form of SoftPAG after a softmax over 4,096 tokens, on all of its heads."""

    tokens, head_dim, strength = 4096, 64, 0.4

    def __init__(self, device: torch.device) -> None:
        self.device = device
        heads = 24 if device.type == "cuda" else 4
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        g = torch.Generator().manual_seed(0)
        shape = (1, heads, self.tokens, self.head_dim)
        q, k, v = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(3))

        def original() -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        self.call = Call(None, "main", q, k, v, None, None, original)  # type: ignore[arg-type]
        u = torch.full((heads,), self.strength, device=device)
        self.blend = Blend(Region(None, tuple(range(heads)), ((0, None),)), u)

    @torch.no_grad()
    def benchmark(self, rounds: int) -> list[Row]:
        out = self.call.original()
        rounds = max(5, rounds // 5)
        calls = {"attention": self.call.original, "blend": lambda: self.blend(out, self.call)}
        taken = side_by_side(calls, self.device, rounds)
        ratio = statistics.median(
            b / a for a, b in zip(taken["attention"], taken["blend"], strict=True)
        )
        shape = "x".join(map(str, self.call.q.shape))
        note = f"{shape} {str(out.dtype).removeprefix('torch.')}; median of {rounds} interleaved"
        return [Row("SoftPAG over its attention, 4,096 tokens", 100 * ratio, "%", 5.0, note)]

    def verify(self) -> None:
        rows = slice(1000, 1064)
        q, k, v = (t[:, 1].double() for t in (self.call.q, self.call.k, self.call.v))
        a = (q[:, rows] @ k.mT * self.head_dim**-0.5).softmax(-1)
        eye = torch.eye(self.tokens, dtype=a.dtype, device=a.device)[rows]
        expected = ((1 - self.strength) * a + self.strength * eye) @ v
        got = self.blend(self.call.original(), self.call)[:, 1, rows].double()
        tolerance = 1e-5 if self.call.q.dtype == torch.float32 else 2e-2
        assert (got - expected).abs().max() < tolerance, "not the dense softmax"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep")
    options = parser.parse_args()
    device = torch.device(options.device)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    kept = options.malloc == "keep" and device.type == "cpu" and keep_freed_memory()
    print("freed memory is", "kept" if kept else "given back as usual")
    rows: list[Row] = []
    for triple in (Step, OwnCost):
        subject = triple(device)
        subject.verify()
        rows += subject.benchmark(options.rounds)
        subject.verify()
    name = "guidance_cost" if options.malloc == "keep" else "guidance_cost_default_malloc"
    report(name, rows, device)


if __name__ == "__main__":
    main()
