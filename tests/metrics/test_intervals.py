"""Intervals against theory: known values, coverage by simulation, and refusals."""

import numpy as np
import pytest

from attn_control.errors import AttnControlError
from attn_control.metrics import bootstrap_mean, bootstrap_paired, wilson


def test_the_same_input_gives_the_same_interval():
    values = np.random.default_rng(1).random(30)
    assert bootstrap_mean(values) == bootstrap_mean(list(values))
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_the_interval_agrees_with_the_normal_one_on_a_large_sample():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2_000)
    found = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize("size,least", [(24, 0.90), (60, 0.92)])
def test_coverage_of_single_observations(size, least):
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(300):
        found = bootstrap_mean(rng.random(size) < 0.6, resamples=1_000, seed=trial)
        hits += not found.excludes(0.6)
    assert least <= hits / 300 <= 0.99


def test_coverage_needs_groups_where_seeds_of_a_prompt_agree():
    """Eight prompts of three seeds, each easy or hard: redrawing pictures is overconfident."""
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(8), 3)
    grouped = single = 0
    for trial in range(300):
        values = rng.random(24) < np.repeat(rng.beta(0.5, 0.5, size=8), 3)
        grouped += not bootstrap_mean(
            values, groups=list(groups), resamples=1_000, seed=trial
        ).excludes(0.5)
        single += not bootstrap_mean(values, resamples=1_000, seed=trial).excludes(0.5)
    assert grouped / 300 >= 0.90
    assert single / 300 <= 0.87


def test_groups_of_unequal_size_keep_the_mean_of_all_values():
    found = bootstrap_mean([1, 1, 1, 0], groups=["a", "a", "a", "b"])
    assert found.mean == 0.75
    assert (found.low, found.high, found.n, found.groups) == (0.0, 1.0, 4, 2)


def test_a_paired_difference_forgets_what_the_pairs_share():
    rng = np.random.default_rng(5)
    hard = rng.normal(0, 10, size=40)
    paired = bootstrap_paired(hard + 1 + rng.normal(0, 0.1, size=40), hard)
    assert paired.mean == pytest.approx(1, abs=0.1)
    assert paired.high - paired.low < 0.1
    assert paired.excludes(0.0)


def test_blocks_do_not_change_the_result(monkeypatch):
    from attn_control.metrics import intervals

    values = np.random.default_rng(6).random(50)
    whole = bootstrap_mean(values, resamples=500)
    monkeypatch.setattr(intervals, "_BLOCK", 1_000)
    assert bootstrap_mean(values, resamples=500) == whole


def test_wilson_against_published_values():
    # Newcombe 1998, table I: 81 of 263 and 15 of 148 at 95 %; 0 of 20.
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)]:
        found = wilson(successes, n)
        assert (found.low, found.high) == (
            pytest.approx(low, abs=5e-5),
            pytest.approx(high, abs=5e-5),
        )
    assert wilson(0, 20).low == 0.0
    assert wilson(0, 20).high == pytest.approx(0.1611, abs=5e-5)
    assert wilson(20, 20).high == 1.0


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: bootstrap_mean([]), "non-empty"),
        (lambda: bootstrap_mean([1.0, float("nan")]), "nan"),
        (lambda: bootstrap_mean([1.0], level=1.5), "1.5"),
        (lambda: bootstrap_mean([1.0], resamples=0), "resamples"),
        (lambda: bootstrap_mean([1.0, 2.0], groups=["a"]), "1 groups for 2 values"),
        (lambda: bootstrap_paired([1.0], [1.0, 2.0]), "1 values against 2"),
        (lambda: wilson(3, 2), "3 of 2"),
    ],
)
def test_refusals_name_the_value(call, words):
    with pytest.raises(AttnControlError, match=words):
        call()
