"""Flags of runs whose layout, ranks or rows change: --relayout, --dynamic, --elastic, --phases.

    --relayout 100:tp=2,sp,200:fsdp=2      from step 100 on tp=2,sp; from 200 on fsdp=2
    --dynamic                              another layout whenever measuring says that it pays
    --elastic --buddy_every 10             ranks may die; the others go on (start it with torchrun)
    --phases 1000:seq_len=512              from step 1000 on rows of 512 tokens; --seq_len says how long they are first

It knows command lines; what happens is `fms_parallel.dynamic`'s.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fms_parallel.dynamic.words import parse_phases, parse_schedule
from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.phases import Phase, Phases
from fms_parallel.training.options import TrainOptions
from scripts import common

if TYPE_CHECKING:
    from fms_parallel.distributed.start import Launch
    from fms_parallel.dynamic.adaptive import AdaptiveLayout
    from fms_parallel.dynamic.membership import Membership
    from fms_parallel.dynamic.relayout import ModelFactory
    from fms_parallel.dynamic.schedule import LayoutSchedule
    from fms_parallel.planner import Cluster

POLICIES = ("knowledge", "thompson", "rules")
"""Those of `fms_parallel.dynamic.policy`, whose import would need numpy for --help."""

CONFIGURED = {"hf_pretrained": "hf_configured"}
"""Architectures that read weights -> the same without them."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    group = parser.add_argument_group("changes while it runs")
    group.add_argument("--relayout", metavar="STEP:LAYOUT,...", help="layouts from steps on, as 100:tp=2,sp,200:fsdp=2")
    group.add_argument("--phases", metavar="STEP:SIZE=N,...", help="rows, as 1000:seq_len=512,3000:batch_size=128")
    group.add_argument("--dynamic", action="store_true", help="change the layout when that pays; layouts.jsonl, .png")
    group.add_argument("--policy", choices=POLICIES, help="dynamic: what decides (default: knowledge)")
    group.add_argument("--elastic", action="store_true", help="go on when ranks die or join (start it with torchrun)")
    group.add_argument("--buddy_every", type=int, help="elastic: copy shards to a neighbour every so many steps")
    group.add_argument("--replacements", type=int, default=0, help="elastic: ranks started anew on each place")
    group.add_argument("--silence", type=float, default=10.0, help="elastic: seconds until a frozen rank is given up")


def check(args: argparse.Namespace) -> None:
    """Refuse flags that have no effect or do not go together."""
    if args.elastic and args.relayout:
        raise ConfigError("--elastic and --relayout: with members that change, layouts follow their number; drop one.")
    if args.dynamic and args.relayout:
        raise ConfigError("--dynamic and --relayout both say when the layout changes: drop one.")
    if args.elastic and args.sample_steps:
        raise ConfigError("--elastic writes no samples: drop --sample_steps.")
    for name, least in (("buddy_every", 1), ("replacements", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ConfigError(f"--{name} {value}: must be >= {least}.")
    if not 0 < args.silence < float("inf"):
        raise ConfigError(f"--silence {args.silence}: a frozen rank is given up after more than 0 seconds, say 10.")
    args.phases = _phases(args)


def _phases(args: argparse.Namespace) -> list[Phase]:
    """--phases. --seq_len is the first phase's length, and from here on that of the longest: rows are made so long."""
    phases = parse_phases(args.phases or "")
    announced = Phases(phases, args.seq_len, args.batch_size)
    if phases and announced.longest > announced.at(0).seq_len:
        first = announced.at(0)
        phases = [Phase(0, first.seq_len, first.batch_size), *(phase for phase in phases if phase.step > 0)]
    args.seq_len = announced.longest
    return phases


def check_phases(args: argparse.Namespace, layout: ParallelLayout, layouts: dict[int, str]) -> None:
    """Every phase's batch must divide in the layout that its first step has, when layouts follow a schedule."""
    from fms_parallel.data.feed import check_divides

    announced = Phases(args.phases, args.seq_len, args.batch_size)
    if args.dynamic or args.elastic:
        return
    for start in announced.starts:
        due = max((step for step in layouts if step <= start), default=None)
        there = layout if due is None else ParallelLayout.parse(layouts[due]).resolve(layout.world_size)
        try:
            check_divides(announced.at(start).batch_size, there.data_parallel, args.grad_accum_steps)
        except ConfigError as error:
            raise ConfigError(f"--phases: from step {start} on: {error}") from None


def read_schedule(args: argparse.Namespace, config: Any, layout: ParallelLayout) -> dict[int, str]:
    """--relayout, every layout checked against ranks and model."""
    layouts = parse_schedule(args.relayout or "")
    for step, text in layouts.items():
        if args.steps is not None and step >= args.steps:
            raise ConfigError(
                f"--relayout {step}:{text} comes after the last of {args.steps} steps: choose an earlier one."
            )
        try:
            common.check_request(args, config, ParallelLayout.parse(text).resolve(layout.world_size))
        except LayoutError as error:
            raise LayoutError(f"--relayout {step}:{text}: {error}") from None
    return layouts


def switches(
    args: argparse.Namespace, layouts: dict[int, str], factory: ModelFactory, launch: Launch
) -> LayoutSchedule | AdaptiveLayout | None:
    """What changes the layout, as `between_steps` of `train`."""
    if args.dynamic:
        return adaptive(args, factory, described_cluster(args, launch))
    if not layouts:
        return None
    from fms_parallel.dynamic.schedule import LayoutSchedule

    return LayoutSchedule(layouts, factory)


def adaptive(args: argparse.Namespace, factory: ModelFactory, cluster: Cluster | None, **how: Any) -> AdaptiveLayout:
    """--dynamic: on the machine that is described, else on this one, which is measured."""
    from fms_parallel.dynamic.adaptive import AdaptiveLayout

    return AdaptiveLayout(factory, cluster, policy=args.policy or "knowledge", **how)


def described_cluster(args: argparse.Namespace, launch: Launch) -> Cluster | None:
    """What --gpus or --devices say that this job runs on."""
    from scripts.automatic import read_cluster

    described = args.gpus is not None or args.devices is not None
    return read_cluster(args, launch)[0] if described else None


def hearers(switches: Any, progress: Any) -> Callable[[dict[str, Any]], None]:
    """`on_step` of `train`: who wants to know each step's numbers."""
    wanted = [one for one in (getattr(switches, "on_step", None), progress) if one is not None]

    def tell(numbers: dict[str, Any]) -> None:
        for one in wanted:
            one(numbers)

    return tell


def finish(switches: Any, options: TrainOptions, launch: Launch) -> None:
    """Close what --dynamic wrote, and draw it."""
    if not hasattr(switches, "end"):
        return
    from fms_parallel.dynamic.adaptive import HISTORY
    from fms_parallel.dynamic.history import draw_history, read_history

    switches.end()
    if launch.rank != 0:
        return
    changes = switches.history.of("switch")
    print(f"{len(changes)} changes of layout" + "".join(f"\n  step {e.step}: {e.more['after']}" for e in changes))
    if options.output_path is not None:
        events = Path(options.output_path) / HISTORY
        try:
            print(f"layouts: {draw_history(read_history(events), events.with_suffix('.png'))}")
        except ConfigError as error:
            print(f"no picture of the layouts: {error}")


def model_factory(args: argparse.Namespace, options: TrainOptions, overrides: dict[str, Any]) -> ModelFactory:
    """The model of a command line, in any layout."""
    from fms_parallel.models import get_model

    def build(layout: ParallelLayout, *, mesh: Any, fill: Any) -> Any:
        read = fill is None  # else the weights come from where they are now
        named = args.architecture if read else CONFIGURED.get(args.architecture, args.architecture)
        return get_model(
            named,
            args.variant,
            args.model_path if read or named != args.architecture else None,
            args.checkpoint_format if read else None,
            args.device_type,
            distributed_strategy=layout,
            seed=options.seed,
            compile_blocks=args.compile,
            mesh=mesh,
            fill=fill,
            **overrides,
        )

    return build


# ---- members that change ----------------------------------------------------------------------------------------


def run_elastic(
    args: argparse.Namespace, options: TrainOptions, layout: ParallelLayout, overrides: dict[str, Any]
) -> int:
    """What each process of torchrun does with --elastic: supervise one rank."""
    from fms_parallel.distributed.start import Launch
    from fms_parallel.dynamic.supervise import Rendezvous, supervise

    found = Rendezvous.of_torchrun(device_type=args.device_type, timeout=args.timeout, silence=args.silence)
    cluster = described_cluster(args, Launch.read())
    return supervise(found, member, args, options, layout, overrides, cluster, replacements=args.replacements)


def member(
    membership: Membership,
    args: argparse.Namespace,
    options: TrainOptions,
    layout: ParallelLayout,
    overrides: dict[str, Any],
    cluster: Cluster | None,
) -> None:
    """One rank's process."""
    import logging

    import torch.distributed as dist

    from fms_parallel.distributed.start import Launch
    from fms_parallel.dynamic.elastic import train_elastic
    from fms_parallel.dynamic.recovery import ElasticSwitch
    from fms_parallel.log import log_to_stderr
    from fms_parallel.models import get_config
    from scripts.automatic import read_cluster
    from scripts.train_causal import fit_vocabulary

    log_to_stderr(logging.INFO, 0 if membership.uid == "0" else 1)
    tokenizer, rows = _one_after_the_first(membership, lambda: common.read_corpus_rows(args, options, Launch()))
    training, validation = common.held_out(args, options, rows)
    overrides = fit_vocabulary(args, overrides, tokenizer)
    config = get_config(args.architecture, args.variant, args.model_path, **overrides)
    described: Any = SimpleNamespace(architecture=args.architecture, config=config)
    shown: list[common.Progress] = []

    def progress(numbers: dict[str, Any]) -> None:
        if dist.get_rank() == 0:  # of now: the first one may be gone
            if not shown:
                launch = replace(Launch(), world_size=dist.get_world_size())
                shown.append(common.Progress(options, layout, described, args, launch))
            shown[0](numbers)

    if membership.uid == "0":
        common.write_run(args, options, layout, described)
    factory = model_factory(args, options, overrides)
    adapt = adaptive(args, factory, cluster, switch=ElasticSwitch) if args.dynamic else None
    with suppress(ConfigError):  # a GPU that nobody has described: then the nearest layout is taken, and no planner
        cluster = cluster or read_cluster(args, Launch.read())[0]
    train_elastic(
        factory,
        training,
        layout,
        membership,
        options=options,
        cluster=cluster,
        shape=config.shape(),
        buddy_every=args.buddy_every,
        phases=args.phases,
        validation=validation,
        adapt=adapt,
        on_step=hearers(adapt, progress),
    )
    if adapt is not None:
        assert membership.plan is not None
        finish(adapt, options, replace(Launch(), rank=membership.plan.members.index(membership.uid)))


def _one_after_the_first(membership: Membership, read: Callable[[], Any]) -> Any:
    """What is made on disk is made once, by the first member."""
    if membership.uid != "0":
        membership.store.wait(["rows"])
    found = read()
    if membership.uid == "0":
        membership.store.set("rows", "1")
    return found
