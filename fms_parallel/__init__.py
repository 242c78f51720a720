"""fms_parallel: one transformer, any composition of parallelism, named by one `ParallelLayout`.

This face knows the layout, a model's shape and the errors, and nothing that needs torch, so that a command line can
check a layout and answer `--help` at once. The rest is imported from its room, as in
`from fms_parallel.models import get_model`.
"""

from fms_parallel.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FmsError,
    LayoutError,
    RankFailed,
    TrainingError,
)
from fms_parallel.layout import ParallelLayout
from fms_parallel.shape import ModelShape

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FmsError",
    "LayoutError",
    "ModelShape",
    "ParallelLayout",
    "RankFailed",
    "TrainingError",
]
