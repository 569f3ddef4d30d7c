"""Kernels compiled for machines that are not here: what a launch at real shapes would compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attn_control.kernels.triton import backward, forward
from attn_control.kernels.triton.launch import Extras, Walk, arguments, empty_out
from attn_control.kernels.triton.lists import lower, turned
from attn_control.kernels.triton.tune import Tile, side, tiles
from attn_control.masks.settle import settle

TARGETS = {
    **{f"sm_{cap}": GPUTarget("cuda", cap, 32) for cap in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS: dict[str, Callable[..., Any]] = {
    "forward": forward.forward,
    "of_queries": backward.of_queries,
    "of_keys": backward.of_keys,
}
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
}


OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Shape:
    """A call of a real model: Flux at 1024 x 1024 pixels by default."""

    batch: int = 1
    heads: int = 24
    tokens: int = 4608
    dim: int = 128
    block: int = 128
    dtype: torch.dtype = torch.bfloat16


def launch(
    kernel: str, shape: Shape, target: str, tile: Tile | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and constants of a launch over a mask with whole and with cut tiles; tensors of
    tokens are on no device, and take no memory.
    """
    by_keys = kernel == "of_keys"
    half = shape.dtype != torch.float32
    tile = tile or getattr(tiles(shape.dim, half, target), kernel)
    tile = tile._replace(m=side(shape.block, tile.m), n=side(shape.block, tile.n))
    blocks = -(-shape.tokens // shape.block)
    cells = torch.ones(1, 1, blocks, blocks, dtype=torch.int32)
    cells[..., 0] = 2
    bits = torch.zeros(1, shape.block, -(-shape.block // 32), dtype=torch.int32)
    bits[:, 0] = 1
    grid = dict(q_block=shape.block, k_block=shape.block)
    mask = settle(cells, bits, **grid, q_regions=(shape.tokens,), k_regions=(shape.tokens,))
    walk = Walk(lower(turned(mask) if by_keys else mask, tile.n), 1, 1, tile)
    whole = shape.batch, shape.heads, shape.tokens, shape.dim
    q, k, v, grad = (
        empty_out(torch.empty(whole, dtype=shape.dtype, device="meta")) for _ in range(4)
    )
    sums = torch.empty(whole[:3], device="meta")
    tensors, strided = {
        "forward": ((q, k, v, q, sums), (q,)),
        "of_queries": ((q, k, v, grad, sums, sums, q), (grad, q)),
        "of_keys": ((q, k, v, grad, sums, sums, k, v), (grad, k)),
    }[kernel]
    scale = shape.dim**-0.5
    none = Extras(None, None, None)
    _, args, constants = arguments(walk, none, q, k, v, tensors, strided, scale, by_keys=by_keys)
    return args, constants


def compile_for(
    target: str, function: Any, args: tuple[Any, ...], constants: dict[str, Any]
) -> Any:
    """triton's CompiledKernel, specialised as a launch would be: on integers that are 1 or
    multiples of 16, and on pointers that are aligned, as an allocator's are.
    """
    options = {name: constants[name] for name in OPTIONS}
    fixed = {name: value for name, value in constants.items() if name not in options}
    signature, attrs = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
            continue
        value = args[place]
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attrs[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], fixed[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
            if value % 16 == 0:
                attrs[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, fixed, attrs)
    return triton.compile(source, target=TARGETS[target], options=options)
