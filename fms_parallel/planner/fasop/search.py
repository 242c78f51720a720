"""FASOP's search: every tp, dp, pp, micro-batch and order of nodes, each cut into stages and priced.

It knows the seed's order of enumeration and its columns; costs come from `costs`, cuts from `partition`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.planner.fasop import partition as cut
from fms_parallel.planner.fasop.costs import Job
from fms_parallel.planner.fasop.integer_program import integer_program
from fms_parallel.planner.fasop.pipeline import stage_ends
from fms_parallel.planner.fasop.tables import Gpu, Model, known_profiles

Array = NDArray[Any]

METHODS = ("minmax", "even", "optimus-even", "dp", "ilp", "bruteforce")
SLACK = 1.10
"""A stage counts as too large when this multiple of it exceeds a device."""


@dataclass(frozen=True)
class Options:
    """What the seed's flags say.

    Attributes:
        borrow: a GPU without profile may use another GPU's; without it that is an error. corrected: two bytes per
            activation element, in-flight micro-batches per stage, micro-batches beyond the profile in proportion.
    """

    model: Model
    dataset: str
    samples: int
    gbs: int
    per_node: int = 4
    method: str = "minmax"
    bits: int = 16
    borrow: bool = True
    corrected: bool = False


@dataclass
class Row:
    """One priced configuration, in the seed's words."""

    job: Job
    cluster: str
    counts: list[int]
    layers: list[int] | None
    step: float
    parts: dict[str, float]
    is_oom: bool
    memory: float
    samples: int
    index: int = 0
    rank: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def price_per_second(self) -> float:
        """US dollars for all nodes."""
        return sum(gpu.price_per_node for gpu in self.job.nodes) / 3600

    @property
    def iterations(self) -> int:
        """Steps of one pass over the dataset."""
        return self.samples // self.job.gbs

    def columns(self) -> dict[str, Any]:
        """The seed's CSV columns."""
        job, total = self.job, self.step * self.iterations
        return {
            "index": self.index,
            "gbs": job.gbs,
            "mbs": job.mbs,
            "tp": job.tp,
            "dp": job.dp,
            "pp": job.pp,
            "node_type": [gpu.name for gpu in job.nodes],
            "gpu_cluster": self.cluster,
            "partition": self.counts,
            "partition_layers": self.layers,
            "step_time(s)": self.step,
            "throughput(samples/s)": job.gbs / self.step,
            "price_per_step($)": self.price_per_second * self.step,
            "is_oom": self.is_oom,
            "oom_gpumem(GB)": self.memory,
            "iterations": self.iterations,
            "total_time(s)": total,
            "total_time(h)": total / 3600,
            "cost($)": self.price_per_second * total,
            "rank": self.rank,
        }


def jobs(nodes: Sequence[Gpu], options: Options, profiles: Mapping[tuple[str, str, int], Array]) -> Iterator[Job]:
    """Every configuration in the seed's order: placement, micro-batch, tp, dp.

    Raises:
        ConfigError: no profile for the model on any GPU of the cluster, or a batch that nothing divides.
    """
    width = len(nodes) * options.per_node
    shards = _profiled(nodes, options, profiles)
    found = False
    for placement in _rotations(nodes):
        for mbs in (m for m in range(1, options.gbs + 1) if options.gbs % m == 0):
            for tp, tables in shards.items():
                for dp in (d for d in range(1, width // tp + 1) if width % (tp * d) == 0 and options.gbs % d == 0):
                    pp = width // (tp * dp)
                    if pp <= options.model.layers and options.gbs // dp % mbs == 0:
                        found = True
                        yield Job(
                            options.model, placement, options.per_node, tables, tp, dp, pp, mbs, options.gbs,
                            options.bits, options.corrected,
                        )  # fmt: skip
    if not found:
        raise ConfigError(
            f"no tp x dp x pp of {width} GPUs works with --gbs {options.gbs} and {options.model.layers} layers: "
            f"use a batch that shares divisors with {width}, or fewer nodes."
        )


def _rotations(nodes: Sequence[Gpu]) -> list[tuple[Gpu, ...]]:
    """The seed's placements: rotations of the sorted nodes; those that are alike count once."""
    ordered = sorted(nodes, key=lambda gpu: gpu.name)
    turned = [tuple(ordered[i:] + ordered[:i]) for i in range(len(ordered))]
    return list(dict.fromkeys(turned))


def _profiled(
    nodes: Sequence[Gpu], options: Options, profiles: Mapping[tuple[str, str, int], Array]
) -> dict[int, dict[str, Array]]:
    """tp -> profile of each GPU type, for every tp that all types have and that divides a node."""
    names, model = sorted({gpu.name for gpu in nodes}), options.model.name
    own = {name: {tp: t for (m, g, tp), t in profiles.items() if (m, g) == (model, name)} for name in names}
    missing = [name for name in names if not own[name]]
    if len(missing) == len(names) or (missing and not options.borrow):
        raise ConfigError(
            f"no profile of {model} on {', '.join(missing)}. Known: {known_profiles(profiles)}. Measure one with "
            f"fms-plan make-profile, and name its folder with --profiles."
        )
    lender = next(name for name in names if own[name])
    tables = {name: own[name] or own[lender] for name in names}
    common = set.intersection(*(set(table) for table in tables.values()))
    return {tp: {name: tables[name][tp] for name in names} for tp in sorted(common) if options.per_node % tp == 0}


def borrowed(nodes: Sequence[Gpu], model: Model, profiles: Mapping[tuple[str, str, int], Array]) -> list[str]:
    """GPU types of the cluster that have no profile of their own."""
    return sorted({g.name for g in nodes if not any((m, n) == (model.name, g.name) for m, n, _ in profiles)})


def price(job: Job, options: Options, trace: Callable[[str], None] | None = None) -> Row:
    """Cut one configuration into stages and price it."""
    types = job.stage_types()
    seconds = {name: job.node_seconds(name) for name in job.profile}
    chain = _chain(types, seconds)
    found = _partition(job, options, types, seconds, chain)
    counts, timed = found.counts, found.timed
    steps = _stages(timed, types, seconds)
    ends = _pipeline(job, timed, steps)
    replica = job.replica_seconds(float(job.parameters[: counts[0]].sum()), types[0])
    embedding = job.embedding_seconds()
    step = max(ends) + replica + embedding
    too_large, memory = _memory(job, counts, types, options)
    if trace is not None:
        spread = (max(counts) - min(counts)) * len(counts) / sum(counts)
        largest = counts.index(max(counts))
        trace(f"[{','.join(map(str, counts))}] | imbal={spread:.2%} b={largest} | step={step:.4f}s")
    layers = None if job.tp == 1 else [round(count / 8) for count in counts]
    parts = {"pipeline": max(ends), "dp": replica, "embedding": embedding}
    notes = ["micro-batch beyond the profile"] if job.beyond_profile else []
    return Row(job, _cluster(job.nodes), counts, layers, step, parts, too_large, memory, options.samples, notes=notes)


def _cluster(nodes: Sequence[Gpu]) -> str:
    names = [gpu.name for gpu in nodes]
    return ",".join(f"{name}:{names.count(name)}" for name in sorted(set(names)))


def _chain(types: Sequence[str], seconds: Mapping[str, Array]) -> Array:
    """Node times for methods that know one chain: those of the slowest type."""
    return np.asarray(seconds[max(types, key=lambda name: float(seconds[name].sum()))], dtype=float)


def _stages(counts: Sequence[int], types: Sequence[str], seconds: Mapping[str, Array]) -> list[float]:
    edges = np.concatenate([[0], np.cumsum(counts)])
    return [float(seconds[types[i]][edges[i] : edges[i + 1]].sum(dtype=float)) for i in range(len(counts))]


def _pipeline(job: Job, counts: Sequence[int], stages: Sequence[float]) -> list[float]:
    """Only the first stage pays for sending on and only the last for sending back, as in the seed."""
    if job.pp == 1:
        return [job.micros * stages[0]]
    on, back = [0.0] * job.pp, [0.0] * job.pp
    on[0] = float(job.send_seconds[0][0])
    back[-1] = float(job.send_seconds[sum(counts[:-1])][job.pp - 2])
    return stage_ends(stages, on, back, job.micros)


def _memory(job: Job, counts: list[int], types: Sequence[str], options: Options) -> tuple[bool, float]:
    """Whether a stage is too large, and the figure that the seed reports: the last such stage's, else the largest."""
    limits = {gpu.name: gpu.memory for gpu in job.nodes}
    used = job.stage_memory(counts, options.corrected)
    failing = [SLACK * gb for gb, name in zip(used, types, strict=True) if SLACK * gb > limits[name]]
    return bool(failing), failing[-1] if failing else max(used)


# ---- partitions -----------------------------------------------------------------------------------------------------


def _partition(
    job: Job, options: Options, types: Sequence[str], seconds: Mapping[str, Array], chain: Array
) -> cut.Partition:
    nodes, pp = len(chain), job.pp
    if pp == 1:
        return cut.Partition([nodes], [nodes])
    if options.method == "minmax":
        return _minmax(job, types, seconds)
    if options.method in ("even", "optimus-even"):
        counts = cut.even(nodes, pp) if job.tp == 1 else _of_layers(cut.even(job.model.layers + 2, pp))
    elif options.method == "dp":
        counts = cut.dynamic(chain, job.send_seconds, pp, job.micros, compat=not options.corrected)
    elif options.method == "ilp":
        counts = integer_program(chain, job.send_seconds, pp, job.micros)
    elif options.method == "bruteforce":
        counts = cut.brute_force(chain, pp)
    else:
        raise ConfigError(unknown("partition method", options.method, METHODS))
    return cut.Partition(counts, counts)


def _minmax(job: Job, types: Sequence[str], seconds: Mapping[str, Array]) -> cut.Partition:
    """Node by node with tp = 1; with more, whole layers, and a stage waits for the node before it, not for its own."""
    single = len(set(types)) == 1

    def times(counts: list[int]) -> list[Any]:
        if single:
            return cut.stage_seconds(counts, seconds[types[0]], job.send_seconds, 0 if job.tp == 1 else 1)
        start, found = 0, []
        for stage, count in enumerate(counts):
            work = np.float32(seconds[types[stage]][start : start + count].sum(dtype=np.float32))
            middle = 0 < stage < len(counts) - 1
            found.append(work + job.send_seconds[start - (job.tp > 1)][stage - 1] if middle else work)
            start += count
        return found

    if job.tp == 1:
        return cut.minmax(len(job.model.columns), job.pp, times)
    found = cut.minmax(job.model.layers + 2, job.pp, lambda units: times(_of_layers(units)))
    counts = _of_layers(found.counts)
    return cut.Partition(counts, counts)


def _of_layers(units: Sequence[int]) -> list[int]:
    """Units (embedding, layers, head) per stage -> nodes per stage: a layer is eight, an end is one."""
    if len(units) == 1:
        return [8 * (units[0] - 2) + 2]
    inner = [8 * count for count in units]
    return [inner[0] - 7, *inner[1:-1], inner[-1] - 7]


def ranked(rows: Sequence[Row], corrected: bool = False) -> list[Row]:
    """By total time; the seed ranks what does not fit along with the rest, `corrected` ranks it last."""
    ordered = sorted(rows, key=lambda row: (corrected and row.is_oom, row.step * row.iterations))
    for rank, row in enumerate(ordered, 1):
        row.rank = rank
    return ordered


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Rows that fit and that no other is both cheaper and faster than, cheapest first."""
    best, found = -np.inf, []
    fitting = [row for row in rows if not row.is_oom]
    for row in sorted(fitting, key=lambda r: (r.columns()["cost($)"], -r.columns()["throughput(samples/s)"])):
        speed = row.columns()["throughput(samples/s)"]
        if speed > best:
            best = speed
            found.append(row)
    return found


def clusters(nodes: Sequence[Gpu]) -> list[list[Gpu]]:
    """Every subset of a cluster that is not empty, by counts of its types."""
    names = sorted({gpu.name for gpu in nodes})
    counts = {name: sum(gpu.name == name for gpu in nodes) for name in names}
    kinds = {gpu.name: gpu for gpu in nodes}
    found: list[list[Gpu]] = [[]]
    for name in names:
        found = [[*chosen, *[kinds[name]] * n] for chosen in found for n in range(counts[name] + 1)]
    return [chosen for chosen in found if chosen]
