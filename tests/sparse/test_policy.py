"""StepPolicy: the published schedules, levels, and what it refuses."""

from __future__ import annotations

import pytest
from sparse_shared import at

from attn_control import AttnControlError
from attn_control.policy import DENSE, REFRESH, SPARSE, StepPolicy
from attn_control.processors import RadialAttention
from attn_control.steps import levels_of


def steps(outcomes, name):
    return [n for n, outcome in enumerate(outcomes) if outcome == name]


# Re-ttention's code: 20 steps with a literal list of refreshes, 50 steps by a period.
@pytest.mark.parametrize(
    ("total", "first", "refreshes", "sparse"),
    [(20, 5, [5, 10, 15], 12), (50, 10, list(range(10, 50, 5)), 32),
     (50, 15, list(range(15, 50, 5)), 28)],
)  # fmt: skip
def test_the_schedules_of_re_ttention(total, first, refreshes, sparse):
    found = StepPolicy(first=first, refresh=5).outcomes(total, keeps=True)
    assert steps(found, DENSE) == list(range(first))
    assert steps(found, REFRESH) == refreshes and len(steps(found, SPARSE)) == sparse


def test_sparsed_looks_once():
    """int(128 * 0.2) + 1 dense steps, then the one at which the pattern is computed."""
    found = StepPolicy(first=26, refresh=None).outcomes(128, keeps=True)
    assert steps(found, REFRESH) == [26] and steps(found, SPARSE) == list(range(27, 128))


def test_radial_needs_no_refresh():
    found = StepPolicy(first=12, refresh=None).outcomes(50, keeps=False)
    assert steps(found, SPARSE) == list(range(12, 50)) and REFRESH not in found


def test_shares_are_rounded_down_but_not_to_nothing():
    assert StepPolicy(first=0.25).span(50) == (12, 50)
    assert StepPolicy(first=0.25, last=0.1).span(4) == (1, 3)
    assert StepPolicy(first=0.1).span(10) == (1, 10)  # 0.1 * 10 is a little less in floating point
    assert StepPolicy(first=3, last=2).span(10) == (3, 8)
    assert StepPolicy(first=0).span(10) == (0, 10)


def test_a_repeated_timestep_is_one_level():
    assert levels_of([9.0, 7.0, 7.0, 3.0, 3.0, 1.0]) == [0, 1, 1, 2, 2, 3]


def test_refreshes_follow_the_last_one_and_repeat_at_its_level():
    policy = StepPolicy(refresh=4)
    assert policy.due(7, None) and policy.due(7, 7) and not policy.due(8, 7)
    assert not policy.due(10, 7) and policy.due(11, 7)
    assert policy.due(2, 7), "a run that begins anew has nothing to go by"
    assert not StepPolicy(refresh=None).due(90, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"first": 1.0}, "first must be"), ({"first": -1}, "first must be"),
     ({"last": True}, "last must be"), ({"last": "1"}, "last must be"),
     ({"refresh": 0}, "refresh must be"), ({"refresh": 2.0}, "refresh must be"),
     ({"drift": 2.5}, "drift must be"), ({"drift": "a"}, "drift must be"),
     ({"min_tokens": -1}, "min_tokens must be"), ({"layers": 3}, "layers must be")],
)  # fmt: skip
def test_bad_values_are_named(options, words):
    with pytest.raises(AttnControlError, match=f"StepPolicy: {words}"):
        StepPolicy(**options)


def test_a_policy_may_be_given_as_in_a_job():
    control = RadialAttention(policy={"first": 3, "layers": "L0"})
    assert control.policy == StepPolicy(first=3, layers="L0")
    with pytest.raises(AttnControlError, match="unknown option 'warmup' of policy; known: first"):
        RadialAttention(policy={"warmup": 3})
    with pytest.raises(AttnControlError, match="policy must be a StepPolicy"):
        RadialAttention(policy=3)


def test_all_steps_dense_is_refused():
    with pytest.raises(AttnControlError, match="leaves no level of 4 to be sparse"):
        StepPolicy(first=2, last=2).stays_dense(at(0, levels=4), "X")
    assert StepPolicy(first=2, last=1).stays_dense(at(3, levels=4), "X")
    assert not StepPolicy(first=2, last=1).stays_dense(at(2, levels=4), "X")
