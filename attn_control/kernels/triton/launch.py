"""From tensors to launches: strides, sizes and constants, in the kernels' order."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attn_control.kernels.triton import backward, forward
from attn_control.kernels.triton.lists import Lists
from attn_control.kernels.triton.tune import MOST, Tile, wide


class Walk(NamedTuple):
    """What one kernel goes through, and how. batch, heads: of the lists, 1 where shared."""

    lists: Lists
    batch: int
    heads: int
    tile: Tile

    @property
    def blocks(self) -> int:
        return len(self.lists.bounds) - 1

    @property
    def block(self) -> int:
        return self.lists.pool.shape[1]

    @property
    def pieces(self) -> int:
        return -(-self.block // self.tile.m)


class Extras(NamedTuple):
    """What changes who reads whom, and where rows lie.

    q_order: int32 (batch | 1, heads | 1, queries): which token stands at a place of the mask;
    k_order: int32 (batch | 1, kv_heads | 1, keys). bias: the model's own mask, (batch | 1, heads |
    1, queries | 1, keys | 1). words: int32 (atoms of queries, 2), or 1 where no atom of keys is
    above 31; q_atom: int32 (batch | 1, queries), k_atom: int32 (batch | 1, keys), all by token.
    """

    q_order: Tensor | None = None
    k_order: Tensor | None = None
    bias: Tensor | None = None
    words: Tensor | None = None
    q_atom: Tensor | None = None
    k_atom: Tensor | None = None


class Epilogue(NamedTuple):
    """What `forward` does beside: onto: (batch, heads, queries, head_dim), an output to go on from,
    and onto_lse: float32 (batch, heads, queries), its lse. u: float32 (batch | 1, heads | 1,
    queries | 1), the way to the value of each query's own token.
    """

    onto: Tensor | None = None
    onto_lse: Tensor | None = None
    u: Tensor | None = None


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    walk: Walk,
    extras: Extras,
    scale: float,
    epilogue: Epilogue = Epilogue(),  # noqa: B008, immutable
) -> tuple[Tensor, Tensor]:
    """Output, tokens before heads in memory, and lse."""
    out = empty_out(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if epilogue.onto is not None and epilogue.onto_lse is not None:
        dense = dense_rows(epilogue.onto), epilogue.onto_lse.contiguous()
        epilogue = epilogue._replace(onto=dense[0], onto_lse=dense[1])
    # The kernel scales after it masks, and -inf times 0 is nan: next to nothing stands for nothing.
    scale = scale or torch.finfo(torch.float32).tiny
    given = arguments(walk, extras, q, k, v, (q, k, v, out, lse), (out,), scale, epilogue=epilogue)
    _launch(forward.forward, given, q)
    return out, lse


def empty_out(q: Tensor) -> Tensor:
    """As torch's own kernel has it: what follows joins heads again."""
    batch, heads, queries, dim = q.shape
    return q.new_empty(batch, queries, heads, dim).transpose(1, 2)


def run_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    walks: tuple[Walk, Walk],
    extras: Extras,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; ``walks``: rows are queries, rows are keys."""
    grad = dense_rows(grad)
    batch, heads, queries, dim = q.shape
    delta, mass = torch.empty_like(lse), torch.empty_like(lse)
    m = 64
    with on(q):
        # Heads of all rows along the axis without a limit: temporal attention has one row a pixel.
        backward.row_sums[(batch * heads, -(-queries // m))](
            *(out, grad, delta if grad_lse is None else grad_lse.contiguous(), lse, delta, mass),
            *out.stride()[:3],
            *grad.stride()[:3],
            heads,
            queries,
            THROUGH_LSE=grad_lse is not None,
            DIM=dim,
            WIDE=wide(dim),
            M=m,
            num_warps=4,
        )
    dq, dk, dv = empty_out(q), empty_out(k), empty_out(k)
    read = (q, k, v, grad, delta, mass)
    rows, columns = walks
    given = arguments(rows, extras, q, k, v, (*read, dq), (grad, dq), scale)
    _launch(backward.of_queries, given, q)
    into = (grad, dk)
    given = arguments(columns, extras, q, k, v, (*read, dk, dv), into, scale, by_keys=True)
    _launch(backward.of_keys, given, q)
    return dq, dk, dv


def dense_rows(x: Tensor) -> Tensor:
    """x, its features next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(kernel: Any, given: tuple[Any, ...], q: Tensor) -> None:
    grid, args, constants = given
    with on(q):
        kernel[grid](*args, **constants)


def arguments(
    walk: Walk,
    extras: Extras,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: tuple[Tensor, ...],
    strided: tuple[Tensor, ...],
    scale: float,
    *,
    by_keys: bool = False,
    epilogue: Epilogue | None = None,
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and constants of `forward`, `of_queries` or, by_keys, `of_keys`.

    tensors: what the kernel's arguments begin with; strided: those whose strides it is given after
    the inputs'; epilogue: of forward, and None with the others.
    """
    lists, tile = walk.lists, walk.tile
    batch, heads, queries, dim = q.shape
    spread = k.shape[1] if by_keys else heads  # heads that programs are made for
    shared_by = (spread if walk.heads == 1 else 1) * (batch if walk.batch == 1 else 1)
    stand_in = lists.order  # a pointer that is never followed
    strides = [s for x in (q, k, v, *strided) for s in x.stride()[:3]]
    bias, kind = extras.bias, 0
    if bias is not None:
        kind = 2 if bias.dtype == torch.bool else 1
        extras = extras._replace(bias=bias.view(torch.uint8) if kind == 2 else bias)
    for x, taken in ((extras.q_order, 2), (extras.k_order, 2), (bias, 4)):
        strides += broadcast(x, taken)
    for x in (extras.q_atom, extras.k_atom):
        strides += broadcast(x, 1)
    args = (
        *tensors,
        *lists,
        *(stand_in if x is None else x for x in extras),
        *strides,
        len(lists.order),
        walk.blocks,
        min(walk.heads, spread),
        spread if walk.heads == 1 else 1,
        0 if walk.batch == 1 else walk.heads * walk.blocks,
        0 if walk.heads == 1 else walk.blocks,
        heads,
        heads // k.shape[1],
        queries,
        abs(scale) * math.log2(math.e),
    )
    constants = {
        "FLIP": scale < 0,
        "DIM": dim,
        "WIDE": wide(dim),
        "BLOCK": walk.block,
        "WORDS": lists.pool.shape[2],
        "PIECES": walk.pieces,
        # A kernel of its own for masks of whole tiles: the loop over cut ones costs it registers.
        "CUTS": int(len(lists.cut) > 0),
        "CUT_STAGES": tile.cut_stages or None,  # None: as many as num_stages
        # Of the two tensors that the loop reads: then their rows' offsets are computed once.
        "ALIKE": len({x.stride(-2) for x in ((q, strided[0]) if by_keys else (k, v))}) == 1,
        "FAR": any(far(x) for x in (q, k, v, *strided)),
        "M": tile.m,
        "N": tile.n,
        "Q_ORDERED": extras.q_order is not None,
        "K_ORDERED": extras.k_order is not None,
        "BIAS": kind,
        "GROUPS": 0 if extras.words is None else extras.words.shape[1],
        "PRECISION": precision(q.dtype),
        "num_warps": tile.warps,
        # A mask of bools in flight beside keys and values takes more registers than there are.
        "num_stages": 1 if kind == 2 and epilogue is not None else tile.stages,
        # A multiply and an add are one: triton 3.10 no longer takes that for granted.
        "enable_fp_fusion": True,
    }
    # What extras hold beside comes on top: under the plain kernel's cap, or turned, they spill.
    plain = all(x is None for x in (*extras, *(epilogue or ())))
    constants["TURNED"] = bool(tile.turned) and plain and not constants["CUTS"]
    if tile.registers:
        cap = tile.cut_registers if constants["CUTS"] and tile.cut_registers else tile.registers
        constants["maxnreg"] = cap if plain else MOST
    if epilogue is not None:
        args += tuple(stand_in if x is None else x for x in epilogue)
        args += *broadcast(epilogue.onto, 3), *broadcast(epilogue.u, 3)
        constants["ONTO"] = epilogue.onto is not None
        constants["FAR"] |= epilogue.onto is not None and far(epilogue.onto)
        constants["SOFTEN"] = epilogue.u is not None
    return (len(lists.order) * shared_by * walk.pieces,), args, constants


def far(x: Tensor) -> bool:
    """Whether some token of a head lies further from its first one than 32 bits reach."""
    return x.shape[-2] * x.stride(-2) >= 1 << 31


def broadcast(x: Tensor | None, axes: int) -> list[int]:
    """Strides of the first axes, 0 along those that are shared; zeros of nothing."""
    if x is None:
        return [0] * axes
    steps = zip(x.shape, x.stride(), strict=True)
    return [0 if size == 1 else step for size, step in steps][:axes]


def precision(dtype: torch.dtype) -> str:
    """Of products, as tl.dot takes it."""
    precise = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if precise else "tf32"


def on(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def interpreted() -> bool:
    """Whether triton runs its kernels as Python, on any device's tensors."""
    return bool(triton.knobs.runtime.interpret)
