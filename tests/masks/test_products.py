"""Block lists from relations on axes, against every pair of tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks_by_hand import edges, natten_reads, places, with_text

from attn_control import AttnControlError
from attn_control.masks import Grid, along, neighborhood_mask, product, relations

ORACLE = Path(__file__).parents[1] / "data" / "natten"


@pytest.fixture(params=["tables", "intervals"])
def way(request, monkeypatch):
    """Both ways to find blocks: the one for short axes and the one for long."""
    if request.param == "intervals":
        monkeypatch.setattr(along, "SHORT", 0)


def dense_of(mask) -> np.ndarray:
    mask.validate(rows=False, own=False)
    return mask.to_dense()[0, 0].numpy()


def case(name: str) -> dict:
    """The arguments that a case of the oracle is named after."""
    fields = dict(
        zip("shape kernel stride dilation causal".split(), name.split("_")[1:], strict=True)
    )
    found = {key: value.lstrip("skdtc").split("x") for key, value in fields.items()}
    return {
        "shape": tuple(map(int, found["shape"])),
        "kernel_size": tuple(map(int, found["kernel"])),
        "stride": tuple(map(int, found["stride"])),
        "dilation": tuple(map(int, found["dilation"])),
        "is_causal": tuple(flag == "1" for flag in found["causal"][0]),
    }


def cases() -> list[str]:
    return [
        f"{file}:{name}"
        for file in ("na1d_masks", "na2d_masks")
        for name in np.load(ORACLE / f"{file}.npz").files
    ]


@pytest.mark.parametrize("name", cases())
def test_neighborhoods_are_natten_s(name, way):
    file, key = name.split(":")
    dense = dense_of(neighborhood_mask(**case(key)))
    assert np.array_equal(dense, np.load(ORACLE / f"{file}.npz")[key])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_neighborhoods_of_one_to_three_axes(data):
    axes = data.draw(st.integers(1, 3))
    shape, given_ = [], {"kernel_size": [], "stride": [], "dilation": [], "is_causal": []}
    for _ in range(axes):
        dilation = data.draw(st.integers(1, 3))
        kernel = data.draw(st.integers(2, 5))
        shape.append(data.draw(st.integers(kernel * dilation, kernel * dilation + 5)))
        given_["kernel_size"].append(kernel)
        given_["dilation"].append(dilation)
        given_["stride"].append(data.draw(st.integers(1, kernel)))
        given_["is_causal"].append(data.draw(st.booleans()))
    tile = data.draw(st.sampled_from([None, (2, 4, 2)[:axes]]))
    before, after = data.draw(st.sampled_from([(0, 0), (3, 0), (0, 40)]))
    grid = Grid(tuple(shape), 32, tile, before, after)
    order = places(shape, tile)
    expected = np.ones((len(order),) * 2, bool)
    for axis, length in enumerate(shape):
        arguments = [
            given_[name][axis] for name in ("kernel_size", "stride", "dilation", "is_causal")
        ]
        table = np.zeros((length, length), bool)
        for x in range(length):
            table[x, list(natten_reads(x, length, *arguments))] = True
        expected &= table[order[:, axis][:, None], order[:, axis]]
    assert np.array_equal(
        dense_of(neighborhood_mask(grid, **given_)), with_text(expected, before, after)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(kernel_size=1), "axis 0 of 6 tokens: kernel_size=1 has to be at least 2"),
        (dict(kernel_size=(3, 9)), "axis 1 of 8 tokens: kernel_size=9 x dilation=1 is longer"),
        (dict(dilation=3), "kernel_size=3 x dilation=3 is longer"),
        (dict(dilation=0), "dilation=0 has to be at least 1"),
        (dict(stride=4), "stride=4 is not in 1..kernel_size=3"),
        (dict(stride=(1, 2, 3)), "stride=(1, 2, 3) has to be int, or one for each of 2 axes"),
        (dict(is_causal=1), "is_causal=1 has to be bool"),
        (dict(kernel_size=3.0), "kernel_size=3.0 has to be int"),
        (dict(shape=(2, 3, 4, 5)), "shape=(2, 3, 4, 5) has more than 3 axes"),
        (dict(shape=(6, 0)), "shape=(6, 0)"),
    ],
)
def test_what_natten_refuses_is_refused(change, said):
    with pytest.raises(AttnControlError) as error:
        neighborhood_mask(**{"shape": (6, 8), "kernel_size": 3, **change})
    assert said in str(error.value)


@pytest.mark.parametrize("name", [f"c{n}" for n in (0, 2, 3, 4, 7, 8)])
def test_tiled_order_is_natten_s_without_its_padding(name):
    oracle = np.load(ORACLE / "token_permute.npz")
    params = json.loads(str(oracle[f"params_{name}_flip0"]))
    assert params["groups"] == 1
    grid = Grid(tuple(params["shape"]), 64, tuple(params["tile"]))
    slots = oracle[f"src_{name}_flip0"][0]
    assert np.array_equal(grid.order(), slots[slots >= 0])


@pytest.mark.parametrize("shape", [(70,), (6, 40), (9, 32), (3, 5, 9), (4, 8, 8), (3, 20, 13)])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (40, 0), (5, 33)])
def test_grids(shape, tiled, before, after):
    tile = {1: (32,), 2: (4, 8), 3: (2, 4, 4)}[len(shape)] if tiled else None
    grid = Grid(shape, 32, tile, before, after)
    assert grid.length == sum(grid.regions) == before + grid.tokens + after
    order = grid.order()
    assert sorted(order) == list(range(grid.length))
    at = places(shape, tile)
    assert [tuple(place) for place in at] == [
        np.unravel_index(token - before, shape) for token in order[before : before + grid.tokens]
    ]
    bounds = edges(grid.regions, 32)
    assert grid.blocks == len(bounds) - 1
    video = range(grid.spatial.start, grid.spatial.stop)
    assert bounds[video.start] == before and bounds[video.stop] == before + grid.tokens
    if tiled:  # a block is a tile: as many tokens as fit into the box, and no others
        for block in video:
            box = at[bounds[block] - before : bounds[block + 1] - before] // np.array(tile)
            assert (box == box[0]).all()
        assert len(video) == np.prod([-(-n // t) for n, t in zip(shape, tile, strict=True)])


def test_grids_begin_anew_at_frames_that_fill_blocks():
    assert Grid((21, 30, 52)).runs == (1560,) * 21  # 12.2 blocks
    assert Grid((30, 48, 80)).runs == (3840,) * 30
    assert Grid((64, 256)).runs == (256,) * 64  # rows of two blocks
    assert Grid((21, 16, 22)).runs == (7392,)  # 2.75 blocks a frame: better across
    assert Grid((21, 16, 22), split=1).runs == (352,) * 21
    assert Grid((30, 48, 80), split=0).runs == (115200,)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        (dict(shape=(4, 4), tile=(4,)), "tile=(4,) for a shape of (4, 4)"),
        (dict(shape=(64, 64), tile=(12, 12)), "has 144 tokens, more than block=128"),
        (dict(shape=(4, 4), split=2), "split=2 is not in 0..1"),
        (dict(shape=(4, 4), split=0, tile=(2, 2)), "no meaning beside a tile"),
        (dict(shape=(4, 4), before=-1), "before=-1"),
        (dict(shape=(4, 4), block=0), "block=0"),
        (dict(shape=()), "shape=()"),
    ],
)
def test_grids_refuse(given_, said):
    with pytest.raises(AttnControlError) as error:
        Grid(**given_)
    assert said in str(error.value)


def random_relation(random, queries: int, keys: int) -> relations.Relation:
    """Up to three random intervals for each query, at times on a raster."""
    edge = np.sort(random.integers(0, keys + 1, (2, random.integers(1, 4), queries)), 0)
    if random.random() < 0.5:
        return relations.Relation(*edge, keys)
    step = int(random.integers(2, 4))
    return relations.Relation(*edge, keys, step, random.integers(0, step, queries))


def table_of(relation: relations.Relation) -> np.ndarray:
    table = np.zeros((relation.queries, relation.keys), bool)
    for x, y in itertools.product(*map(range, table.shape)):
        inside = any(
            a <= y < b for a, b in zip(relation.start[:, x], relation.stop[:, x], strict=True)
        )
        on_raster = relation.phase is None or y % relation.step == relation.phase[x]
        table[x, y] = inside and on_raster
    return table


@pytest.mark.parametrize("seed", range(24))
def test_products_on_random_grids(seed, way):
    """Raster and tiled order, rectangular, axes by themselves and taken together, text or not."""
    random = np.random.default_rng(seed)
    axes = int(random.integers(1, 4))
    grids, orders = [], []
    for _ in range(2):
        shape = tuple(int(n) for n in random.integers(1, {1: 150, 2: 14, 3: 7}[axes], axes))
        tile = (2, 4, 4)[:axes] if random.random() < 0.4 else None
        split = int(random.integers(axes)) if tile is None and random.random() < 0.5 else None
        before, after = (int(n) for n in random.integers(0, 40, 2) * (random.random(2) < 0.5))
        grids.append(Grid(shape, 32, tile, before, after, split))
        orders.append(places(shape, tile))
    q, k = grids
    groups = [(axis,) for axis in range(axes)]
    if axes > 1 and random.random() < 0.5:
        groups = [(0,), tuple(range(1, axes))]
    given_, expected = {}, np.ones((q.tokens, k.tokens), bool)
    for group in groups:
        if random.random() < 0.2:
            continue  # free
        given_[group] = random_relation(random, q.extent(group), k.extent(group))
        at = [
            np.ravel_multi_index(order.T[list(group)], [grid.shape[a] for a in group])
            for grid, order in zip(grids, orders, strict=True)
        ]
        expected &= table_of(given_[group])[at[0][:, None], at[1]]
    text = bool(random.random() < 0.5)
    out = np.full((q.length, k.length), text)
    out[q.before : q.before + q.tokens, k.before : k.before + k.tokens] = expected
    assert np.array_equal(dense_of(product(q, given_, k_grid=k, text=text)), out)


def test_products_refuse_a_relation_of_another_axis():
    with pytest.raises(AttnControlError, match=r"axes \(1,\) is of 4 x 4 places.* have 5 x 5"):
        product(Grid((4, 5)), {1: relations.within(4, 1)})


def test_fully_block_sparse_neighborhoods():
    """Strides that are the tile, and kernels that are odd multiples of it, waste nothing."""
    tiled = Grid((64, 64), 64, (8, 8))
    for kernel, stride, fully in ((24, 8, True), (16, 8, False), (24, 1, False), (40, 8, True)):
        mask = neighborhood_mask(tiled, kernel, stride=stride)
        dense = mask.to_dense()[0, 0].view(64, 64, 64, 64).transpose(1, 2).flatten(2)
        assert bool((dense.all(-1) | ~dense.any(-1)).all()) == fully  # by brute force
        assert mask.is_fully_block_sparse() == fully
        assert (mask.waste() == 1) == fully
    assert neighborhood_mask(tiled, 16, stride=8).waste() == pytest.approx(1.89, abs=0.01)


@pytest.mark.parametrize("tile", [None, (2, 8, 8)])
def test_nothing_of_the_size_of_tokens_squared(tile):
    """HunyuanVideo's 117 frames: 115,456 tokens, 13 billion pairs."""
    torch.manual_seed(0)
    grid = Grid((30, 48, 80), 128, tile, after=256)
    mask = neighborhood_mask(grid, (18, 24, 24)).validate()
    assert mask.nbytes < 20e6
    assert mask.elements().item() == 115200 * 18 * 24 * 24 + 2 * 256 * 115200 + 256**2
