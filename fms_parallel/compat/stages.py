"""Pipeline schedules, and the compiler's budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def schedule_of_cells(
    stages: list[Any], micro_batches: int, loss: Callable[..., Tensor], cells: list[list[str]]
) -> Any:
    """A pipeline schedule whose ranks do what `cells[rank]` say, as a CSV file of torch's has it; it adds the sends."""
    from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

    schedule = _PipelineScheduleRuntime(stages, micro_batches, loss_fn=loss, scale_grads=False)
    schedule.pipeline_order = {rank: [_Action.from_str(cell) for cell in row] for rank, row in enumerate(cells)}
    schedule._prepare_schedule_with_comms(schedule.pipeline_order)
    return schedule


@contextmanager
def forwards_only(schedule: Any) -> Iterator[None]:
    """Inside, a pipeline schedule leaves out its backward pass.

    Its own `eval` walks through it, and trips where two neighbouring stages are on one rank.
    """
    from torch.distributed.pipelining.schedules import _ComputationType as Kind

    whole = getattr(schedule, "pipeline_order_with_comms", None)  # schedules of one stage per rank have none
    if whole is not None:
        kept = (Kind.FORWARD, Kind.SEND_F, Kind.RECV_F, Kind.UNSHARD, Kind.RESHARD)
        parts = {rank: [part for a in row for part in a.sub_actions or (a,)] for rank, row in whole.items()}
        forwards = {rank: [part for part in row if part.computation_type in kept] for rank, row in parts.items()}
        schedule.pipeline_order_with_comms = forwards
    try:
        yield
    finally:
        if whole is not None:
            schedule.pipeline_order_with_comms = whole


def schedule_cells(name: str, ranks: int, held: list[int], count: int, micro_batches: int) -> list[list[str]]:
    """What each rank does in torch's multi-stage schedule `name`, cell by cell; empty cells wait.

    Args:
        held: the stages of rank 0, of `count`.
    """
    from types import SimpleNamespace

    from torch.distributed.pipelining.schedules import get_schedule_class

    place = {"group_size": ranks, "group_rank": 0, "num_stages": count, "has_backward": True, "submod": nn.Identity()}
    stages = [SimpleNamespace(**place, stage_index=n, is_first=n == 0, is_last=n == count - 1) for n in held]
    schedule: Any = get_schedule_class(name)(stages, micro_batches)  # type: ignore[arg-type]
    return [["" if a is None else str(a) for a in schedule.pipeline_order[rank]] for rank in range(ranks)]


def compile_within(modules: list[nn.Module], budget: float, backend: str = "inductor") -> None:
    """Compile each module so that it keeps at most this fraction of its activations and makes the others again."""
    from torch._dynamo import lookup_backend
    from torch._functorch import config

    compile_graph = lookup_backend(backend)

    def compile_graph_within(graph: Any, inputs: list[Tensor]) -> Any:
        # What is kept is decided in here; the setting itself is of the whole process.
        # Process groups are inputs of a graph that sends; they hold no tensors.
        with config.patch(activation_memory_budget=budget, unsafe_treat_script_objects_as_zero_size=True):
            return compile_graph(graph, inputs)

    for module in modules:  # one function for all of them: what is alike is compiled once
        module.compile(dynamic=False, backend=compile_graph_within)
