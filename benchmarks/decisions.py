"""What policies lose against an oracle, in simulated runs: planner errors, noise, spikes, phases, drift.

    python benchmarks/decisions.py                    60 runs of each kind, 50 decisions each; about two minutes
    python benchmarks/decisions.py --runs 10

`regret`: seconds of a run, changes included, over those of an oracle that knows every true step time, less one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fms_parallel.dynamic.knowledge import KnowledgePolicy
from fms_parallel.dynamic.policy import RulePolicy, Situation, ThompsonPolicy, Verdict
from fms_parallel.dynamic.replay import random_world, regrets

KINDS: dict[str, dict[str, Any]] = {
    "planner exact": {"mismatch": 0.0},
    "planner within 5 %": {"mismatch": 0.05},
    "planner within 10 %": {"mismatch": 0.1},
    "planner within 20 %": {"mismatch": 0.2},
    "planner within 40 %": {"mismatch": 0.4},
    "20 %, noise of 20 %": {"mismatch": 0.2, "noise": 0.2},
    "20 %, every tenth step takes 3 times as long": {"mismatch": 0.2, "noise": 0.1, "spikes": 0.1},
    "20 %, three announced phases, 1500 steps": {"mismatch": 0.2, "phases": 3, "steps": 1500},
    "20 %, all changes twice unannounced, 1500 steps": {
        "mismatch": 0.2,
        "phases": 3,
        "steps": 1500,
        "announced": False,
    },
    "20 %, a change costs 1 step": {"mismatch": 0.2, "cost": 1.0},
    "20 %, a change costs 20 steps": {"mismatch": 0.2, "cost": 20.0},
    "20 %, 2000 steps": {"mismatch": 0.2, "steps": 2000},
}
"""`random_world`'s words; 500 steps, 8 layouts, noise of 5 % and a change that costs 4 steps where nothing is said."""


class Stay:
    """Never changes: the planner's first choice, as without --dynamic."""

    def decide(self, situation: Situation) -> Verdict:
        return Verdict(situation.current, "", 0.0, 0.0)


class Told(KnowledgePolicy):
    """Knows from the start that the planner is wrong by 40 %: what can be had where it is, and what that costs else."""

    def __init__(self) -> None:
        super().__init__(scales=(0.4,), odds=(1.0,), changed=(1.0,))


POLICIES: dict[str, Any] = {
    "first choice": Stay,
    "rules": RulePolicy,
    "thompson": ThompsonPolicy,
    "knowledge": KnowledgePolicy,
    "told of 40 %": Told,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    args = parser.parse_args()
    print(f"regret, mean of {args.runs} runs +- standard error")
    print(f"{'':48}" + "".join(f"{name:>18}" for name in POLICIES))
    for name, words in KINDS.items():
        worlds = [random_world(seed, **words) for seed in range(args.runs)]
        cells = []
        for make in POLICIES.values():
            found = regrets(make, worlds)
            cells.append(f"{fmean(found):8.2%} +- {stdev(found) / len(found) ** 0.5:.2%}")
        print(f"{name:48}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
