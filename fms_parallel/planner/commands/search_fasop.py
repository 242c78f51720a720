"""Search as FASOP does: its profiles, its partitions, its tables.

fms-plan search --compat fasop --gpus A40 8 --model-type llama70b --gbs 32 --dataset squad --gpu-per-node 4
fms-plan search --compat fasop --gpus A40 8 --pareto --dataset squad --csv pareto.csv --make-pareto pareto.png

--gpus names nodes, as in the original: A40 8 are eight nodes of --gpu-per-node GPUs. The original's mistakes are kept;
--corrected ranks what does not fit last, counts activations in bytes and extends profiles in proportion.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from fms_parallel.planner.commands import common

if TYPE_CHECKING:
    from fms_parallel.planner.fasop.output import Lines
    from fms_parallel.planner.fasop.search import Options, Row
    from fms_parallel.planner.fasop.tables import Gpu

METHODS = ("minmax", "even", "optimus-even", "dp", "ilp", "bruteforce")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `fms-plan search --compat fasop`."""
    job = parser.add_argument_group("the job")
    job.add_argument("--gpus", nargs="+", metavar="TYPE NODES", help="A40 8 [A100 1 ...]: nodes, not GPUs")
    job.add_argument("--model-type", default="llama70b", help="(default: %(default)s)")
    job.add_argument("--dataset", default="squad", help="for iterations, total time and cost (default: %(default)s)")
    job.add_argument("--gbs", type=int, default=32, help="global batch (default: %(default)s)")
    job.add_argument("--gpu-per-node", type=int, help="(default: 4, and 8 with --pareto)")
    job.add_argument("--precision", type=int, choices=(16, 32), default=16, help="bits (default: %(default)s)")
    job.add_argument("--profiles", metavar="FOLDER", help="NPZ profiles (default: those of the package)")
    search = parser.add_argument_group("the search")
    search.add_argument("--pp-partition-method", choices=METHODS, default="minmax", help="(default: %(default)s)")
    search.add_argument("--exhaustive", action="store_true", help="price `tp pp dp mbs` lines from standard input")
    search.add_argument("--corrected", action="store_true", help="without the original's mistakes")
    search.add_argument("--no-borrow", action="store_true", help="refuse a GPU without a profile of its own")
    pareto = parser.add_argument_group("subsets of the cluster")
    pareto.add_argument("--pareto", action="store_true", help="also every smaller cluster")
    pareto.add_argument("--pareto-gbs-max", type=int, help="and every batch 1, 2, 4, ... up to this")
    pareto.add_argument(
        "--make-pareto",
        nargs="?",
        const="",
        metavar="FILE.png",
        help="plot cost against throughput (default: beside --csv)",
    )
    pareto.add_argument("--only-make-pareto", metavar="FILE.csv", help="search nothing, plot such a table again")
    pareto.add_argument("--pareto-title", default="Pareto", help="of the plot")
    output = parser.add_argument_group("output")
    output.add_argument("--csv", metavar="FILE", help="write the table with the original's columns")
    output.add_argument("--no-save-csv", action="store_true", help="write no table, as without --csv")
    output.add_argument("--log-file", metavar="FILE", help="write what is shown, traces included, to a file as well")
    output.add_argument(
        "--add-exp-name", default="", metavar="NAME", help="put _NAME behind the name of every file written"
    )
    output.add_argument("--parsing", action="store_true", help="JSON lines as configurations are priced")
    output.add_argument("--parsing-file", metavar="FILE", help="write those lines to a file")
    output.add_argument("--verbose", action="store_true", help="trace every partition on standard error")
    output.add_argument("--top", type=int, default=10, help="rows that are shown (default: %(default)s)")
    output.add_argument("--json", action="store_true", help="one JSON object with every row")


def run(args: argparse.Namespace) -> int:
    """Search and show."""
    from fms_parallel.planner.fasop import output

    args = name_files(args)
    if args.only_make_pareto:
        output.write_plot(output.read_csv(args.only_make_pareto), args.make_pareto, args.pareto_title)
        common.say(f"drawn to {args.make_pareto}")
        return 0
    with output.copied(args.log_file):
        return _search(args)


def name_files(args: argparse.Namespace) -> argparse.Namespace:
    """The same flags with the files that are written: `--add-exp-name` in their names, the plot beside its table.

    Raises:
        ConfigError: --no-save-csv with --csv, or a plot that no flag gives a place.
    """
    from pathlib import Path

    from fms_parallel.errors import ConfigError

    if args.no_save_csv and args.csv:
        raise ConfigError(f"--no-save-csv and --csv {args.csv} contradict each other: drop one.")
    found = argparse.Namespace(**vars(args))
    table = args.csv or args.only_make_pareto
    if args.only_make_pareto or args.make_pareto == "":
        if not (table or args.make_pareto):
            raise ConfigError(
                "--make-pareto has no place to write to: name a file, or add --csv and it lies beside it."
            )
        found.make_pareto = args.make_pareto or str(Path(table).with_suffix(".png"))
    for name in ("csv", "make_pareto", "parsing_file", "log_file"):
        path = getattr(found, name)
        if path and args.add_exp_name:
            place = Path(path)
            setattr(found, name, str(place.with_name(f"{place.stem}_{args.add_exp_name}{place.suffix}")))
    return found


def _search(args: argparse.Namespace) -> int:
    from fms_parallel.planner.fasop import output, search, tables

    began = time.perf_counter()
    nodes, options, batches = read_job(args)
    profiles = tables.load_profiles(args.profiles)
    lacking = search.borrowed(nodes, options.model, profiles)
    rows: list[Row] = []
    lines = output.Lines(args.parsing, args.parsing_file)
    if args.exhaustive:
        rows = list(_asked(nodes, options, profiles))
    else:
        for chosen, one in output.experiments(nodes, options, args.pareto, batches):
            rows += _priced(list(search.jobs(chosen, one, profiles)), one, lines, args.verbose)
    ordered = search.ranked(rows, args.corrected)
    if args.csv:
        output.write_csv(ordered, args.csv)
    if args.make_pareto:
        output.write_plot([row.columns() for row in ordered], args.make_pareto, args.pareto_title)
    seconds = time.perf_counter() - began
    if lacking:
        sys.stderr.write(f"note: no profile of {options.model.name} on {', '.join(lacking)}; another GPU's is used.\n")
    if args.json:
        common.say_json(output.as_json(ordered, seconds, lacking))
    elif not args.parsing:
        common.say(output.as_text(ordered, args.top, seconds))
        written = [path for path in (args.csv, args.make_pareto, args.parsing_file) if path]
        if written:
            common.say(f"written to {', '.join(written)}")
    return 0


def read_job(args: argparse.Namespace) -> tuple[list[Gpu], Options, list[int]]:
    """Nodes, options and batches of the flags.

    Raises:
        ConfigError: a flag that is missing or impossible.
    """
    from fms_parallel.errors import ConfigError
    from fms_parallel.planner.fasop.search import Options
    from fms_parallel.planner.fasop.tables import find_gpu, find_model, samples_of

    common.require(args, "gpus")
    if len(args.gpus) % 2 or any(not n.isdecimal() or int(n) < 1 for n in args.gpus[1::2]):
        raise ConfigError(
            f"--gpus {' '.join(args.gpus)}: needs pairs of a type and a number of nodes, as in A40 8 A100 1."
        )
    if args.gbs < 1 or (args.gpu_per_node is not None and args.gpu_per_node < 1):
        raise ConfigError("--gbs and --gpu-per-node: need whole numbers >= 1.")
    if args.top < 1 or (args.pareto_gbs_max is not None and args.pareto_gbs_max < 1):
        raise ConfigError("--top and --pareto-gbs-max: need whole numbers >= 1.")
    nodes = [
        find_gpu(name, args.pareto)
        for name, count in zip(args.gpus[::2], args.gpus[1::2], strict=True)
        for _ in range(int(count))
    ]
    options = Options(
        model=find_model(args.model_type),
        dataset=args.dataset,
        samples=samples_of(args.dataset),
        gbs=args.gbs,
        per_node=args.gpu_per_node or (8 if args.pareto else 4),
        method=args.pp_partition_method,
        bits=args.precision,
        borrow=not args.no_borrow,
        corrected=args.corrected,
    )
    limit = args.pareto_gbs_max
    return nodes, options, [2**k for k in range(limit.bit_length())] if limit else [args.gbs]


def _priced(jobs: list[Any], options: Options, lines: Lines, verbose: bool) -> list[Row]:
    from fms_parallel.planner.fasop import search

    lines.meta(len(jobs), jobs[0])
    rows = []
    for number, job in enumerate(jobs, 1):
        head = f"[{number:3}/{len(jobs)}] MBS={job.mbs:2} PP={job.pp:2} DP={job.dp:2} TP={job.tp} | "
        trace = (lambda text, head=head: _trace(head + text)) if verbose else None
        row = search.price(job, options, trace)
        row.index = number - 1
        lines.row(number, row)
        rows.append(row)
    return rows


def _trace(text: str) -> None:
    sys.stderr.write(text + "\n")


def _asked(nodes: list[Gpu], options: Options, profiles: Any) -> Any:
    from fms_parallel.errors import ConfigError
    from fms_parallel.planner.fasop import search

    known = {(job.tp, job.pp, job.dp, job.mbs): job for job in search.jobs(nodes, options, profiles)}
    example = " ".join(map(str, next(iter(known))))
    asked = 0
    for line in sys.stdin:
        words = line.replace(",", " ").split()
        if not words:
            continue
        try:
            key = tuple(int(word) for word in words)
            yield search.price(known[key], options)  # type: ignore[index]
        except (ValueError, KeyError):
            raise ConfigError(f"{line.strip()!r}: no such configuration; write tp pp dp mbs, as {example}.") from None
        asked += 1
    if not asked:
        raise ConfigError(f"--exhaustive: no line came; write tp pp dp mbs on standard input, as {example}.")
