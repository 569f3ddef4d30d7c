"""Radial Attention's masks against the published generators' digests, and against every token."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attn_control import AttnControlError
from attn_control.masks import Grid, band_mask, radial_block_mask, radial_rules, sink_mask

DIGESTS = json.loads((Path(__file__).parents[1] / "data" / "radial_digests.json").read_text())


@pytest.mark.parametrize(
    "row", DIGESTS, ids=lambda r: "{model}-{revision}-{num_frames}x{tokens_per_frame}".format(**r)
)
def test_published_digests(row):
    """sha256 of the uint8 tables that the published generators make."""
    given_ = {k: v for k, v in row.items() if k not in ("blocks", "density", "sha256", "official")}
    mask = radial_block_mask(**given_)
    assert mask.q_len == mask.k_len == row["seq_len"]
    table = mask.table[0, : row["blocks"], : row["blocks"]]
    assert float(table.double().mean()) == pytest.approx(row["density"], abs=5e-7)
    assert hashlib.sha256(table.numpy().astype("uint8").tobytes()).hexdigest() == row["sha256"]


def frame_pair(i, j, frames, tokens, block, decay, model, revision):
    """bool (tokens, tokens): one query frame against one key frame, as the rules read."""
    repaired = revision == "repaired"
    sink = revision == "r0" or model == "wan"
    if sink and j == 0:
        return torch.ones(tokens, tokens, dtype=torch.bool)
    apart = abs(i - j)
    rows = torch.arange(tokens)[:, None]
    away = (torch.arange(tokens) - rows).abs()
    doublings = 0 if apart == 0 else int(math.log2(apart)) + 1
    above = 2
    while above <= tokens:
        above *= 2
    length = above / 2**doublings
    threshold = min(128, above / 2) if repaired else 128
    if length < threshold and apart % int(threshold / length) != 0:
        return torch.zeros(tokens, tokens, dtype=torch.bool)
    if apart == 0:
        return away <= tokens
    if apart == 1:
        halved = model == "wan" and revision in ("r0", "r1")
        return away <= (tokens // 2 if halved else tokens)
    width = decay * length
    return away <= (width if width >= block else block)  # torch compares in float32


def radial_by_hand(frames, tokens, block, decay, model, revision, length):
    """bool (blocks, blocks): token masks of frame pairs laid on a canvas, block by block."""
    repaired = revision == "repaired"
    total = -(-frames * tokens // block) if repaired else length // block
    count = -(-tokens // block) + repaired
    table = torch.zeros(total + count, total + count, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            pair = frame_pair(i, j, frames, tokens, block, decay, model, revision)
            top, left = i * tokens % block, j * tokens % block
            canvas = torch.zeros((count + 1) * block, (count + 1) * block)
            canvas[top : top + tokens, left : left + tokens] = pair
            there = torch.zeros_like(canvas)
            there[top : top + tokens, left : left + tokens] = 1
            for a in range(count):
                for b in range(count):
                    at = (slice(a * block, (a + 1) * block), slice(b * block, (b + 1) * block))
                    seen = canvas[at].sum(0)
                    rows = there[at].sum(0).amax() if repaired else block
                    nonzero = (seen > 0).sum()
                    high = (seen / rows > 1 / 3).sum() if rows else torch.zeros(())
                    if high / (nonzero + 1e-9) > 0.6:
                        table[i * tokens // block + a, j * tokens // block + b] = True
    table = table[:total, :total]
    if repaired:
        return table
    border = frames * tokens // block
    table[border:] = True
    table[:, border:] = True
    return table


shapes = st.tuples(st.integers(1, 8), st.integers(3, 60), st.sampled_from([4, 8, 12, 16, 32]))
decays = st.floats(0.02, 4)
models = st.sampled_from(["wan", "hunyuan"])


@settings(max_examples=25, deadline=None)
@given(shapes, decays, models, st.sampled_from(["r0", "r1", "r2"]), st.integers(0, 40))
def test_published_revisions_against_tokens(shape, decay, model, revision, text):
    frames, tokens, block = shape
    length = -(-(frames * tokens + text) // block) * block
    mask = radial_block_mask(
        frames,
        tokens,
        block_size=block,
        decay_factor=decay,
        model=model,
        revision=revision,
        text_tokens=text,
    )
    expected = radial_by_hand(frames, tokens, block, decay, model, revision, length)
    assert mask.q_len == frames * tokens + text and torch.equal(mask.table[0], expected)


@settings(max_examples=15, deadline=None)
@given(shapes, decays, models, st.integers(0, 40))
def test_repaired_against_tokens(shape, decay, model, text):
    frames, tokens, block = shape
    mask = radial_block_mask(
        frames, tokens, block_size=block, decay_factor=decay, model=model, text_tokens=text
    ).validate()
    video = -(-frames * tokens // block)
    expected = radial_by_hand(frames, tokens, block, decay, model, "repaired", 0)
    assert torch.equal(mask.table[0, :video, :video], expected)
    assert mask.table[:, video:].all() and mask.table[:, :, video:].all()
    assert mask.q_regions == ((frames * tokens, text) if text else (frames * tokens,))


@pytest.mark.parametrize("shape", [(9, 140, 16), (12, 131, 32), (7, 300, 128), (10, 129, 64)])
def test_published_revisions_on_frames_that_drop_some(shape):
    frames, tokens, block = shape
    for revision in ("r2", "repaired"):
        expected = radial_by_hand(
            frames, tokens, block, 0.9, "wan", revision, -(-frames * tokens // block) * block
        )
        mask = radial_block_mask(
            frames, tokens, block_size=block, decay_factor=0.9, revision=revision
        )
        assert torch.equal(mask.table[0], expected)
    widths = radial_rules.half_widths(
        frames, tokens, block, 0.9, radial_rules.rules_of("r2", "wan", tokens, None)
    )
    assert (widths < 0).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 12), st.sampled_from([16, 64, 128]), decays, models)
def test_repaired_is_r2_where_frames_are_whole_blocks(frames, blocks, block, decay, model):
    tokens = blocks * block
    assume(tokens >= 128)
    both = [
        radial_block_mask(
            frames, tokens, block_size=block, decay_factor=decay, model=model, revision=revision
        ).table
        for revision in ("r2", "repaired")
    ]
    assert torch.equal(*both)


@settings(max_examples=30, deadline=None)
@given(shapes, decays, models)
def test_repaired_shows_every_token_its_place_in_every_frame_it_reads(shape, decay, model):
    frames, tokens, block = shape
    mask = radial_block_mask(
        frames, tokens, block_size=block, decay_factor=decay, model=model
    ).to_dense()[0, 0]
    rules = radial_rules.rules_of("repaired", model, tokens, None)
    kept = radial_rules.half_widths(frames, tokens, block, decay, rules) >= 0
    for i in range(frames):
        for j in range(frames):
            if kept[abs(i - j)]:
                pair = mask[i * tokens : (i + 1) * tokens, j * tokens : (j + 1) * tokens]
                assert pair.diagonal().all()


@pytest.mark.parametrize("revision", ["repaired", "paper"])
def test_832_by_1216_by_81_has_no_empty_row(revision):
    """The shape on which a port's last block row is empty, and the video black."""
    mask = radial_block_mask(21, 52 * 76, decay_factor=0.2, revision=revision).validate()
    assert (mask.count > 0).all()


def test_widths_are_compared_as_torch_does():
    """A band just short of 20 tokens reaches 20, since integers meet a float in float32."""
    rules = radial_rules.rules_of("repaired", "wan", 60, None)
    decay = (20 - 1e-9) / radial_rules.decay_length(60, 2)
    width = decay * radial_rules.decay_length(60, 2)
    reached = int(torch.arange(60)[torch.arange(60) <= width].max())
    assert width < 20 and reached == 20
    assert radial_rules.half_widths(3, 60, 8, decay, rules)[2] == reached


def test_small_frames_keep_far_ones():
    """Frames of fewer than 128 tokens lose every other frame as published."""
    given_ = dict(num_frames=9, tokens_per_frame=32, block_size=16, model="hunyuan")
    published = radial_block_mask(**given_, revision="r2").table[0].view(9, 2, 9, 2)
    repaired = radial_block_mask(**given_).table[0].view(9, 2, 9, 2)
    reads = [table.any(3).any(1) for table in (published, repaired)]
    apart = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    assert torch.equal(reads[0], apart == 0)
    assert torch.equal(reads[1], apart & (apart - 1) == 0)


def eq4(frames, tokens, decay=1.0):
    """Eq. 4, literally."""
    mask = np.zeros((frames, tokens, frames, tokens), bool)
    for i, k, j, m in np.ndindex(*mask.shape):
        fold = 2 ** math.floor(math.log2(max(abs(i - j), 1)))
        mask[i, k, j, m] = (fold <= tokens and abs(k - m) + 1 <= decay * tokens / fold) or (
            abs(i - j) % math.ceil(fold / tokens) == 0 and k == m
        )
    return mask.reshape(frames * tokens, frames * tokens)


@pytest.mark.parametrize(
    ("frames", "tokens", "decay"), [(7, 20, 1), (18, 3, 1), (5, 40, 1), (4, 37, 0.5), (20, 2, 1)]
)
def test_the_paper_s_equation(frames, tokens, decay):
    mask = radial_block_mask(
        frames, tokens, block_size=32, decay_factor=decay, revision="paper", text_tokens=3
    ).validate()
    dense = mask.to_dense()[0, 0].numpy()
    video = frames * tokens
    assert np.array_equal(dense[:video, :video], eq4(frames, tokens, decay))
    assert dense[video:].all() and dense[:, video:].all()


def test_the_paper_with_its_sink():
    given_ = dict(num_frames=5, tokens_per_frame=40, block_size=32, revision="paper")
    grid = Grid((5, 40), 32, split=1)
    with_sink = radial_block_mask(**given_, sink=True)
    assert torch.equal(
        with_sink.to_dense(), (radial_block_mask(**given_) | sink_mask(grid)).to_dense()
    )
    assert not torch.equal(with_sink.to_dense(), radial_block_mask(**given_).to_dense())


def test_sink_may_be_chosen():
    given_ = dict(num_frames=6, tokens_per_frame=128, block_size=32, decay_factor=0.2)
    wan, hunyuan = (radial_block_mask(**given_, model=model) for model in ("wan", "hunyuan"))
    assert torch.equal(radial_block_mask(**given_, sink=False).table, hunyuan.table)
    assert torch.equal(radial_block_mask(**given_, model="hunyuan", sink=True).table, wan.table)
    assert not torch.equal(wan.table, hunyuan.table)


def test_combines_with_a_grid_that_is_cut_the_same_way():
    radial = radial_block_mask(12, 60, block_size=32, text_tokens=9)
    both = radial | band_mask(Grid((12, 6, 10), 32, after=9, split=0), 200)
    assert 1 > both.density() > radial.density()


@pytest.mark.parametrize("revision", ["repaired", "r2", "r1", "paper"])
@pytest.mark.parametrize("target", [0.65, 0.8])
def test_target_density_is_the_densest_that_fits(revision, target):
    given_ = dict(num_frames=7, tokens_per_frame=200, block_size=32, revision=revision)
    mask = radial_block_mask(**given_, target_density=target)
    assert mask.density() <= target
    scan = [radial_block_mask(**given_, decay_factor=f).density() for f in np.arange(0.02, 4, 0.06)]
    assert mask.density() >= max(density for density in scan if density <= target)


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from(["repaired", "r1", "paper"]), st.floats(0.01, 5), st.data())
def test_nothing_changes_between_break_points(shape, revision, decay, data):
    frames, tokens, block = shape
    block = 32 if revision == "paper" else block
    rules = radial_rules.rules_of(revision, "wan", tokens, None)
    points = radial_rules.break_points(frames, tokens, block, rules)
    below = max(int(np.searchsorted(points, decay, side="right")) - 1, 0)
    same = radial_rules.half_widths(frames, tokens, block, float(points[below]), rules)
    # A width just short of a whole number is that number in float32: not a decay anyone picks.
    assume(below + 1 == len(points) or points[below + 1] - decay > 1e-6)
    assert np.array_equal(radial_rules.half_widths(frames, tokens, block, decay, rules), same)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(num_frames=0), "num_frames=0 has to be a positive int"),
        (dict(tokens_per_frame=2.5), "tokens_per_frame=2.5"),
        (dict(decay_factor=0), "decay_factor=0 has to be positive"),
        (dict(decay_factor=math.inf), "decay_factor=inf"),
        (dict(model="mochi"), "model='mochi' is not one of wan, hunyuan"),
        (dict(revision="r3"), "revision='r3' is not one of repaired, r2, r1, r0, paper"),
        (dict(block_size=0), "block_size=0"),
        (dict(text_tokens=-1), "text_tokens=-1"),
        (dict(seq_len=99), "seq_len=99 has to be an int of at least 100"),
        (dict(revision="r2", seq_len=100), "needs 7 blocks of 16, the sequence has 6"),
        (dict(target_density=0.01), "target_density=0.01 is out of reach: the lowest density here"),
        (dict(target_density=0.5, decay_factor=0.5), "not both"),
        (dict(revision="paper", block_size=20), "k_block=20 has to be a multiple of 32"),
    ],
)
def test_refusals(change, said):
    given_ = dict(num_frames=5, tokens_per_frame=20, block_size=16)
    with pytest.raises(AttnControlError) as error:
        radial_block_mask(**{**given_, **change})
    assert said in str(error.value), error.value
