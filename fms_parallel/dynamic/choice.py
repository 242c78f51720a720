"""The layout of a job that has lost or gained ranks: the planner's fastest for those that are left.

What a person asked for comes back with the number of ranks that it was asked for. It knows planners and layouts; one
member chooses, and the others hear of it (recovery.py).
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from fms_parallel.dynamic.manager import plan_for
from fms_parallel.dynamic.relayout import ModelFactory
from fms_parallel.dynamic.remaining import remaining_layout
from fms_parallel.errors import ConfigError, FmsError
from fms_parallel.layout import ParallelLayout
from fms_parallel.log import get_logger
from fms_parallel.phases import Phases, Work
from fms_parallel.planner.hardware import Cluster
from fms_parallel.shape import ModelShape

logger = get_logger(__name__)


class LayoutForRanks:
    """`choose` of a job: number of ranks -> layout, for the process group that runs.

    Args:
        asked: by a person; used as it is for its own number of ranks, and always when it takes any number.
        phases: every one of them must be possible. shape: of a model whose config does not tell it.
        cluster: what the ranks are; None: no planner is asked, and the layout nearest to `asked` is taken.
    """

    def __init__(
        self,
        asked: ParallelLayout,
        model_factory: ModelFactory,
        phases: Phases,
        *,
        micro_batches: int = 1,
        shape: ModelShape | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        self.asked, self.model_factory, self.phases = asked, model_factory, phases
        self.micro_batches, self.shape, self.cluster = micro_batches, shape, cluster

    def __call__(self, world: int) -> ParallelLayout:
        """See the class.

        Raises:
            LayoutError: no layout of so many ranks fits.
        """
        rows = gcd(*(work.batch_size for work in self.phases.works))
        if self.cluster is None or not self.asked.resolved or self.asked.world_size == world:
            return remaining_layout(self.asked, world, rows, self.micro_batches, self.shape)
        try:
            return self._planned(Cluster(((self.cluster.device, world),)))
        except FmsError as error:
            logger.warning("the planner has no layout for %d ranks (%s): the nearest to %s", world, error, self.asked)
            return remaining_layout(self.asked, world, rows, self.micro_batches, self.shape)

    def _planned(self, cluster: Cluster) -> ParallelLayout:
        """The fastest for the phase with the most tokens in a step, of those that can do all phases."""
        selector, _, _ = plan_for(
            self.model_factory,
            cluster,
            None,
            seq_len=self.phases.longest,
            shape=self.shape,
            precision=self.asked.precision,
            micro_batches=self.micro_batches,
        )
        largest: Work = max(self.phases.works, key=lambda work: work.seq_len * work.batch_size)
        for candidate in sorted(selector.candidates(largest), key=lambda one: one.seconds):
            if all(selector.can_run(candidate.layout, work) for work in self.phases.works):
                return replace(candidate.layout, precision=self.asked.precision)
        raise ConfigError(f"no layout of {cluster.gpus} ranks can do every phase")
