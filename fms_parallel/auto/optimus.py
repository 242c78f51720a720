"""`Optimus_p`: the names of OptimusPrime (aicomp) over `parallelize`, so that its training scripts need another import.

    optimus_p = Optimus_p(model, num_mb, use_gpu=True, pp_size=2, dp_size=2)
    optimus_p.optimizer = torch.optim.Adam(optimus_p.parameters(), lr=3e-5)
    optimus_p.run(data, labels, mode="1f1b")
    optimus_p.optimizer.step()

What it does is the engine's: gradients are means and not sums over micro-batches, tied weights stay tied, the norm for
clipping is the whole model's (`optimus_p.clip_grad_norm_`). It knows names and defaults, no parallelism.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fms_parallel.auto.engine import Engine, parallelize
from fms_parallel.auto.tasks import Task, get_task, logits_of
from fms_parallel.distributed.start import BACKENDS, Launch, pick_device
from fms_parallel.errors import CheckpointError, ConfigError, LayoutError, TrainingError, unknown
from fms_parallel.layout import ParallelLayout
from fms_parallel.modules.loss import IGNORE
from fms_parallel.training import offload

logger = logging.getLogger("fms_parallel.auto")

MODES = ("gpipe", "1f1b")
SPLITS = {"auto": "cost", "milp": "cost", "hierarchical": "cost", "simple": "even", "llama-tp-split": "even"}
"""Their `partitioner` -> how blocks are dealt to stages."""

IDLE = {
    "force_free_mem": "memory is freed where it is no longer needed, and the swap options work without it",
    "ir_analyze": "each rank records the forward on tensors without memory and builds its own stage only",
    "dynamo_capture": "nothing is traced: each stage runs the model's own forward",
    "use_padding": "rows that do not divide are always filled up with rows that do not count",
    "safe_multi_output": "what crosses a cut is recorded, not guessed",
    "pre_barrier": "ranks wait for one another where they exchange tensors",
    "prt_shape": "shapes are in the engine's recordings",
    "display_mem": "what a rank holds is `optimus_p.engine.parameters()`",
    "checkpoint": "save_ckpt writes when it is called",
}
"""Options of OptimusPrime that have nothing to do here, and why; each is logged when a script gives it."""


class IR_Anal(Enum):
    """How OptimusPrime's ranks trace the model; scripts name it for `ir_analyze`."""

    SINGLE, PARALLEL, SEQUENTIAL = "single", "parallel", "sequential"


SWAPS = {(False, False): "none", (True, False): "optimizer_state", (True, True): "optimizer_step"}
"""(swap_opt_in_fwdbwd, swap_model_in_optstep) -> the layout's `offload`."""


class Optimus_p:
    """A model cut over pp_size stages, dp_size replicas and tp_size shards of every matrix.

    Args:
        module: a transformers model, a config, or any module. num_mb: micro-batches; 1 in one process.
        use_gpu: CUDA and nccl; without it the CPU and gloo.
        pp_size: stages; None takes the ranks that dp_size and tp_size leave.
        activation_ckpt: recompute blocks in the backward pass, with the random bits of the forward.
        swap_opt_in_fwdbwd: the optimizer's state is on the host outside of `step`. swap_model_in_optstep (with it): the
            step itself is made there. Both need `optimus_p.optimizer = Adam or AdamW`.
        example_batch: of a module that is not transformers' own. task: word of `TASKS`, when the class does not say.
        shift_labels: whether the library shifts the labels of a causal language model; None finds out from each batch.
        fsdp_size: shards of every parameter (not in OptimusPrime). preserve_output: keep what `get_output` gives.
        partitioner: one of `SPLITS`. ckpt_dir_postfix: of the folder that save_ckpt and load_ckpt use.
        also: OptimusPrime's options that have nothing to do here (`IDLE`); they are logged.
    Attributes:
        loss: the mean over the whole global batch of the last run, on every rank.
    Raises:
        LayoutError: sizes that do not multiply to the number of ranks, or that the model cannot be cut into.
        ConfigError: an option that neither has.
    """

    def __init__(
        self,
        module: Any,
        num_mb: int,
        use_gpu: bool = True,
        pp_size: int | None = None,
        dp_size: int = 1,
        tp_size: int = 1,
        *,
        activation_ckpt: bool = False,
        swap_opt_in_fwdbwd: bool = False,
        swap_model_in_optstep: bool = False,
        example_batch: Mapping[str, Tensor] | None = None,
        task: str | Task | None = None,
        shift_labels: bool | None = None,
        fsdp_size: int = 1,
        preserve_output: bool = False,
        partitioner: str = "auto",
        ckpt_dir_postfix: str | None = None,
        **also: Any,
    ) -> None:
        _check_options(also, partitioner)
        device = _start("cuda" if use_gpu else "cpu")
        world = dist.get_world_size() if dist.is_initialized() else 1
        if (swap_opt_in_fwdbwd, swap_model_in_optstep) not in SWAPS:
            raise ConfigError("swap_model_in_optstep goes with swap_opt_in_fwdbwd: give both, or neither.")
        layout = ParallelLayout(
            pp=_stages(world, pp_size, dp_size * tp_size * fsdp_size),
            dp=dp_size,
            fsdp=fsdp_size,
            tp=tp_size,
            recompute="full" if activation_ckpt else "none",
            offload=SWAPS[swap_opt_in_fwdbwd, swap_model_in_optstep],
        )
        self.num_mb = 1 if world == 1 else num_mb
        self.shift_labels = shift_labels
        self._optimizer: torch.optim.Optimizer | None = None
        example = dict(example_batch) if example_batch is not None else example_of(module, self.num_mb)
        self.engine: Engine = parallelize(
            module,
            layout,
            example,
            task=task,
            microbatches=self.num_mb,
            schedule="gpipe",
            split=SPLITS[partitioner],
            device=device,
        )
        self._folder = "checkpoint" if ckpt_dir_postfix is None else f"checkpoint_{ckpt_dir_postfix}"
        self._outputs: list[Tensor] = []
        self._rows = 0
        for stage in self.engine.stages if preserve_output else ():
            stage.note = lambda out: self._outputs.append(logits_of(out).detach())
        self._losses: list[float] = []
        self.loss = float("nan")
        self._main = _main_input(self.engine.skeleton, example)

    # ---- where this rank is ---------------------------------------------------------------------------------------

    def get_rank(self) -> int:
        """This process among all."""
        return dist.get_rank() if dist.is_initialized() else 0

    def get_world_size(self) -> int:
        """How many there are."""
        return self.engine.layout.world_size

    def is_first_stage(self) -> bool:
        """Whether this rank is where a pipeline begins."""
        return self._stage_rank() == 0

    def is_last_stage(self) -> bool:
        """Whether this rank finds out the loss."""
        return self._stage_rank() == self.engine.layout.pp - 1

    def _stage_rank(self) -> int:
        return self.engine.mesh["pp"].get_local_rank() if self.engine.mesh is not None else 0

    # ---- training -------------------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's, for an optimizer."""
        return self.engine.parameters()

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode."""
        self.engine.train(mode)

    def eval(self) -> None:
        """Evaluation mode."""
        self.engine.eval()

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer. Setting one while a swap is on makes an AdamW of it whose state lives on the host."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, given: torch.optim.Optimizer) -> None:
        mode = self.engine.layout.offload
        self._optimizer = _on_host(given, mode) if mode in offload.MODES else given

    def run(self, data: Any, labels: Tensor | None = None, mode: str = "gpipe") -> None:
        """Forward and backward of one batch; gradients of the step before are dropped.

        Args:
            data: ids (or pixels, or sound features), or a dict of inputs. labels: with -100 where none counts. Ranks
                that have none get those of their pipeline's first rank.
            mode: `gpipe` or `1f1b`.
        Raises:
            ConfigError: an unknown mode, or labels of which nobody can tell whether they are shifted already.
        """
        if mode not in MODES:
            raise ConfigError(unknown("mode", mode, MODES))
        if self.engine.layout.offload in offload.MODES and self._optimizer is None:
            raise TrainingError("a swap is on and no optimizer is known: set optimus_p.optimizer before run().")
        stages = self.engine.layout.pp
        if mode == "1f1b" and self.num_mb < stages:
            raise LayoutError(f"mode=1f1b: {self.num_mb} micro-batches cannot fill {stages} stages: num_mb={stages}.")
        batch = data if isinstance(data, Mapping) or data is None else {self._main: data}
        batch = None if batch is None else {**batch, **({} if labels is None else {"labels": labels})}
        found = self._unshifted(self._from_first_stage(batch))
        self.engine.runner.schedule = mode
        self._outputs.clear()
        self._rows = len(found[self._main])
        self.loss = float(self.engine.train_step(found))
        counted = max(float(self.engine.task.count(found)), 1.0)
        self._losses = [float(piece) / counted * self.num_mb for piece in self.engine.runner.pieces_of_loss]

    def get_loss(self) -> list[float]:
        """On the last stage a number for each micro-batch of this rank's rows, whose mean is their mean loss."""
        return self._losses

    def get_output(self) -> Tensor | None:
        """On the last stage what the model gave for this rank's rows in the last run; None elsewhere.

        Raises:
            ConfigError: without preserve_output=True.
        """
        if all(stage.note is None for stage in self.engine.stages):
            raise ConfigError("get_output: nothing was kept; say Optimus_p(preserve_output=True).")
        return torch.cat(self._outputs)[: self._rows] if self._outputs else None

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Over the whole model (`torch.nn.utils.clip_grad_norm_` would see one stage)."""
        return self.engine.clip_grad_norm_(max_norm)

    def _from_first_stage(self, batch: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The batch, on every rank of the pipeline and of tp."""
        if batch is not None:
            batch = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        mesh = self.engine.mesh
        given = None if batch is None else {name: value.cpu() for name, value in batch.items()}
        for line in [] if mesh is None else [mesh["pp"], mesh["tp"]]:
            words: list[Any] = [None] * line.size()
            dist.all_gather_object(words, given, group=line.get_group())
            given = next((word for word in words if word is not None), None)
        if given is None:
            raise TrainingError("run() was given no data on any rank of this pipeline; give it on the first stage.")
        return given

    def _unshifted(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the labels where the task expects them: those of a causal model at the place of their own id."""
        if not self.engine.task.shift:
            return batch
        shift = self.shift_labels
        if shift is None:
            shift = _needs_shift(batch[self._main], batch["labels"])
        if shift:
            return batch
        labels = batch["labels"]
        ignored = labels.new_full((len(labels), 1), IGNORE)
        return {**batch, "labels": torch.cat([ignored, labels[:, :-1]], dim=1)}

    def move_labels2last_stage(self, labels: Tensor | None) -> Tensor | None:
        """The labels on every rank of the pipeline. `run` does it too."""
        given = None if labels is None else {"labels": labels}
        return self._from_first_stage(given)["labels"]

    def prepare_dataloader(self, dataset: Any, batch_size: int, shuffle: bool = True, **options: Any) -> Any:
        """A DataLoader of this rank's share of a dataset: ranks of one pipeline and of tp read the same rows."""
        from torch.utils.data import DataLoader
        from torch.utils.data.distributed import DistributedSampler

        index, count = self.engine.data_shard
        self.sampler: Any = DistributedSampler(dataset, num_replicas=count, rank=index, shuffle=shuffle)
        return DataLoader(dataset, batch_size=batch_size, sampler=self.sampler, **options)

    # ---- files ----------------------------------------------------------------------------------------------------

    def save_ckpt(self, step: int, epoch: int, folder: str | Path | None = None) -> Path:
        """Weights and optimizer state, loadable in any layout; the last two are kept. Collective.

        Raises:
            CheckpointError: no optimizer was set, or writing failed.
        """
        if self._optimizer is None:
            raise CheckpointError("save_ckpt: set optimus_p.optimizer first; its state belongs to a checkpoint.")
        return self.engine.save_checkpoint(folder or self._folder, step, self._optimizer, keep=2, epoch=epoch)

    def load_ckpt(self, step: int | None = None, folder: str | Path | None = None) -> tuple[int, int]:
        """(step, epoch) of what was loaded: that step, or the latest. Collective."""
        if self._optimizer is None:
            raise CheckpointError("load_ckpt: set optimus_p.optimizer first; its state belongs to a checkpoint.")
        folder = folder or self._folder
        steps = sorted(
            int(m[1]) for path in Path(folder).glob("step-*") if (m := re.fullmatch(r"step-(\d+)", path.name))
        )
        if not steps or (step is not None and step not in steps):
            raise CheckpointError(
                f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}; it has {steps}."
            )
        path = Path(folder) / f"step-{steps[-1] if step is None else step:08d}"
        numbers = self.engine.load_checkpoint(path, self._optimizer)
        return int(numbers["step"]), int(numbers["epoch"])

    def save_hf_ckpt(self, folder: str | Path) -> None:
        """Weights and config as `from_pretrained` reads them. Collective."""
        self.engine.save_pretrained(folder)


def _check_options(also: Mapping[str, Any], partitioner: str) -> None:
    """Log options that have nothing to do; refuse what is no option."""
    if partitioner not in SPLITS:
        raise ConfigError(unknown("partitioner", partitioner, SPLITS))
    if also.get("swap_use_disk"):
        raise ConfigError("swap_use_disk: the swaps go to host memory and to no disk; leave it out.")
    for name, value in also.items():
        if name != "swap_use_disk" and name not in IDLE:
            raise ConfigError(unknown("option of Optimus_p", name, IDLE))
        if value and name in IDLE:
            logger.info("Optimus_p(%s=%s) has nothing to do: %s.", name, value, IDLE[name])


def _start(device_type: str) -> torch.device:
    """Join the job that torchrun started, if there is one."""
    launch = Launch.read()
    device = pick_device(device_type, launch)
    if launch.world_size > 1 and not dist.is_initialized():
        dist.init_process_group(BACKENDS[device_type])
    return device


def _stages(world: int, pp_size: int | None, others: int) -> int:
    if pp_size is not None:
        return pp_size
    if world % others:
        raise LayoutError(f"{world} ranks do not divide by dp_size * tp_size = {others}: start a multiple of {others}.")
    return world // others


def _main_input(model: nn.Module, example: Mapping[str, Tensor]) -> str:
    return getattr(model, "main_input_name", None) or next(iter(example))


def example_of(module: Any, rows: int) -> dict[str, Tensor]:
    """A batch of zeros that a transformers model takes.

    Raises:
        ConfigError: another module: nobody knows what it takes.
    """
    config, main = getattr(module, "config", None), getattr(module, "main_input_name", None)
    if config is None or main is None:
        raise ConfigError(f"{type(module).__name__}: give Optimus_p(example_batch=...): nobody knows what it takes.")
    task = get_task(module, None)
    length = 8
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        found = {main: torch.zeros(rows, getattr(config, "num_channels", 3), *sides)}
    elif main == "input_features":
        found = {main: torch.zeros(rows, config.num_mel_bins, 2 * config.max_source_positions)}
    else:
        found = {main: torch.zeros(rows, length, dtype=torch.int64)}
    shape = (rows,) if task.name == "classification" else (rows, length)
    return {**found, "labels": torch.zeros(shape, dtype=torch.int64)}


def _needs_shift(ids: Tensor, labels: Tensor) -> bool:
    """Whether labels are the ids themselves; False when each is the next id.

    Raises:
        ConfigError: they are neither.
    """
    if labels.shape == ids.shape:
        counted = labels != IGNORE
        if bool((labels == ids)[counted].all()):
            return True
        if bool((labels[:, :-1] == ids[:, 1:])[counted[:, :-1]].all()):
            return False
    raise ConfigError(
        "labels are neither the ids nor the next ids: say Optimus_p(shift_labels=True) to have them shifted here, or "
        "False when they are the next ids already."
    )


def _on_host(given: torch.optim.Optimizer, mode: str) -> torch.optim.Optimizer:
    """An AdamW with its state on the host, in the place of an Adam or AdamW that has done nothing yet."""
    plain = type(given) in (torch.optim.Adam, torch.optim.AdamW)
    groups = given.param_groups
    decays = type(given) is torch.optim.Adam and any(group["weight_decay"] for group in groups)
    if isinstance(given, offload.AdamW):
        return given
    if not plain or decays or given.state or any(group["amsgrad"] or group["maximize"] for group in groups):
        raise ConfigError(
            f"a swap is on, and {type(given).__name__} cannot be swapped: use a new Adam without weight_decay, or an "
            "AdamW, without amsgrad and maximize."
        )
    numbers = ("lr", "betas", "eps", "weight_decay")
    return offload.AdamW(
        [{"params": group["params"], **{name: group[name] for name in numbers}} for group in groups], mode=mode
    )
