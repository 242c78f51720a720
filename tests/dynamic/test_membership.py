"""What members conclude from the words in the store; the protocol with real processes is in tests/distributed."""

from __future__ import annotations

import json

import torch.distributed as dist

from fms_parallel.dynamic.membership import PREFIX, Membership, Plan, report_dead


def watched(members: tuple[str, ...], generation: int) -> tuple[Membership, dist.Store]:
    """Member "0" of a generation that the store calls the latest."""
    store = dist.HashStore()
    words = dist.PrefixStore(PREFIX, store)
    words.set(f"plan/{generation}", json.dumps({"members": members, "said": {}, "joins": 0}))
    words.set("latest", str(generation))
    member = Membership(lambda: store, "0")
    member._watch.follow(Plan(generation, members, {}))
    return member, store


def test_the_death_of_a_member_ends_its_generation() -> None:
    member, store = watched(("0", "2"), 1)
    report_dead(store, "2", "signal SIGKILL")
    member._watch._look()
    assert member.lost.is_set() and member.is_dead("2")


def test_the_death_of_one_left_behind_does_not_end_the_next_generation() -> None:
    """A frozen member is killed when the others have given it up, often after they have met: no second meeting."""
    member, store = watched(("0", "2"), 1)
    report_dead(store, "1", "signal SIGKILL")
    member._watch._look()
    assert member.is_dead("1") and not member.lost.is_set()
