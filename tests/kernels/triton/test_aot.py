"""The check of compiled kernels passes ours, and fails kernels made worse on purpose."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from attn_control.kernels import aot
from attn_control.kernels.aot_tutorial import FIGURES, Figure, known
from attn_control.kernels.aot_variants import EXTRAS, KERNELS, WALKS, chosen
from attn_control.kernels.chips import CHIPS
from attn_control.kernels.triton.tune import Tile, Tiles, tiles

compiles = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler"),
    pytest.mark.slow,
]


def compiling(test):
    for mark in compiles:
        test = mark(test)
    return test


@compiling
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_for_machines_that_are_not_here(target, capsys, tmp_path):
    page = tmp_path / "aot.md"
    asked = ["--targets", target, "--kernels", "forward", "--dims", "128", "--out", str(page)]
    assert aot.main(asked) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[:4] == [target, "forward", "128", "bf16"]
    assert shown[-1].startswith("1 kernels: none with faults")
    written = page.read_text()
    assert f"| {target} | forward | 128 | bf16 |" in written and "no speed-up" in written


@compiling
@pytest.mark.parametrize("kernel", ["forward", "of_queries", "of_keys"])
def test_cut_tiles_of_half_a_word_compile(kernel):
    """16 columns of a mask's bits: the interpreter runs what the compiler once refused."""
    from attn_control.kernels import aot_compile as make

    shape = make.Shape(heads=2, tokens=512, dim=256, dtype=torch.float32, extra="cut")
    assert make.tile_of(kernel, shape, "sm_80").n == 16
    make.compile_for("sm_80", make.KERNELS[kernel], *make.launch(kernel, shape, "sm_80"))


@compiling
def test_a_kernel_made_to_spill_fails(monkeypatch, capsys):
    """Four warps for a tile that takes eight."""
    from attn_control.kernels import aot_compile

    crowded = Tiles(*[Tile(128, 64, 4, 2)] * 3)
    monkeypatch.setattr(aot_compile, "tiles", lambda *_: crowded)
    assert aot.main(["--targets", "sm_80", "--kernels", "forward", "--dims", "128"]) == 1
    shown = capsys.readouterr().out
    assert "bytes a thread" in shown and "1 kernels: 1 with faults" in shown


SUMS = '''
@triton.jit
def by_hand(a, b, sums=None, input_precision: tl.constexpr = ""):
    """What tl.dot does, one product after the other."""
    found = tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    return found if sums is None else sums + found
'''


@compiling
def test_a_kernel_without_its_matrix_instructions_fails(monkeypatch, capsys, tmp_path):
    """Ours, word for word, but for the products."""
    from attn_control.kernels import aot_compile
    from attn_control.kernels.triton import forward

    source = Path(forward.__file__).read_text()
    assert source.count("tl.dot(") >= 2
    head, kernel = source.split("@triton.jit", 1)
    without = head + SUMS + "\n\n@triton.jit" + kernel.replace("tl.dot(", "by_hand(")
    file = tmp_path / "without.py"
    file.write_text(without)
    spec = importlib.util.spec_from_file_location("without", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # A tile small enough that nothing else is wrong with it.
    monkeypatch.setattr(aot_compile, "tiles", lambda *_: Tiles(*[Tile(16, 16, 4, 1)] * 3))
    asked = ["--targets", "sm_80", "--kernels", "forward", "--dims", "16"]
    aot.main(asked)  # so small a tile is behind dense, which is another fault
    assert "matrix instruction" not in capsys.readouterr().out
    monkeypatch.setitem(aot_compile.KERNELS, "forward", module.forward)
    assert aot.main(asked) == 1
    line = capsys.readouterr().out.splitlines()[1]
    assert " has no matrix instruction" in line, line


@compiling
def test_exact_products_of_float32_are_held_to_all_but_the_matrix_unit():
    row = aot.measure(aot.Variant("sm_80", "row_sums", 64))
    assert row.found == () and row.binary.matrix == 0 and row.dense is None
    assert row.cells()[4] == "64 w4"
    exact = aot.measure(aot.Variant("sm_80", "forward", 32, "fp32"))
    assert exact.found == () and exact.binary.matrix == 0
    fast = aot.measure(aot.Variant("sm_80", "forward", 32, "tf32"))
    assert fast.found == () and fast.binary.matrix > 0 and fast.model is None


@compiling
def test_instructions_of_a_loop_by_hand():
    """sm_80, a tile of 64 x 32 at head dim 64: two products of 2 * 64 * 32 * 64 operations, in
    instructions of 2 * 16 * 8 * 16, by 4 warps: 32 each, in one pass of the loop.
    """
    from attn_control.kernels import aot_compile as make
    from attn_control.kernels.aot_binary import read

    tile = Tile(64, 32, 4, 2)
    args = make.launch_dense("forward", make.Shape(dim=64), tile)
    found = read(make.compile_for("sm_80", make.YARDSTICKS["forward"], *args))
    assert found.matrix == 32 and found.share * found.loop == pytest.approx(32)


@dataclass
class Stub:
    """As `aot_binary.Binary`, whose module loads triton."""

    registers: int = 128
    spilled: int = 0
    shared: int = 1024
    matrix: int = 8
    share: float = 0.2


def test_what_does_not_fit_shared_memory_fails():
    assert aot.faults("sm_86", 4, Stub(shared=99 * 1024)) == []
    assert aot.faults("sm_86", 4, Stub(shared=99 * 1024 + 1)) == [
        "needs 101377 bytes of shared memory"
    ]
    assert aot.faults("sm_80", 4, Stub(share=0.0)) == ["has no matrix instruction in a loop"]
    assert aot.faults("sm_80", 4, Stub(share=0.0), loop=False) == []
    assert aot.faults("sm_80", 4, Stub(matrix=0), matrix=False) == []


def test_what_no_multiprocessor_has_registers_for_fails():
    """16 warps of 128 registers are all 65,536 that there are."""
    assert aot.faults("sm_80", 16, Stub(128)) == []
    assert aot.faults("sm_80", 16, Stub(129)) == ["16 warps of 129 registers fit no multiprocessor"]


def test_occupancy_by_hand():
    # 201 registers are 208 as they are handed out: 208 * 32 * 8 of 65536 once, 8 of 64 warps.
    assert aot.occupancy("sm_80", 8, Stub(201, shared=49664)) == 8 / 64
    # 64 registers: four by them, and three by 48 of 164 KiB.
    assert aot.occupancy("sm_80", 8, Stub(64, shared=47 * 1024)) == 24 / 64


def test_falling_behind_the_yardstick():
    dense = Stub(128, share=0.2)
    assert aot.behind("sm_80", 4, Stub(128, share=0.19), dense) == pytest.approx((0.95, 1.0))
    # 128 registers: four programs of 4 warps, 16 of 64; 136: three.
    kept = aot.behind("sm_80", 4, Stub(136, share=0.18), dense)
    assert kept == pytest.approx((0.9, 0.75))
    assert aot.short((0.951, 1.0), "dense's") == []
    assert aot.short((0.949, 1.0), "dense's") == ["share of the loop 0.95 of dense's"]
    lags = ["share of the loop 0.90 of dense's", "occupancy 0.75 of dense's"]
    assert aot.short(kept, "dense's") == lags


def test_falling_behind_the_tutorial(monkeypatch):
    variant = aot.Variant("sm_80", "forward", 64)
    tile = Tile(64, 32, 4, 2, 128)
    figure = Figure((64, 32, 4, 2), 128, 0, 1024, 20, 100)
    monkeypatch.setitem(FIGURES, ("sm_80", "forward", 64), figure)
    assert aot.beside_tutorial(variant, tile, Stub(share=0.191)) == (figure, [])
    assert aot.beside_tutorial(variant, tile, Stub(136, share=0.18))[1] == [
        "share of the loop 0.90 of the tutorial's",
        "occupancy 0.75 of the tutorial's",
    ]
    # Its warps are no yardstick where it spills to have them; its share is.
    monkeypatch.setitem(FIGURES, ("sm_80", "forward", 64), figure._replace(spilled=8))
    assert aot.beside_tutorial(variant, tile, Stub(136, share=0.18))[1] == [
        "share of the loop 0.90 of the tutorial's"
    ]
    found = aot.beside_tutorial(variant, tile._replace(n=64), Stub())
    assert found == (None, ["the tutorial was compiled at another tile, (64, 32, 4, 2)"])


def test_the_tutorial_is_known_at_the_tiles_that_ours_have():
    assert set(FIGURES) == {(t, k, d) for t in CHIPS for k in WALKS for d in (64, 128)}
    for (target, kernel, dim), figure in FIGURES.items():
        assert getattr(tiles(dim, True, target), kernel)[:4] == figure.tile
    alike = [known(aot.Variant("sm_90", "forward", 64, dtype)) for dtype in ("bf16", "fp16")]
    assert alike == [FIGURES["sm_90", "forward", 64]] * 2
    for other in (dict(dtype="tf32"), dict(extra="cut"), dict(dim=32), dict(target="gfx942")):
        asked = dict(target="sm_90", kernel="forward", dim=64) | other
        assert known(aot.Variant(**asked)) is None
    assert known(aot.Variant("gfx942", "forward", 64, "fp16")) is not None


@compiling
def test_fewer_stages_of_the_loop_over_cut_tiles_make_room(monkeypatch):
    """For a program more on a multiprocessor, beside which the dense kernel's count."""
    from attn_control.kernels import aot_compile

    variant = aot.Variant("sm_100", "of_keys", 32, extra="cut")
    fewer = tiles(32, True, "sm_100").of_keys
    assert fewer.cut_stages == 1 < fewer.stages
    assert aot.measure(variant).found == ()
    same = fewer._replace(cut_stages=0)
    monkeypatch.setattr(aot_compile, "tiles", lambda *_: Tiles(same, same, same))
    assert aot.measure(variant).found == ("occupancy 0.75 of dense's",)


@compiling
def test_turned_loads_take_fewer_instructions_on_amd(monkeypatch):
    from attn_control.kernels import aot_compile

    variant = aot.Variant("gfx942", "of_queries", 128, "fp16")
    turned = tiles(128, True, "gfx942").of_queries
    assert turned.turned
    loops = []
    for tile in (turned, turned._replace(turned=False)):
        monkeypatch.setattr(aot_compile, "tiles", lambda *_, x=tile: Tiles(x, x, x))
        loops.append(aot.measure(variant).binary.loop)
    assert loops[0] < 0.95 * loops[1]


def test_what_is_compiled():
    few, every = chosen(None, None, None, "few"), chosen(None, None, [32, 64, 128, 256], "all")
    assert len(set(few)) == len(few) and len(set(every)) == len(every)
    assert {(v.target, v.dim) for v in few if v.plain} >= {(t, d) for t in CHIPS for d in (64, 128)}
    for found in (few, every):
        assert {v.kernel for v in found} == set(KERNELS)
        assert {v.dtype for v in found} == {"bf16", "fp16", "tf32", "fp32"}
        assert {v.extra for v in found} == {"", *EXTRAS}
        assert {v.dim for v in found} == {32, 64, 128, 256}
    assert {v.target for v in every if v.extra} == set(CHIPS)
    assert chosen(["sm_80"], ["forward"], [64], "none") == [aot.Variant("sm_80", "forward", 64)]
