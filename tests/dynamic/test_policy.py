"""Policies against replayed worlds: regret over an oracle, break-even, no change without a reason."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import fmean

import pytest

from fms_parallel.dynamic.knowledge import KnowledgePolicy
from fms_parallel.dynamic.policy import Arm, RulePolicy, Situation, ThompsonPolicy, get_policy
from fms_parallel.dynamic.replay import World, random_world, regrets, replay
from fms_parallel.errors import ConfigError

ARMS = (Arm("a", 1.0, ("dp=2",)), Arm("b", 0.8, ("tp=2",)), Arm("c", 1.2, ("pp=2",)))


def situation(**values: object) -> Situation:
    given: dict = {"current": "a", "arms": ARMS, "remaining": 100, "since": 50, "cost": lambda name: 4.0}
    return Situation(**{**given, "seconds": 1.0, "spread": 0.02, **values})


@pytest.mark.parametrize("make", [RulePolicy, ThompsonPolicy, KnowledgePolicy])
def test_a_change_is_made_when_what_it_wins_is_above_what_it_costs(make: type) -> None:
    assert make().decide(situation()).arm == "b"  # 100 steps win 20 s
    assert make().decide(situation(remaining=15)).arm == "a"  # 15 steps win 3 s
    assert make().decide(situation(cost=lambda name: 40.0)).arm == "a"
    assert make().decide(situation(since=3)).arm == "a"  # it has only just changed
    assert make().decide(situation(since=3, urgent=True)).arm == "b"


def test_rules_leave_a_layout_that_disappoints() -> None:
    policy = RulePolicy()
    assert policy.decide(situation()).arm == "b"
    verdict = policy.decide(situation(current="b", seconds=1.3))
    assert verdict.arm == "a" and verdict.now == pytest.approx(1.3) and "instead of 1.3" in verdict.reason


def test_thompson_knows_what_it_measured_and_less_of_others() -> None:
    policy = ThompsonPolicy()
    for _ in range(20):
        policy.decide(situation(seconds=2.0))
    mean, covariance = policy.posterior(ARMS)
    assert mean[0] == pytest.approx(0.693, abs=0.02) and covariance[0, 0] < 1e-3
    assert 0.3 < mean[1] < 0.7 and covariance[1, 1] > 10 * covariance[0, 0]  # the machine is slower, for all


def test_a_trial_is_made_only_when_enough_steps_are_left_to_pay_for_it() -> None:
    def tried(remaining: int) -> int:
        """By how many of 40 policies, though it is predicted to be slower."""
        arms, count = (Arm("a", 1.0, ("dp=2",)), Arm("b", 1.05, ("tp=2",))), 0
        for seed in range(40):
            policy = ThompsonPolicy(seed=seed)
            now = situation(arms=arms, remaining=remaining, cost=lambda name: 1.0, since=0)
            for _ in range(5):
                policy.decide(now)
            count += policy.decide(replace(now, since=50)).arm == "b"
        return count

    assert tried(60) == 0 and 5 <= tried(600) <= 35


def test_thompson_forgets_at_once_when_things_change_twice() -> None:
    policy = ThompsonPolicy()
    for _ in range(20):
        policy.decide(situation(seconds=1.0))
    for seconds in (3.0, 3.0, 3.0, 3.0):
        policy.decide(situation(seconds=seconds))
    assert policy.posterior(ARMS)[0][0] == pytest.approx(1.0986, abs=0.3)


@pytest.mark.parametrize("make", [RulePolicy, ThompsonPolicy, KnowledgePolicy])
def test_what_was_measured_on_another_machine_does_not_count(make: type) -> None:
    policy = make()
    for _ in range(5):  # b disappoints while rank 1 is slow
        policy.decide(situation(current="b", seconds=2.0, condition=(1, 3)))
        policy.decide(situation(condition=(1, 3)))
    assert policy.decide(situation(condition=(1, 3))).arm == "a"
    assert policy.decide(situation(condition=(1, 1))).arm == "b"


MISMATCHES = (0.0, 0.2)


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_regret_after_fifty_decisions_is_below_five_percent_and_near_the_rules(mismatch: float) -> None:
    worlds = [random_world(seed, mismatch=mismatch) for seed in range(8)]
    ruled = fmean(regrets(RulePolicy, worlds))
    for make in (ThompsonPolicy, KnowledgePolicy):
        learned = fmean(regrets(make, worlds))
        assert learned <= 0.05 and learned <= ruled + 0.02


@pytest.mark.parametrize("make", [ThompsonPolicy, KnowledgePolicy])
def test_learned_policy_beats_the_rules_where_predictions_are_wrong(make: type) -> None:
    worlds = [random_world(seed, mismatch=0.2, noise=0.1, spikes=0.05) for seed in range(8)]
    assert fmean(regrets(make, worlds)) < 0.6 * fmean(regrets(RulePolicy, worlds))


def test_default_loses_half_of_what_thompson_does_where_the_world_turns_over() -> None:
    words = {"mismatch": 0.2, "phases": 3, "steps": 1500, "announced": False}
    worlds = [random_world(seed, **words) for seed in range(12)]
    assert isinstance(get_policy("knowledge"), KnowledgePolicy)
    assert fmean(regrets(KnowledgePolicy, worlds)) < 0.6 * fmean(regrets(ThompsonPolicy, worlds))


def test_planner_that_proves_wrong_is_believed_less() -> None:
    policy = KnowledgePolicy()
    assert [round(odds, 2) for odds, *_ in policy.beliefs(ARMS)] == [0.6, 0.25, 0.15]
    for current, seconds in (("a", 1.0), ("b", 1.6)):  # twice as long as predicted beside a
        policy.decide(situation(current=current, seconds=seconds))
    (right, *_), _, (wrong, _, spread) = policy.beliefs(ARMS)
    assert wrong > 0.8 and right < 1e-6 and spread[2, 2] > 0.1  # c may be far from what was predicted


@pytest.mark.parametrize("make", [RulePolicy, ThompsonPolicy, KnowledgePolicy])
def test_a_policy_that_was_written_down_decides_as_if_nothing_had_happened(make: type) -> None:
    draws = [1.0 + 0.05 * ((7 * step) % 11) for step in range(40)]
    told = [situation(seconds=seconds, condition=(1.0, 2.0), remaining=900 - 10 * n) for n, seconds in enumerate(draws)]
    whole, before, after = make(), make(), make()
    expected = [whole.decide(one) for one in told]
    for one in told[:20]:
        before.decide(one)
    after.recall(json.loads(json.dumps(before.learned())))
    assert [after.decide(one) for one in told[20:]] == expected[20:]


@pytest.mark.parametrize("make", [RulePolicy, ThompsonPolicy, KnowledgePolicy])
def test_oracle_is_reached_exactly_when_the_first_layout_is_much_the_best(make: type) -> None:
    world = World(((1.0, 3.0),), ((1.0, 3.0),), (0,), (1.0, 1.0), (("a",), ("b",)), noise=0.05, steps=100)
    found = replay(world, make())
    assert abs(found.regret) < 1e-9 and found.switches == 0


def test_both_phases_get_their_layout() -> None:
    times = ((1.0, 2.0), (2.0, 1.0))
    world = World(times, times, (0, 50), (3.0, 3.0), (("a",), ("b",)), noise=0.02, steps=100)
    for policy in (RulePolicy(), ThompsonPolicy()):
        found = replay(world, policy)
        assert found.path == (0,) * 5 + (1,) * 5 and found.switches == 1 and abs(found.regret) < 1e-9


def test_unknown_policy_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'thompson'"):
        get_policy("tompson")
