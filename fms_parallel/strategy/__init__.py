"""What turns a module and a mesh into a distributed module; `compose` applies the strategies in the right order."""

from fms_parallel.strategy.base import Parallel, Strategy, parallel_of
from fms_parallel.strategy.compose import compose
from fms_parallel.strategy.context import ContextStrategy
from fms_parallel.strategy.fsdp import FullyShardStrategy, ReplicateStrategy
from fms_parallel.strategy.plan import generate_layer_plan
from fms_parallel.strategy.recompute import RecomputeStrategy
from fms_parallel.strategy.tensor import TensorParallelStrategy

__all__ = [
    "ContextStrategy",
    "FullyShardStrategy",
    "Parallel",
    "RecomputeStrategy",
    "ReplicateStrategy",
    "Strategy",
    "TensorParallelStrategy",
    "compose",
    "generate_layer_plan",
    "parallel_of",
]
