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

from attn_control.kernels.triton import backward, dense, forward, probe
from attn_control.kernels.triton.launch import Epilogue, Extras, Walk, arguments, empty_out
from attn_control.kernels.triton.lists import lower, turned
from attn_control.kernels.triton.tune import Tile, side, tiles, wide
from attn_control.masks.settle import settle

TARGETS = {
    **{f"sm_{cap}": GPUTarget("cuda", cap, 32) for cap in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS: dict[str, Callable[..., Any]] = {
    "forward": forward.forward,
    "of_queries": backward.of_queries,
    "of_keys": backward.of_keys,
    "row_sums": backward.row_sums,
    "probe": probe.probe,
}
YARDSTICKS: dict[str, Callable[..., Any]] = {
    "forward": dense.dense_forward,
    "of_queries": dense.dense_of_queries,
    "of_keys": dense.dense_of_keys,
}
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.uint8: "u8",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
Launch = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Shape:
    """A call of a real model: Flux at 1024 x 1024 pixels by default.

    extra: "cut", some tiles are cut, as they are with the others too; "bool" or "added", the
    model's own mask, for each pair; "orders", rows of queries and of keys in orders of their own;
    "groups", words of 64 atoms; "after", forward's epilogues; or nothing. tf32: what float32 is
    multiplied as.
    """

    batch: int = 1
    heads: int = 24
    tokens: int = 4608
    dim: int = 128
    block: int = 128
    dtype: torch.dtype = torch.bfloat16
    extra: str = ""
    tf32: bool = True

    @property
    def whole(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.tokens, self.dim


def tile_of(kernel: str, shape: Shape, target: str) -> Tile:
    """As `run` takes it for this mask."""
    biased = shape.extra in ("bool", "added")
    chosen = tiles(shape.dim, shape.dtype != torch.float32, target, biased)
    tile: Tile = getattr(chosen, kernel)
    return tile._replace(m=side(shape.block, tile.m), n=side(shape.block, tile.n))


def launch(kernel: str, shape: Shape, target: str, tile: Tile | None = None) -> Launch:
    """Arguments and constants of a launch over a mask of whole tiles or, with an extra, of whole
    and of cut ones; tensors of tokens are on no device, and take no memory.
    """
    if kernel in ("row_sums", "probe"):
        return _row_sums(shape) if kernel == "row_sums" else _probe(shape)
    by_keys = kernel == "of_keys"
    tile = tile or tile_of(kernel, shape, target)
    blocks = -(-shape.tokens // shape.block)
    cells = torch.ones(1, 1, blocks, blocks, dtype=torch.int32)
    if shape.extra:
        cells[..., 0] = 2
    bits = torch.zeros(1, shape.block, -(-shape.block // 32), dtype=torch.int32)
    bits[:, 0] = 1
    grid = dict(q_block=shape.block, k_block=shape.block)
    mask = settle(cells, bits, **grid, q_regions=(shape.tokens,), k_regions=(shape.tokens,))
    walk = Walk(lower(turned(mask) if by_keys else mask, tile.n), 1, 1, tile)
    q, k, v, tensors, strided = _tensors(kernel, shape)
    _, args, constants = arguments(
        *(walk, _extras(shape), q, k, v, tensors, strided, shape.dim**-0.5),
        by_keys=by_keys,
        epilogue=_epilogue(shape) if kernel == "forward" else None,
    )
    return args, constants | {"PRECISION": "tf32" if shape.tf32 else "ieee"}


def launch_dense(kernel: str, shape: Shape, tile: Tile) -> Launch:
    """The same of the yardstick, at a tile that is given."""
    q, k, v, tensors, strided = _tensors(kernel, shape)
    strides = [step for x in (q, k, v, *strided) for step in x.stride()[:3]]
    numbers = shape.heads, shape.tokens, shape.tokens, shape.dim**-0.5
    constants = {
        "DIM": shape.dim,
        "WIDE": wide(shape.dim),
        "M": tile.m,
        "N": tile.n,
        "PRECISION": "tf32" if shape.tf32 else "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
    return (*tensors, *strides, *numbers), constants


def _tensors(kernel: str, shape: Shape) -> tuple[Any, ...]:
    """q, k, v, what a kernel's arguments begin with, and whose strides follow the inputs'."""
    q, k, v, grad = (
        empty_out(torch.empty(shape.whole, dtype=shape.dtype, device="meta")) for _ in range(4)
    )
    sums = torch.empty(shape.whole[:3], device="meta")
    tensors, strided = {
        "forward": ((q, k, v, q, sums), (q,)),
        "of_queries": ((q, k, v, grad, sums, sums, q), (grad, q)),
        "of_keys": ((q, k, v, grad, sums, sums, k, v), (grad, k)),
    }[kernel]
    return q, k, v, tensors, strided


def _extras(shape: Shape) -> Extras:
    batch, heads, tokens, _ = shape.whole

    def meta(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    if shape.extra == "orders":
        order = meta(batch, heads, tokens)
        return Extras(q_order=order, k_order=order)
    if shape.extra == "groups":
        atoms = meta(batch, tokens)
        return Extras(words=meta(64, 2), q_atom=atoms, k_atom=atoms)
    if shape.extra in ("bool", "added"):
        dtype = torch.bool if shape.extra == "bool" else shape.dtype
        return Extras(bias=meta(batch, 1, tokens, tokens, dtype=dtype))
    return Extras()


def _epilogue(shape: Shape) -> Epilogue:
    if shape.extra != "after":
        return Epilogue()
    batch, heads, tokens, _ = shape.whole
    onto = empty_out(torch.empty(shape.whole, dtype=shape.dtype, device="meta"))
    sums = torch.empty(shape.whole[:3], device="meta")
    return Epilogue(onto, sums, torch.empty(1, heads, 1, device="meta"))


def _row_sums(shape: Shape) -> Launch:
    _, _, _, tensors, _ = _tensors("of_queries", shape)
    out, grad, sums = tensors[0], tensors[3], tensors[4]
    constants = {
        "THROUGH_LSE": True,
        "DIM": shape.dim,
        "WIDE": wide(shape.dim),
        "M": 64,
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    strides = *out.stride()[:3], *grad.stride()[:3]
    return (out, grad, sums, sums, sums, sums, *strides, shape.heads, shape.tokens), constants


def _probe(shape: Shape) -> Launch:
    """Of 77 keys, as many as CLIP has words, under a mask with cut blocks."""
    q, k, _, tensors, _ = _tensors("forward", shape)
    chosen, blocks = 77, -(-shape.tokens // shape.block)

    def meta(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.int32, device="meta")

    pool = meta(1, shape.block, -(-shape.block // 32))
    given = [meta(1, shape.heads, blocks, chosen), meta(chosen), pool, None, None, None, None]
    out = torch.empty(*shape.whole[:3], chosen, device="meta")
    bounds, scale = meta(blocks + 1), shape.dim**-0.5
    _, args, constants = probe.arguments(q, k, tensors[4], meta(chosen), scale, bounds, given, out)
    return args, constants | {"PRECISION": "tf32" if shape.tf32 else "ieee"}


def compile_for(
    target: str, function: Any, args: tuple[Any, ...], constants: dict[str, Any]
) -> Any:
    """triton's CompiledKernel, specialised as a launch would be: on integers that are 1 or
    multiples of 16, on pointers that are aligned, as an allocator's are, and on AMD's chips on
    tensors that 32 bits reach across.
    """
    options = {name: constants[name] for name in OPTIONS if name in constants}
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
            if TARGETS[target].backend == "hip" and value.nbytes < 1 << 31:
                attrs[(place,)].append(["tt.pointer_range", 32])
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
