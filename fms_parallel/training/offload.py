"""AdamW whose state lives on the host: `offload=optimizer_state` and `offload=optimizer_step`.

    optimizer_state   state: host -> device, update there, device -> host; the device has none of it in between
    optimizer_step    weights and gradients: device -> host, update there, weights -> device; the state never moves

Both go bucket by bucket: while one is updated the next comes in, so two of them is all that is ever in the other place,
however large the model. With streams the copies run beside the arithmetic, from and to pinned memory; on the CPU the
same copies are made, one after the other, between storages of their own. (ZeRO-Offload: arXiv 2101.06840.)

The arithmetic is torch's fused AdamW over the same elements, so the result is bitwise that of not offloading wherever
both places round alike; `optimizer_state` updates where it always did. There is no second copy of the weights on the
host: they are fp32 on the device in every precision, and whoever changes them there is right.

It knows local tensors and devices; it knows no layouts, files or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fms_parallel import compat
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.errors import ConfigError, unknown

BUCKET_BYTES = 64 * 2**20
"""Large enough for a copy to run at full speed, small beside anything that needs offloading."""

ALIGN = 1024
"""Elements. A parameter is cut at multiples of it, so that vector units see the same elements together."""

STATE = ("exp_avg", "exp_avg_sq")
KINDS = ("param", "grad", *STATE)

Tensors = dict[str, list[Tensor]]
"""Kind -> one flat tensor for each piece of a bucket."""


@dataclass(frozen=True)
class Mode:
    """What is copied to where the update happens, and what of it is copied back."""

    brought: tuple[str, ...]
    returned: tuple[str, ...]
    on_host: bool


MODES = {
    "optimizer_state": Mode(brought=STATE, returned=STATE, on_host=False),
    "optimizer_step": Mode(brought=("param", "grad"), returned=("param",), on_host=True),
}


@dataclass
class Bucket:
    """Pieces of parameters that are updated together.

    Attributes:
        group: their parameter group. homes: where they live. steps: updates so far, of each piece's parameter.
        copies: of the kinds that are brought, while they exist. arrived: marks that they are there.
    """

    group: dict[str, Any]
    homes: Tensors = field(default_factory=lambda: {kind: [] for kind in KINDS})
    steps: list[Tensor] = field(default_factory=list)
    copies: Tensors = field(default_factory=dict)
    arrived: Any = None


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` whose state lives on the host.

    It has torch's name because it is the same kind of optimizer: a checkpoint of one is a checkpoint of the other.

    Args:
        params: all on one device. mode: a word of `MODES`. options: `lr`, `betas`, `eps`, `weight_decay`.
        bucket_bytes: how much is brought at a time; larger parameters come in pieces.
    Raises:
        ConfigError: an unknown mode, or a bucket that does not hold `ALIGN` elements.
    """

    def __init__(self, params: Any, *, mode: str, bucket_bytes: int = BUCKET_BYTES, **options: Any) -> None:
        if mode not in MODES:
            raise ConfigError(unknown("optimizer offload", mode, MODES))
        super().__init__(params, fused=True, **options)
        self.mode, self.bucket_bytes = MODES[mode], bucket_bytes
        parameters = [p for group in self.param_groups for p in group["params"]]
        least = ALIGN * len(self.mode.brought) * max(p.element_size() for p in parameters)
        if bucket_bytes < least:
            raise ConfigError(f"an offload bucket of {bucket_bytes} bytes is too small: give {least} or more.")
        self.lane = Lane(local_tensor(parameters[0]).device, self.mode.on_host)

    # ---- the update ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        trained = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, parameter in trained:
            if not self.state[parameter]:
                self.state[parameter] = self._new_state(parameter)
        ahead: Bucket | None = None
        for bucket in self._buckets(trained):
            self.lane.bring(bucket, self.mode.brought)
            self._update(ahead)
            ahead = bucket
        self._update(ahead)
        self.lane.end()
        if trained:
            torch._foreach_add_([self.state[p]["step"] for _, p in trained], 1)
        return loss

    def _update(self, bucket: Bucket | None) -> None:
        """AdamW over a bucket that was brought; then what changed goes home and the copies are freed."""
        if bucket is None:
            return
        self.lane.wait(bucket)
        here = bucket.homes | bucket.copies
        group = bucket.group
        adamw(
            here["param"],
            here["grad"],
            here["exp_avg"],
            here["exp_avg_sq"],
            [],
            list(torch.stack(bucket.steps).unbind()),  # copies: a parameter may come in several pieces
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        self.lane.take_back(bucket, self.mode.returned)

    def _buckets(self, trained: Iterable[tuple[dict[str, Any], Tensor]]) -> Iterator[Bucket]:
        """All pieces in order, together as far as they belong to one group and fit."""
        bucket, held = None, 0
        for group, parameter in trained:
            for piece in self._pieces(parameter):
                brought = sum(piece[kind].nbytes for kind in self.mode.brought)
                if bucket is None or bucket.group is not group or held + brought > self.bucket_bytes:
                    if bucket is not None:
                        yield bucket
                    bucket, held = Bucket(group), 0
                for kind in KINDS:
                    bucket.homes[kind].append(piece[kind])
                bucket.steps.append(self.state[parameter]["step"])
                held += brought
        if bucket is not None:
            yield bucket

    def _pieces(self, parameter: Tensor) -> Iterator[dict[str, Tensor]]:
        """Kind -> flat views of this rank's part of a parameter, each no larger than a bucket; none of an empty one."""
        assert parameter.grad is not None
        state = self.state[parameter]
        whole = {"param": parameter, "grad": parameter.grad} | {kind: state[kind] for kind in STATE}
        local = {kind: local_tensor(tensor) for kind, tensor in whole.items()}
        if not local["param"].is_contiguous():
            yield local  # it has no flat view
            return
        flat = {kind: tensor.reshape(-1) for kind, tensor in local.items()}
        size = self.bucket_bytes // (len(self.mode.brought) * flat["param"].element_size()) // ALIGN * ALIGN
        for start in range(0, flat["param"].numel(), size):
            yield {kind: tensor[start : start + size] for kind, tensor in flat.items()}

    # ---- the state ----------------------------------------------------------------------------------------------

    @property
    def state_device(self) -> torch.device:
        """Where a checkpoint is to be read to."""
        return torch.device("cpu")

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Zeros on the host, cut as the parameter is, and a count where the update happens."""
        local = local_tensor(parameter)
        state = {"step": torch.zeros((), dtype=torch.float32, device=self.lane.place)}
        for kind in STATE:
            state[kind] = compat.dtensor_like(
                parameter, torch.zeros_like(local, device="cpu", pin_memory=self.lane.pins)
            )
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's, but nothing visits the device on its way to the host.

        Raises:
            ConfigError: the state of another kind of optimizer.
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for number, parameter in zip(numbers, parameters, strict=True):
            if given := state_dict["state"].get(number):
                state = self.state[parameter] = self._new_state(parameter)
                if given.keys() != state.keys():
                    raise ConfigError(f"optimizer state {sorted(given)}: AdamW has {sorted(state)}.")
                for kind, value in given.items():
                    local_tensor(state[kind]).copy_(local_tensor(value))


class Lane:
    """The way between device and host: a stream of its own where there are streams, at once on the CPU.

    Attributes:
        place: where the update happens. pins: whether host memory is pinned.
    """

    def __init__(self, device: torch.device, on_host: bool) -> None:
        self.place = torch.device("cpu") if on_host else device
        self.pins = device.type != "cpu"
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _copying(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def bring(self, bucket: Bucket, kinds: tuple[str, ...]) -> None:
        """Start copying `kinds` to where the update happens, after what was asked of the device so far."""
        pinned = self.pins and self.place.type == "cpu"
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with self._copying():
            for kind in kinds:
                homes = bucket.homes[kind]
                bucket.copies[kind] = [torch.empty_like(home, device=self.place, pin_memory=pinned) for home in homes]
                for copy, home in zip(bucket.copies[kind], homes, strict=True):
                    copy.copy_(home, non_blocking=True)
            if self.stream is not None:
                bucket.arrived = self.stream.record_event()

    def wait(self, bucket: Bucket) -> None:
        """The update may begin: on the host now, on the device in its order."""
        if self.stream is None:
            return
        if self.place.type == "cpu":
            bucket.arrived.synchronize()
        else:
            torch.cuda.current_stream(self.stream.device).wait_event(bucket.arrived)

    def take_back(self, bucket: Bucket, kinds: tuple[str, ...]) -> None:
        """Copy what changed home after the update, and free every copy."""
        if self.stream is not None and self.place.type != "cpu":
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with self._copying():
            for kind in kinds:
                for copy, home in zip(bucket.copies[kind], bucket.homes[kind], strict=True):
                    home.copy_(copy, non_blocking=True)
            # On this stream, so that the memory is used again only after the copies. Explicitly, so that it is free
            # now and not when the last name of it goes.
            for copy in (copy for copies in bucket.copies.values() for copy in copies):
                copy.untyped_storage().resize_(0)

    def end(self) -> None:
        """The device goes on after the last copy; what was copied to the host may be read."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
            if self.place.type != "cpu":
                self.stream.synchronize()
