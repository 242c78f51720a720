"""What the training software does with a model: kernels, precision of states, overlaps. One value per framework.

It knows habits of software; it knows nothing of devices or layouts. `native` is this library; the others exist to
compare with published measurements of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.planner.hardware import read_data


@dataclass(frozen=True)
class Software:
    """One framework's habits.

    Attributes:
        fused_attention: attention never writes its S x S scores. causal_skip: it does not compute what is masked.
        fused_elementwise: compiled kernels; bias, activation and residual cost one pass over memory together.
        elementwise: traffic of norms, rotary positions, activations and loss as a multiple of one fused kernel's.
        dropout: masks are drawn, kept and applied.
        parameter_bytes, gradient_bytes, optimizer_bytes: kept per parameter, sharded by fsdp; ZeRO 1 shards the
            optimizer's over dp as well, ZeRO 2 the gradients'.
        working_bytes: of one gathered parameter in a matrix product, and of one activation element.
        reduce_bytes: of one gradient in a reduction over replicas.
        overlap_dp, overlap_tp: part of that communication that hides behind computation when there is enough of it.
        overlap_pp: sends and receives of a pipeline hide behind computation.
        reserve_gb: context, allocator and communication buffers. fragmentation: factor on activations.
        shard_over_cp: fsdp shards over the ranks of cp as well: `never`, `with fsdp`, or `always`, also without fsdp.
        selective: what that recompute policy makes again: `core` the attention core (Megatron), `memory` all but matrix
            products (this library), `half` besides that every second matrix product (torchtitan).
        early_stop: full recomputation ends before the last matrix product of a block and what it exchanges, as torch's
            checkpoints do. selective_talk: part of a forward pass's exchanges within tp that `selective` repeats.
        gather_again: with sp, the input of a column-parallel region is gathered a second time in the backward pass,
            while the gradient of that input is computed.
        logits_at_once: elements of logits that the loss holds; 0: all, with log-probabilities and gradient.
        gradient_buffers: gradients have memory of their own during the whole step, not only once they are made.
        replicas_copy: over dp, and over cp without fsdp, there is a copy of the parameters to compute with. cast_again:
            a pipeline without fsdp keeps one copy in the working precision for each micro-batch in flight.
        ring_keeps: attention outputs that a block keeps besides with cp. ring_gradient_bytes: of one number of the
            gradients that go around that ring with keys and values; 0: as many as of keys and values.
        host: time of the host to start one kernel, as a multiple of what plain torch needs. host_of: what an axis adds
            per block and micro-batch where nothing hides it, in kernels: hooks, and wrappers of parameters.
        hop_buffers: a pipeline has buffers of its own for all that a step receives, and keeps what it sent until that
            micro-batch's backward pass, as torch's does.
        stream_pools: memory is reserved per stream, as by torch's allocator: what fsdp's gathers and reductions had is
            not free for activations.
        repeats_kv: attention is given keys and values repeated for every query head. ring_gathers: with cp, those of
            all its ranks at once, and fp32 sums of their gradients.
        hop_whole: without sp, every rank of tp hands all activations on to the next stage, instead of a part.
    """

    name: str
    fused_attention: bool = True
    causal_skip: bool = True
    fused_elementwise: bool = False
    elementwise: float = 1.0
    dropout: bool = False
    parameter_bytes: float = 4
    gradient_bytes: float = 4
    optimizer_bytes: float = 8
    working_bytes: float = 2
    reduce_bytes: float = 4
    overlap_dp: float = 0.9
    overlap_tp: float = 0.0
    overlap_pp: bool = False
    reserve_gb: float = 2.0
    fragmentation: float = 1.0
    shard_over_cp: str = "with fsdp"
    selective: str = "memory"
    gather_again: bool = False
    logits_at_once: int = 0
    gradient_buffers: bool = True
    replicas_copy: bool = False
    cast_again: bool = False
    ring_keeps: float = 0.0
    ring_gradient_bytes: float = 0.0
    hop_buffers: bool = False
    stream_pools: bool = False
    repeats_kv: bool = False
    ring_gathers: bool = False
    hop_whole: bool = False
    host: float = 1.0
    host_of: Mapping[str, float] = field(default_factory=dict)
    early_stop: bool = True
    selective_talk: float = 0.75

    def with_precision(self, precision: str) -> Software:
        """The same habits when matrices are multiplied in `precision`."""
        width = {"fp8": 2, "bf16": 2, "fp32": 4, "fp64": 8}
        if precision not in width:
            raise ConfigError(unknown("precision", precision, width))
        if precision != "fp64":
            return replace(self, working_bytes=width[precision])
        return replace(self, working_bytes=8, parameter_bytes=8, gradient_bytes=8, optimizer_bytes=16, reduce_bytes=8)


def load_software(name: str) -> Software:
    """One of the frameworks in `data/software.json`.

    Raises:
        ConfigError: an unknown name.
    """
    tables: Mapping[str, Mapping[str, Any]] = read_data("software.json")
    if name not in tables:
        raise ConfigError(unknown("software", name, tables))
    return Software(name=name, **tables[name])
