"""Any model: an unmodified transformers model or plain `nn.Module` in any layout of pp, dp, fsdp and tp."""

from fms_parallel.auto.engine import Engine, parallelize
from fms_parallel.auto.tasks import TASKS, Task, UserLoss

__all__ = ["TASKS", "Engine", "Task", "UserLoss", "parallelize"]
