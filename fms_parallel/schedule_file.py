"""A pipeline schedule from a file: the CSV that torch.distributed.pipelining loads, checked before any rank starts.

    0F0,0F1,0B0,0B1         a row is a rank, a cell what it does next: stage, kind, micro-batch
    ,1F0,1B0,1F1,1B1        an empty cell only lines up columns

    F   forward             B   whole backward          I, then later W   its two parts: inputs first, then weights
    (0F2;3B0)OVERLAP_F_B    several in one cell, whose inputs must all be there before it begins

Stages may lie on ranks in any way. It knows text, numbers and rules; no torch, and no layout.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from fms_parallel.errors import LayoutError

FORWARD, BACKWARD, INPUTS, WEIGHTS = "F", "B", "I", "W"

_ACTION = re.compile(rf"(\d+)([{FORWARD}{BACKWARD}{INPUTS}{WEIGHTS}])(\d+)")
_SEVERAL = re.compile(r"\(([^()]*)\)OVERLAP_F_B")
_MOVES = re.compile(r"\d+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)\d*")


class Action(NamedTuple):
    """One piece of work; prints as a cell says it."""

    stage: int
    kind: str
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro}"


Cell = tuple[Action, ...]


@dataclass(frozen=True)
class FileSchedule:
    """What every rank does, in order. `rows`: one per rank, cells as in the file."""

    rows: tuple[tuple[Cell, ...], ...]

    def stages_of(self, rank: int, ranks: int, stages: int) -> list[int]:
        """The stages that pipeline rank `rank` of `ranks` holds, in order."""
        return sorted({action.stage for action in self.order(rank)}) if rank < len(self.rows) else []

    def order(self, rank: int) -> list[Action]:
        """What a rank does, one after the other."""
        return [action for cell in self.rows[rank] for action in cell]

    @property
    def splits_backward(self) -> bool:
        """Whether the gradients of some stage's weights are found in a pass of their own."""
        return any(action.kind == WEIGHTS for _, action in self._placed())

    def refusal(self, pieces: int, ranks: int, stages: int) -> str | None:
        """Why it cannot run `pieces` micro-batches over `stages` on `ranks`, and what would do; None when it can."""
        checks = (self._wrong_size(pieces, ranks, stages), self._wrong_places(), self._wrong_work(), self._deadlock())
        return next((problem for check in checks for problem in check), None)

    # ---- the rules --------------------------------------------------------------------------------------------------

    def _wrong_size(self, pieces: int, ranks: int, stages: int) -> Iterator[str]:
        """Rows are ranks; stages and micro-batches are those of the layout."""
        if not self.rows:
            yield "the file is empty"
        if len(self.rows) != ranks:
            yield f"the file has {len(self.rows)} rows, one for each rank: write pp={len(self.rows)}, or {ranks} rows"
        found = 1 + max((action.stage for _, action in self._placed()), default=-1)
        if found % ranks or not found:
            yield f"the file has {found} stages: they must be a multiple of its {ranks} ranks"
        if found != stages:
            yield f"the file has {found} stages, the layout {stages}: write virtual_stages={found // ranks}"
        micros = 1 + max(action.micro for _, action in self._placed())
        if micros < 2:
            yield "the file has one micro-batch: nothing can overlap, use 2 or more"
        if micros != pieces:
            yield f"the file has {micros} micro-batches, the layout {pieces}: write microbatches={micros}"

    def _wrong_places(self) -> Iterator[str]:
        """Every stage is on one rank, and every rank has one."""
        home: dict[int, tuple[int, str]] = {}
        for row, cells in enumerate(self.rows):
            if not any(cells):
                yield f"row {row + 1} does nothing: every rank needs a stage"
            for place, action in self._placed(row):
                other, first = home.setdefault(action.stage, (row, place))
                if other != row:
                    yield f"{place}: stage {action.stage} is on another rank already ({first}); a stage has one"

    def _wrong_work(self) -> Iterator[str]:
        """Every micro-batch goes forward once and backward once through every stage, in that order."""
        done: dict[Action, str] = {}
        for place, action in self._placed():
            stage, kind, micro = action
            if action in done:
                yield f"{place}: was done already in {done[action]}"
            other = {BACKWARD: (INPUTS, WEIGHTS), INPUTS: (BACKWARD,), WEIGHTS: (BACKWARD,)}.get(kind, ())
            for twin in (Action(stage, kind, micro) for kind in other):
                if twin in done:
                    yield f"{place}: {done[twin]} goes backward as well; use either B, or I and W"
            before = Action(stage, INPUTS if kind == WEIGHTS else FORWARD, micro)
            if kind != FORWARD and before not in done:
                yield f"{place}: comes before {before}, which it needs"
            done[action] = place
        stages, micros = 1 + max(a.stage for a in done), 1 + max(a.micro for a in done)
        for stage in range(stages):
            for micro in range(micros):
                kinds = {kind for kind in "FBIW" if Action(stage, kind, micro) in done}
                if kinds not in ({"F", "B"}, {"F", "I", "W"}):
                    missing = "F" if "F" not in kinds else "W" if "I" in kinds else "B"
                    rule = "each micro-batch goes forward and backward once per stage"
                    yield f"{stage}{missing}{micro} is missing: {rule}"

    def _deadlock(self) -> Iterator[str]:
        """Ranks run their cells in order; a cell begins when what other stages hand on is there."""
        done: set[Action] = set()
        at = [0] * len(self.rows)
        last = max(action.stage for _, action in self._placed())
        moved = True
        while moved:
            moved = False
            for row, cells in enumerate(self.rows):
                while at[row] < len(cells) and all(_ready(action, done, last) for action in cells[at[row]]):
                    done.update(cells[at[row]])
                    at[row] += 1
                    moved = True
        stuck = [
            f"row {row + 1}, cell {at[row] + 1} ({action}) waits for {_source(action)}"
            for row, cells in enumerate(self.rows)
            for action in (cells[at[row]] if at[row] < len(cells) else ())
            if not _ready(action, done, last)
        ]
        if stuck:
            yield f"ranks wait for each other for ever: {'; '.join(stuck)}. Move what is waited for to an earlier cell"

    def _placed(self, only: int | None = None) -> Iterator[tuple[str, Action]]:
        """Every action with its place, row by row."""
        for row, cells in enumerate(self.rows):
            if only in (None, row):
                for column, cell in enumerate(cells):
                    yield from ((f"row {row + 1}, cell {column + 1} ({action})", action) for action in cell)


def _source(action: Action) -> str:
    """What another stage must have done before `action`."""
    if action.kind == FORWARD:
        return f"{action.stage - 1}F{action.micro}"
    return f"{action.stage + 1}B{action.micro} (or {action.stage + 1}I{action.micro})"


def _ready(action: Action, done: set[Action], last: int) -> bool:
    """Whether what other stages hand on to `action` is there; what its own stage does first is earlier in its row."""
    stage, kind, micro = action
    if kind == FORWARD:
        return stage == 0 or Action(stage - 1, FORWARD, micro) in done
    return kind == WEIGHTS or stage == last or any(Action(stage + 1, k, micro) in done for k in (BACKWARD, INPUTS))


# ---- in and out -----------------------------------------------------------------------------------------------------


def read_schedule(path: str) -> FileSchedule:
    """The schedule in a CSV file.

    Raises:
        LayoutError: no such file, or a cell that says nothing known; names the file, the row and the cell.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LayoutError(f"schedule=file:{path} cannot be read: {error}.") from None
    while rows and not "".join(rows[-1]).strip() and len(rows[-1]) < 2:
        rows.pop()  # an empty line at the end is no rank
    return parse_cells(rows, f"schedule=file:{path}")


def parse_cells(rows: Sequence[Sequence[str]], source: str) -> FileSchedule:
    """The schedule that rows of cells describe; errors as in `read_schedule`, naming `source`."""
    return FileSchedule(
        tuple(tuple(_read(text.strip(), source, r, c) for c, text in enumerate(row)) for r, row in enumerate(rows))
    )


def _read(text: str, source: str, row: int, column: int) -> Cell:
    if not text:
        return ()
    several = _SEVERAL.fullmatch(text)
    found = [_ACTION.fullmatch(part.strip()) for part in (several[1].split(";") if several else [text])]
    if any(match is None for match in found):
        place = f"{source}, row {row + 1}, cell {column + 1} ({text!r})"
        if _MOVES.fullmatch(text):
            raise LayoutError(
                f"{place}: sends, receives and gathers are added by torch; leave forward and backward only."
            )
        raise LayoutError(f"{place}: write stage, kind and micro-batch, as in 0F3; kinds are F, B, I and W.")
    return tuple(Action(int(match[1]), match[2], int(match[3])) for match in found if match)


def cell_text(cell: Cell) -> str:
    """The text of a cell that reads back as `cell`."""
    several = ";".join(map(str, cell))
    return f"({several})OVERLAP_F_B" if len(cell) > 1 else several


def write_schedule(schedule: FileSchedule, path: str | Path) -> None:
    """Write the CSV file, rows padded to one length.

    Raises:
        LayoutError: it cannot be written.
    """
    texts = [[cell_text(cell) for cell in row] for row in schedule.rows]
    padded = zip(*zip_longest(*texts, fillvalue=""), strict=True)
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(padded)
    except OSError as error:
        raise LayoutError(f"the schedule cannot be written: {error}.") from None


def of_orders(orders: Sequence[Sequence[Action]]) -> FileSchedule:
    """A schedule with one action per cell."""
    return FileSchedule(tuple(tuple((action,) for action in order) for order in orders))
