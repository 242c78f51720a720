"""Pipeline schedules as data: which stages a rank holds, and how many micro-batches each schedule takes.

    4 stages on 2 ranks      loop: rank 0 has 0 2, rank 1 has 1 3          v: rank 0 has 0 3, rank 1 has 1 2

It knows numbers and rules, no torch: layouts are validated, the planner counts and the strategy builds from this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from fms_parallel.errors import LayoutError, unknown
from fms_parallel.schedule_file import FileSchedule, read_schedule


@dataclass(frozen=True)
class Schedule:
    """One schedule.

    Attributes:
        torch_name: of its class in `torch.distributed.pipelining`. stages_per_rank: at least so many, and exactly so
            many unless `shape` is `loop`. shape: `single`, `loop` or `v`. fills: needs as many micro-batches as stages.
        rounds: micro-batches must divide into max(1, n // pp) rounds. splits_backward: the gradients of a stage's
            weights are found in a pass of their own, after those of its inputs.
    """

    torch_name: str
    stages_per_rank: int
    shape: str
    fills: bool = False
    rounds: bool = False
    splits_backward: bool = False

    def stages_of(self, rank: int, ranks: int, stages: int) -> list[int]:
        """The stages that pipeline rank `rank` of `ranks` holds, in order."""
        if self.shape == "v":
            return [rank, stages - 1 - rank]
        return list(range(rank, stages, ranks))

    def refusal(self, pieces: int, ranks: int, stages: int) -> str | None:
        """Why it cannot run `pieces` micro-batches over `stages` on `ranks`, and what would do; None when it can."""
        per_rank = stages // ranks
        if self.shape != "loop" and per_rank != self.stages_per_rank:
            return f"it has exactly {self.stages_per_rank} stages per rank, not {per_rank}: drop virtual_stages"
        if self.fills and pieces < stages:
            return f"{pieces} micro-batches cannot fill {stages} stages: use microbatches={stages} or more"
        rounds = max(1, pieces // ranks)
        if self.rounds and pieces % rounds:
            return f"{pieces} micro-batches do not divide into {rounds} rounds: use microbatches={rounds * ranks}"
        return None


SCHEDULES = {
    "gpipe": Schedule("GPipe", 1, "single"),
    "1f1b": Schedule("1F1B", 1, "single", fills=True),
    "interleaved1f1b": Schedule("Interleaved1F1B", 2, "loop", rounds=True),
    "looped_bfs": Schedule("LoopedBFS", 2, "loop"),
    "interleaved_zero_bubble": Schedule("InterleavedZeroBubble", 2, "loop", rounds=True, splits_backward=True),
    "zbv": Schedule("ZBVZeroBubble", 2, "v", splits_backward=True),
    "dualpipev": Schedule("DualPipeV", 2, "v", fills=True, splits_backward=True),
}

FILE = "file:"
"""`schedule=file:PATH` names a schedule of the user's own."""


def check_schedule_word(word: str) -> None:
    """Raises LayoutError for a word that names no schedule; no file is opened."""
    if not word.startswith(FILE):
        if word not in SCHEDULES:
            raise LayoutError(unknown("schedule", word, (*SCHEDULES, f"{FILE}PATH")))
        return
    path = word.removeprefix(FILE)
    if not path or "," in path or path != path.strip():
        raise LayoutError(
            f"schedule={word}: write {FILE}PATH, where PATH holds no comma and neither starts nor ends with a blank, "
            "so that a layout's text can say it."
        )


def find_schedule(word: str) -> Schedule | FileSchedule:
    """The schedule that a layout's word names.

    Raises:
        LayoutError: a file that cannot be read, or a cell of it that says nothing known.
    """
    return read_schedule(word.removeprefix(FILE)) if word.startswith(FILE) else SCHEDULES[word]


def least_stages_per_rank(word: str) -> int:
    """Stages that each rank has at least, as far as the word says it: a file's are said by `virtual_stages`."""
    return 1 if word.startswith(FILE) else SCHEDULES[word].stages_per_rank
