"""`ParallelLayout`: the one value that describes how a model is spread over ranks.

It knows words, degrees and rules; it knows nothing of torch, process groups or modules, so that a person's command
line, the planner's answer and a checkpoint's memory are checked by the same few lines before anything starts.

    "pp=2,fsdp=2,tp=2,sp"  ->  mesh (pp, dp, fsdp, cp, tp) = (2, 1, 2, 1, 2), outermost first

    rank 0..7 as a grid:      fsdp 0        fsdp 1
                       pp 0   tp [0 1]      tp [2 3]
                       pp 1   tp [4 5]      tp [6 7]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from typing import Any

from fms_parallel.errors import LayoutError, unknown
from fms_parallel.fit import check_fit, check_schedule
from fms_parallel.nearest import also, check, nearest, nearest_words
from fms_parallel.schedules import FILE, SCHEDULES, check_schedule_word, find_schedule, least_stages_per_rank
from fms_parallel.shape import ModelShape
from fms_parallel.words import (
    RECOMPUTE,
    RECOMPUTE_WORDS,
    REST,
    as_text,
    choice_reader,
    read_degree,
    read_flag,
    read_number,
    read_numbers,
    recompute_number,
    split_words,
)

AXES = ("pp", "dp", "fsdp", "cp", "tp")
"""Mesh dimensions, outermost first: neighbours on the innermost axis talk most."""

CP_METHODS = ("ring", "allgather", "ulysses")
PRECISIONS = ("fp32", "bf16", "fp64")
OFFLOADS = ("none", "params", "optimizer_state", "optimizer_step")
TP_PARTS = ("all", "attention")

ALIASES = {"ddp": "dp"}
NOT_YET = {"ep": "expert parallelism is a designed seam (see ARCHITECTURE.md); shard experts over tp instead"}


@dataclass(frozen=True)
class ParallelLayout:
    """How a model is spread over ranks. Frozen, hashable; `str()` and `to_json()` round-trip.

    Attributes:
        pp: pipeline stages. dp: replicas. fsdp: shards of every parameter. cp: shards of the sequence in attention.
        tp: shards of every matrix. Each is a degree >= 1; one of them may be `REST` until `resolve` is called.
        sp: with tp, norms, residuals and dropout hold 1/tp of the tokens.
        loss_parallel: with tp, logits stay sharded over the vocabulary up to the loss.
        tp_parts: which halves of a block tp cuts; with `attention` the feed-forward is whole on every rank, which puts
            its own tokens (sp) through it.
        schedule: pipeline schedule; `file:PATH` is one of the user's own. microbatches: pieces that a step's batch is
            cut into (pipeline only); 1 means as many as there are stages. virtual_stages: stages per rank; interleaving
            and v-shaped schedules have at least two. stage_split: blocks of each stage.
        cp_method: how context parallelism moves keys and values.
        recompute: `none`, `full`, `selective`, `every=N` (each N-th block is recomputed in the backward pass), or
            `budget=0.5` (compiled blocks keep that fraction of what they would keep).
        precision: what matrices are multiplied in; parameters and optimizer keep fp32 under bf16.
        offload: what lives on the host between uses.
        keep_gathered: with fsdp, of a model's blocks so many, the last ones, stay whole between forward and backward.
        hsdp: dp and fsdp are still open, together, until `resolve` is called.
    """

    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    cp: int = 1
    tp: int = 1
    sp: bool = False
    loss_parallel: bool = True
    tp_parts: str = "all"
    schedule: str = "1f1b"
    microbatches: int = 1
    virtual_stages: int = 1
    stage_split: tuple[int, ...] | None = None
    cp_method: str = "ring"
    recompute: str = "none"
    precision: str = "fp32"
    offload: str = "none"
    keep_gathered: int = 0
    hsdp: bool = False

    def __post_init__(self) -> None:
        self._check_kinds()
        for name in _DEFAULTS:
            _check_choice(name, getattr(self, name))
        if self.hsdp and (self.dp, self.fsdp) != (1, 1):
            raise LayoutError(f"{self}: {_HSDP_SETS_BOTH}")
        if self.degrees.count(REST) + self.hsdp > 1:
            raise LayoutError(f"{self}: only one word may take the ranks that others leave; give the others a number.")
        self._check_words_that_need_an_axis()

    def _check_kinds(self) -> None:
        """Whole numbers and flags, also when they come from JSON."""
        for name in (*AXES, "microbatches", "virtual_stages", "keep_gathered"):
            value, least = getattr(self, name), 1 if name in ("microbatches", "virtual_stages") else 0
            if not _is_count(value, least):
                raise LayoutError(f"{name}={value!r}: needs a whole number >= 1, as in {name}=2.")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise LayoutError(f"{name}={getattr(self, name)!r}: is on or off; give true or false.")
        split = self.stage_split
        if split is not None and not (isinstance(split, tuple) and split and all(_is_count(n, 1) for n in split)):
            raise LayoutError(
                f"stage_split={split!r}: needs the blocks of each stage, each >= 1, as in stage_split=4,4."
            )

    def _check_words_that_need_an_axis(self) -> None:
        """A word that would have no effect is refused, not ignored."""
        if self.sp and self.tp == 1:
            raise LayoutError("sp with tp=1: sequence parallelism shards tokens over tp; write tp=N,sp with N >= 2.")
        if not self.loss_parallel and self.tp == 1:
            raise LayoutError("loss_parallel=off with tp=1: the vocabulary is cut over tp; add tp=N or drop it.")
        if self.tp_parts != "all" and not self.sp:
            raise LayoutError(
                f"tp_parts={self.tp_parts} without sp: a feed-forward that is not cut takes a rank's own tokens; write "
                f"tp=N,sp,tp_parts={self.tp_parts}, or drop it."
            )
        if self.cp == 1 and self.cp_method != "ring":
            raise LayoutError(f"cp_method={self.cp_method} with cp=1: add cp=N or drop it.")
        if self.keep_gathered and (self.pp != 1 or (self.fsdp == 1 and not self.hsdp)):
            rule = "without fsdp nothing is gathered" if self.pp == 1 else "a pipeline's stage keeps all of its blocks"
            raise LayoutError(f"keep_gathered={self.keep_gathered}: {rule}; drop it, or use fsdp=N without pp.")
        if self.pp == 1:
            for name in ("schedule", "microbatches", "virtual_stages", "stage_split"):
                value = getattr(self, name)
                if value != _DEFAULTS[name]:
                    raise LayoutError(
                        f"{as_text(name, value)} with pp=1: it belongs to a pipeline; add pp=N or drop it."
                    )
        if self.stage_split is not None and self.pp != REST and len(self.stage_split) != self.stages:
            split, each = as_text("stage_split", self.stage_split), self.stages // self.pp
            raise LayoutError(
                f"{split}: pp={self.pp} with virtual_stages={each} needs {self.stages} numbers, one for each stage."
            )

    # ---- what others ask it -------------------------------------------------------------------------------------

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees in mesh order (pp, dp, fsdp, cp, tp)."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def resolved(self) -> bool:
        """Whether every degree is known."""
        return REST not in self.degrees and not self.hsdp

    @property
    def world_size(self) -> int:
        """Ranks that the layout needs. Raises LayoutError while a degree is still open."""
        self._refuse_open_degrees()
        return prod(self.degrees)

    @property
    def stages(self) -> int:
        """Pipeline stages over all ranks; interleaving and v-shaped schedules have at least two per rank."""
        return self.pp * max(self.virtual_stages, least_stages_per_rank(self.schedule) if self.pp > 1 else 1)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that pipeline rank `rank` holds, in order. Raises LayoutError for a file that cannot be read."""
        return find_schedule(self.schedule).stages_of(rank, self.pp, self.stages)

    @property
    def homes(self) -> tuple[int, ...]:
        """The pipeline rank of every stage; raises as `stages_of`."""
        home = {stage: rank for rank in range(self.pp) for stage in self.stages_of(rank)}
        return tuple(home[stage] for stage in range(self.stages))

    @property
    def pieces(self) -> int:
        """Micro-batches that a pipeline works on a step's rows in: `microbatches`, or as many as there are stages."""
        return self.microbatches if self.microbatches > 1 else self.stages

    @property
    def data_parallel(self) -> int:
        """Ranks that read different rows of a batch: dp * fsdp. Raises LayoutError while a degree is still open."""
        self._refuse_open_degrees()
        return self.dp * self.fsdp

    @property
    def gradient_ranks(self) -> int:
        """Ranks over whose tokens a gradient is averaged: dp * fsdp * cp. Raises LayoutError as `data_parallel`."""
        return self.data_parallel * self.cp

    def _refuse_open_degrees(self) -> None:
        if not self.resolved:
            raise LayoutError(f"{self}: a degree is still open; call resolve(world_size) first.")

    @property
    def recompute_interval(self) -> int:
        """0: recompute nothing; 1: every block; N: each N-th block. `selective` counts as 1, a budget as 0."""
        if self.recompute in RECOMPUTE:
            return 0 if self.recompute == "none" else 1
        return 0 if self.recompute_budget is not None else int(recompute_number(self.recompute))

    @property
    def recompute_budget(self) -> float | None:
        """The fraction of activations that compiled blocks may keep, or None."""
        return recompute_number(self.recompute) if str(self.recompute).startswith("budget=") else None

    # ---- from and to text ---------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str | ParallelLayout | None) -> ParallelLayout:
        """Read `"pp=2,fsdp=2,tp=2,sp"`. A bare axis (`"tp"`, `"fsdp,tp=2"`) takes the ranks that the others leave.

        Raises:
            LayoutError: an unknown word (the message lists the known ones), a word given twice, a bad number.
        """
        if isinstance(text, ParallelLayout):
            return text
        values: dict[str, Any] = {}
        for word, value in split_words(text or ""):
            name = ALIASES.get(word, word)
            if name in NOT_YET:
                raise LayoutError(f"{word}: {NOT_YET[name]}.")
            if name == "hsdp" and value is not None:
                raise LayoutError(
                    f"hsdp={value}: write dp=REPLICAS,fsdp=SHARDS, or bare hsdp for nodes x ranks per node."
                )
            if name not in _READERS:
                raise LayoutError(unknown("layout word", word, [*_READERS, *ALIASES]))
            if name in values:
                raise LayoutError(f"{text!r}: {name} is given twice.")
            values[name] = _READERS[name](name, value)
            _check_choice(name, values[name])
        try:
            if values.get("hsdp") and {"dp", "fsdp"} & values.keys():
                raise LayoutError(f"{text}: {_HSDP_SETS_BOTH}")
            return cls(**values)
        except LayoutError as error:
            raise LayoutError(f"{error}{also(nearest_words(values, _DEFAULTS, cls))}") from None

    def __str__(self) -> str:
        """The shortest text that parses back to this layout; `""` is one process."""
        values = {field: getattr(self, field) for field in _DEFAULTS}
        return ",".join(as_text(name, value) for name, value in values.items() if value != _DEFAULTS[name])

    def to_json(self) -> str:
        """One JSON object with every field."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> ParallelLayout:
        """The layout that `to_json` wrote, as text or already read.

        Raises:
            LayoutError: not a JSON object, an unknown field, or a value that no layout has.
        """
        try:
            values = json.loads(text) if isinstance(text, str) else text
        except json.JSONDecodeError as error:
            raise LayoutError(f"{text!r} is not JSON ({error}): to_json() writes what this reads.") from None
        if not isinstance(values, Mapping):
            raise LayoutError(f"{text!r} is not a JSON object: to_json() writes what this reads.")
        values = dict(values)
        for key in values:
            if key not in _DEFAULTS:
                raise LayoutError(unknown("layout field", key, _DEFAULTS))
        if isinstance(values.get("stage_split"), list):
            values["stage_split"] = tuple(values["stage_split"])
        return cls(**values)

    # ---- against a world and a model ----------------------------------------------------------------------------

    def resolve(
        self, world_size: int, ranks_per_node: int | None = None, shape: ModelShape | None = None
    ) -> ParallelLayout:
        """The same layout with every degree known, checked against the number of ranks.

        Args:
            world_size: ranks in the job.
            ranks_per_node: for bare `hsdp`: shards stay inside a node, replicas go across. On a single node (or when
                unknown) two replicas are made when the ranks can be halved.
            shape: of the model, when it is known: the layouts that a refusal names fit it too. It checks nothing.
        Raises:
            LayoutError: the degrees do not multiply to `world_size`; names the nearest layouts that do.
        """
        try:
            return self._resolved(world_size, ranks_per_node)
        except LayoutError as error:
            rules = () if shape is None else (lambda layout: check_fit(layout, shape),)
            near = nearest(self, rules, world_size) if world_size >= 1 else []
            raise LayoutError(f"{error}{also(near)}") from None

    def _resolved(self, world_size: int, ranks_per_node: int | None) -> ParallelLayout:
        if self.hsdp:
            return replace(self, **self._hsdp_degrees(world_size, ranks_per_node), hsdp=False)
        if self.resolved:
            if self.world_size != world_size:
                named = f"layout {str(self)!r}" if str(self) else "a layout without degrees"
                raise LayoutError(
                    f"{named} needs {self.world_size} ranks ({_product(self)}) but the job has {world_size}: "
                    f"start it with --nproc_per_node={self.world_size}, or change a degree."
                )
            return self
        axis = AXES[self.degrees.index(REST)]
        rest = self._rest_of(world_size, axis)
        # "tp,sp" on one rank is one process: the words of tp mean nothing there, and tp was not asked for by number.
        alone = axis == "tp" and rest == 1
        changes: dict[str, Any] = {axis: rest, "sp": self.sp and not alone}
        changes["loss_parallel"] = self.loss_parallel or alone
        changes["tp_parts"] = "all" if alone else self.tp_parts
        return replace(self, **changes)

    def _rest_of(self, world_size: int, axis: str) -> int:
        """The ranks that the known degrees leave for `axis`."""
        taken = prod(degree for degree in self.degrees if degree != REST)
        if world_size < 1 or world_size % taken:
            raise LayoutError(
                f"{self}: {axis} takes the rest, but {world_size} ranks do not divide by {taken} ({_product(self)}): "
                f"start a multiple of {taken} ranks, or change a degree."
            )
        return world_size // taken

    def _hsdp_degrees(self, world_size: int, ranks_per_node: int | None) -> dict[str, Any]:
        data = self._rest_of(world_size, "hsdp")
        per_node = (ranks_per_node or world_size) // (world_size // data)
        if 1 <= per_node < data and data % per_node == 0:
            return {"dp": data // per_node, "fsdp": per_node}
        return {"dp": 2, "fsdp": data // 2} if data % 2 == 0 else {"dp": 1, "fsdp": data}

    def validate(self, shape: ModelShape) -> None:
        """Check that a model of this shape can be cut this way.

        Raises:
            LayoutError: naming the number, the rule and the nearest layouts that work; also while a degree is open.
        """
        self._refuse_open_degrees()
        check(self, lambda layout: check_fit(layout, shape))

    def check_schedule(self) -> None:
        """Raises LayoutError when the schedule cannot run these stages and micro-batches, or its file not be read."""
        self._refuse_open_degrees()
        check(self, check_schedule)


# ---- helpers of this page ---------------------------------------------------------------------------------------

_DEFAULTS = {f.name: f.default for f in fields(ParallelLayout)}
_CHOICES = {"tp_parts": TP_PARTS, "cp_method": CP_METHODS, "precision": PRECISIONS, "offload": OFFLOADS}
_FLAGS = ("sp", "loss_parallel", "hsdp")
_HSDP_SETS_BOTH = "hsdp already sets dp and fsdp; drop it or drop them."


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_choice(name: str, value: Any) -> None:
    """Raises LayoutError for a word that is none of those that a field can have."""
    if name == "schedule":
        check_schedule_word(str(value))
    elif name == "recompute":
        recompute_number(value)
    elif name in _CHOICES and value not in _CHOICES[name]:
        raise LayoutError(unknown(name, str(value), _CHOICES[name]))


_CHOICE_WORDS = {**_CHOICES, "recompute": RECOMPUTE_WORDS, "schedule": (*SCHEDULES, f"{FILE}PATH")}
_READERS: dict[str, Callable[[str, str | None], Any]] = {
    **{axis: read_degree for axis in AXES},
    **{name: read_flag for name in _FLAGS},
    **{name: read_number for name in ("microbatches", "virtual_stages", "keep_gathered")},
    **{name: choice_reader(known) for name, known in _CHOICE_WORDS.items()},
    "stage_split": read_numbers,
}


def _product(layout: ParallelLayout) -> str:
    known = [f"{axis}={degree}" for axis, degree in zip(AXES, layout.degrees, strict=True) if degree > 1]
    return " * ".join(known) or "every degree is 1"
