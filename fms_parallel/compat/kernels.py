"""Single operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fail (RuntimeError) when a bool scalar is false: on the CPU at once, elsewhere without making the host wait."""
    torch._assert_async(condition, message)


def has_attention_sums(q: Tensor) -> bool:
    """Whether torch has a fused attention for queries like these that tells its log of the sum of exponentials."""
    if q.device.type == "cpu":
        return q.dtype in (torch.float32, torch.float64, torch.bfloat16)
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.device.type == "cuda" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def attention_sums(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Fused attention of `q [B, h, S, D]` over `k, v [B, k, T, D]`, and log sum exp of the scores, `[B, h, S]`."""
    ops = torch.ops.aten
    if q.device.type == "cpu":
        out, sums = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    else:
        out, sums, *_ = ops._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, sums


def attention_sums_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of `attention_sums`; `out` and `sums` may be those of a softmax over more keys."""
    ops, given = torch.ops.aten, (grad, q, k, v, out, sums)
    if q.device.type == "cpu":
        return ops._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, causal, scale=scale)  # type: ignore[no-any-return]
    # Without dropout the kernel reads no random state.
    nothing = torch.empty(2, dtype=torch.uint64, device=q.device)
    lengths = (None, None, q.shape[2], k.shape[2])
    return ops._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
        *given, *lengths, 0.0, causal, nothing, nothing, scale=scale
    )


def has_prepacked_linear(weight: Tensor) -> bool:
    """Whether torch can lay out a matrix like this for oneDNN once and for all."""
    if weight.device.type != "cpu" or weight.numel() == 0 or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def prepack_linear(weight: Tensor, rows: int) -> Tensor:
    """`weight [N, E]` laid out for oneDNN and inputs of so many rows: an opaque tensor for `prepacked_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)  # type: ignore[no-any-return]


def prepacked_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`x [..., E]` times a matrix of `prepack_linear` -> `[..., N]`."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


def has_int8_linear(x: Tensor, values: Tensor) -> bool:
    """Whether torch multiplies rows like these by int8 values in one kernel that is faster than casting them.

    It reads whole vectors without looking where a row ends (torch 2.13: wrong results and crashes for a width of 24).
    """
    fits = values.dtype == torch.int8 and values.numel() > 0 and values.shape[1] % 32 == 0
    return fits and x.device.type == "cpu" and x.dtype == torch.bfloat16


def int8_linear(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """`x [T, E]` times `scale[:, None] * values [N, E]` -> `[T, N]`."""
    return torch._weight_int8pack_mm(x.contiguous(), values.contiguous(), scale)


def has_compiler() -> bool:
    """Whether torch finds a C++ compiler for the kernels that it writes."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def compile_function(function: Callable[..., Tensor], examples: Sequence[Tensor]) -> Callable[..., Tensor]:
    """A function of tensors, compiled for the shapes of these, without what `torch.compile` checks at every call.

    Nothing is recorded for gradients. Tensors of other shapes, dtypes or devices must not be given to it.
    """
    return compile_traced(trace(function, examples), examples)  # type: ignore[return-value]


def trace(function: Callable[..., Any], examples: Sequence[Tensor]) -> GraphModule:
    """The operations that a function does with these, without gradients; tensors of its own are constants."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        return make_fx(function)(*examples)


def compile_traced(graph: GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
    """What `trace` found, as `compile_function` says; it returns what the graph does."""
    from torch._inductor import compile as compile_graph

    with torch.no_grad():
        return compile_graph(graph, list(examples))  # type: ignore[return-value]


def compile_over_sizes(function: Callable[..., Tensor], examples: Sequence[Tensor | int]) -> Callable[..., Tensor]:
    """`compile_function` for whole numbers as well, of any values from 0 on, and for tensors of any sizes but those
    that `function` needs to be as they are. Numbers and sizes that are alike in the examples must be so in every call.
    """
    from torch._inductor import compile as compile_graph
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        graph = make_fx(function, tracing_mode="symbolic")(*examples)
        unreal = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        return compile_graph(graph, unreal)  # type: ignore[return-value]


def stored(x: Tensor) -> Tensor:
    """`x`; when compiled, computed once and kept in memory, not anew for everything that reads it."""
    from torch._inductor import inductor_prims

    strides: Any = inductor_prims.force_stride_order
    return strides(x, x.stride())  # type: ignore[no-any-return]


def split_traced(graph: GraphModule, part_of: Callable[[Node], int]) -> GraphModule:
    """The graph as a sequence of modules, its direct children: the operations of one part (rising numbers) each."""
    from torch.fx.passes.split_module import split_module

    return split_module(graph, None, part_of)  # type: ignore[arg-type]
