"""The event simulator against closed forms, against a brute-force order, and its own rules."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fms_parallel.errors import ConfigError
from fms_parallel.planner.simulate import F, Stages, Work, idle, makespan, run_orders, simulate

f, b = 1.0, 2.0


def even(stages: int) -> Stages:
    return Stages([f] * stages, [b] * stages)


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 2), (4, 4), (4, 9), (8, 8), (3, 1)])
def test_1f1b_and_gpipe_take_m_plus_p_minus_1_slots(p: int, m: int) -> None:
    for name in ("1f1b", "gpipe"):
        assert makespan(simulate(name, p, m, even(p))) == pytest.approx((m + p - 1) * (f + b))


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 4), (4, 2, 8), (4, 3, 12), (4, 5, 4)])
def test_interleaving_divides_the_bubble_by_v(p: int, v: int, m: int) -> None:
    for name in ("interleaved1f1b", "looped_bfs"):
        # stages of 1/v of the work
        stages = Stages([f / v] * p * v, [b / v] * p * v)
        expected = m * (f + b) + (p - 1) * (f + b) / v
        assert makespan(simulate(name, p, m, stages)) == pytest.approx(expected)


def test_zero_bubble_waits_less_than_1f1b() -> None:
    p, m = 4, 16
    plain = makespan(simulate("1f1b", p, m, Stages([2.0] * p, [4.0] * p)))
    vee = simulate("zbv", p, m, Stages([1.0] * 2 * p, [2.0] * 2 * p))
    # both directions of a V start together: nothing but the first fill is lost
    assert makespan(vee) < plain - (p - 1) * 3
    assert makespan(vee) >= m * 6


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["1f1b", "gpipe", "interleaved1f1b", "looped_bfs", "zbv", "interleaved_zero_bubble"]),
    st.integers(2, 4),
    st.integers(1, 3),
    st.lists(st.floats(0.1, 3.0), min_size=8, max_size=8),
    st.floats(0, 0.5),
)
def test_every_schedule_keeps_its_promises(name: str, p: int, turns: int, times: list[float], send: float) -> None:
    virtual = 1 if name in ("1f1b", "gpipe") else 2
    count, m = p * virtual, p * turns
    stages = Stages(times[:count], [2 * t for t in times[:count]], send=send)
    events = simulate(name, p, m, stages)
    ends = {event.work: event for event in events}
    assert len(ends) == len(events)
    for kind in "FB":
        assert {(w.stage, w.micro) for w in ends if w.kind == kind} == {(s, i) for s in range(count) for i in range(m)}
    for event in events:
        work = event.work
        if work.kind == F and work.stage:
            before = ends[Work(F, work.stage - 1, work.micro)]
            assert event.start >= before.end + (send if before.rank != event.rank else 0) - 1e-9
        if work.kind == "B":
            assert event.start >= ends[Work(F, work.stage, work.micro)].end - 1e-9
    for rank in range(p):
        own = sorted((e.start, e.end) for e in events if e.rank == rank)
        assert all(a[1] <= c[0] + 1e-9 for a, c in pairwise(own))


def test_slowest_stage_decides_a_long_run() -> None:
    # The middle stage waits for the first forward, then never again, and the first stage's backward comes after it.
    stages = Stages([1, 3, 1], [2, 6, 2])
    assert makespan(simulate("1f1b", 3, 50, stages)) == pytest.approx(1 + 50 * 9 + 2)


def test_idle_is_the_bubble() -> None:
    events = simulate("1f1b", 4, 4, even(4))
    assert idle(events, 4) == pytest.approx(3 / 7)


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ConfigError, match="waits for itself"):
        run_orders([[Work("B", 0, 0), Work(F, 0, 0)]], even(1))
    with pytest.raises(ConfigError, match="equally many"):
        simulate("1f1b", 2, 2, even(3))
    with pytest.raises(ConfigError, match="Did you mean '1f1b'"):
        simulate("1f1", 2, 2, even(2))
