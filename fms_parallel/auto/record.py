"""What a model does, seen once: its repeated blocks, every tensor that goes from one to what follows, and costs.

One forward runs on fake tensors (shapes without memory) under two eyes. Hooks see modules begin and end; a dispatch
mode sees every operation and notes, for each storage, what it was made from: parameters outside the blocks, and what
blocks handed out. Inside a block nothing is followed, because a block is never cut.

    embed ->  block 0  -> block 1 -> norm -> head         reads(block 1) = {out of block 0}
      \\-> rotary table --^---^                            reads(head)    = {out of block 1, norm.weight, head.weight}

A dependency is followed through code without gradients too (masks, positions). This page knows modules and tensors; it
knows no stages and no ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fms_parallel import compat
from fms_parallel.auto.blocks import BlockCall, Carried, Meta, Output, Recording, Same
from fms_parallel.errors import LayoutError


def record(
    model: nn.Module,
    inputs: Mapping[str, Any],
    blocks: list[str],
    *,
    dtype: torch.dtype | None = None,
    wanted: Callable[[Any], Any] = lambda out: out,
) -> Recording:
    """Run `model(**inputs)` on fake tensors and note what it did.

    Args:
        model: on the meta device or anywhere; nothing of it is read or changed.
        inputs: tensors (only shape and dtype count) or constants. blocks: their names.
        dtype: what floating-point parameters compute in, when not their own.
        wanted: picks from the result what the loss reads.
    Raises:
        LayoutError: the forward needs the values of tensors, a block runs twice or not at all, or a tensor from inside
            a block is used outside without any module having returned it.
    """
    quick = _Recorder(model, blocks, repeat=True)
    found = quick.run(inputs, dtype, wanted)
    if quick.escaped:  # copies of a block's recording lack what escaped from it
        found = _Recorder(model, blocks, repeat=False).run(inputs, dtype, wanted)
    return found


class _Inside(NamedTuple):
    """Made inside this block."""

    block: int


class _Recorder:
    """One recording.

    Attributes:
        repeat: do not run a block that looks like an earlier one, but say it returned the same.
        escaped: something outside read a tensor from inside a block.
    """

    def __init__(self, model: nn.Module, blocks: list[str], repeat: bool) -> None:
        self.model, self.repeat, self.escaped = model, repeat, False
        self.names = {id(module): name for name, module in model.named_modules()}
        self.block_names = {id(model.get_submodule(name)): name for name in blocks}
        self.made: dict[int, frozenset[Any]] = {}  # storage -> what it was made from
        self.returned: dict[int, Carried] = {}  # storage made in a block -> whose output it is
        self.kept: list[Any] = []  # a storage's number stays its own while it lives
        self.calls: list[BlockCall] = []
        self.outside: dict[str, list[Output]] = {}
        self.metas: dict[Carried, Meta] = {}
        self.flops = [0]
        self.open: list[str] = []
        self.inside: int | None = None
        self.alike: dict[Any, BlockCall] = {}

    def run(self, inputs: Mapping[str, Any], dtype: torch.dtype | None, wanted: Callable[[Any], Any]) -> Recording:
        """Everything that one forward did."""
        with compat.unreal_tensors(), without_eager_experts(self.model):
            given = {
                name: _fake(value, dtype) if isinstance(value, Tensor) else value for name, value in inputs.items()
            }
            state = self._fake_state(dtype)
            with self._hooks(), compat.watch_operations(self.saw):
                try:
                    out = torch.func.functional_call(self.model, state, (), given, tie_weights=False)
                except Exception as error:
                    raise self._refusal(error) from error
            final = self._reads(wanted(out))
        missing = [name for name in self.block_names.values() if name not in {call.name for call in self.calls}]
        if missing:
            raise LayoutError(
                f"block {missing[0]} did not run on the example batch: pp needs every block in every forward."
            )
        return Recording(self.calls, self.outside, final, self.metas, self.flops)

    def _fake_state(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Fake parameters and buffers by name, tied ones one tensor; notes which storage is which parameter."""
        found: dict[str, Tensor] = {}
        by_id: dict[int, Tensor] = {}
        for name, tensor in _state(self.model):
            if id(tensor) not in by_id:
                by_id[id(tensor)] = _fake(tensor, dtype if isinstance(tensor, nn.Parameter) else None)
                if isinstance(tensor, nn.Parameter):
                    made = by_id[id(tensor)].requires_grad_(tensor.requires_grad)
                    self.made[_storage(made)] = frozenset([name])  # its first name
            found[name] = by_id[id(tensor)]
        self.kept.extend(found.values())
        return found

    # ---- operations -----------------------------------------------------------------------------------------------

    def saw(self, writes: bool, arguments: list[Tensor], results: list[Tensor], flops: int) -> None:
        """One operation has run."""
        self.flops[-1] += flops
        if self.inside is not None:
            source: frozenset[Any] = frozenset([_Inside(self.inside)])
        else:
            source = frozenset().union(*(self._made_from(tensor) for tensor in arguments))
        for result in results:
            key = _storage(result)
            if key in self.made:
                if self.inside is None or writes:  # a block that writes into what is not its own lets something out
                    self.made[key] |= source
            else:
                self.made[key] = source
                self.kept.append(result)

    def _made_from(self, tensor: Tensor) -> frozenset[Any]:
        """What a tensor outside blocks was made from; one from inside a block becomes `Carried`."""
        key = _storage(tensor)
        found = self.made.get(key, frozenset())
        if not any(isinstance(item, _Inside) for item in found):
            return found
        self.escaped = True
        if key not in self.returned:
            name = self.calls[min(item.block for item in found if isinstance(item, _Inside))].name
            raise LayoutError(
                f"a tensor from inside block {name} is used outside of it, and no module returned it: pp cannot carry "
                "it to another stage. Let the block return it, or a module inside the block."
            )
        carried = self.returned[key]
        self.metas[carried] = _meta(tensor)
        self.made[key] = frozenset([carried])
        return self.made[key]

    def _reads(self, tree: Any) -> frozenset[Any]:
        leaves = [leaf for leaf in compat.flatten_tree(tree)[0] if isinstance(leaf, Tensor)]
        return frozenset().union(*map(self._made_from, leaves))

    # ---- modules --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        handles: list[Any] = []
        replaced: list[nn.Module] = []
        try:
            for identity, name in self.block_names.items():
                block = self.model.get_submodule(name)
                assert id(block) == identity
                replaced.append(block)
                block.forward = _Watched(self, block, name, block.forward)  # type: ignore[method-assign]
            for module in self.model.modules():
                if id(module) not in self.block_names:
                    handles.append(module.register_forward_pre_hook(self._opened, prepend=True))
                    handles.append(module.register_forward_hook(self._closed, prepend=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in replaced:
                watched = block.__dict__.pop("forward")
                if "forward" in watched.own:
                    block.forward = watched.own["forward"]  # type: ignore[method-assign]

    def _opened(self, module: nn.Module, args: Any) -> None:
        self.open.append(self.names[id(module)])

    def _closed(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self.open.pop()
        if self.inside is None:
            self.outside.setdefault(name, []).append(_described(output))
            return
        call = self.calls[self.inside]
        relative = name.removeprefix(f"{call.name}.")
        for number, leaf in enumerate(compat.flatten_tree(output)[0]):
            if isinstance(leaf, Tensor) and self.made.get(_storage(leaf)) == frozenset([_Inside(self.inside)]):
                self.returned.setdefault(_storage(leaf), Carried(self.inside, relative, number))
        call.inside.setdefault(relative, _described(output))

    def run_block(self, block: nn.Module, name: str, forward: Any, args: Any, kwargs: Any) -> Any:
        """One block's forward, or what a block like it returned."""
        if self.inside is not None:
            return forward(*args, **kwargs)
        if any(call.name == name for call in self.calls):
            raise LayoutError(f"block {name} runs twice in one forward: pp cannot put it into one stage.")
        number, reads = len(self.calls), self._reads((args, kwargs))
        leaves = compat.flatten_tree((args, kwargs))[0]
        before = {_storage(leaf): (i, leaf._version) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        looks = (_looks(block), str(compat.flatten_tree((args, kwargs))[1]), tuple(map(_look, leaves)))
        call = BlockCall(name, reads, Output(None, ()))
        self.calls.append(call)
        self.flops.append(0)  # the block's own, moved to it below
        twin = self.alike.get(looks) if self.repeat else None
        self.inside = number
        self.open.append(name)
        out = forward(*args, **kwargs) if twin is None else _again(twin.output, leaves)
        self.open.pop()
        self.inside = None
        call.flops = self.flops[-1] if twin is None else twin.flops
        self.flops[-1] = 0
        call.output = self._handed_out(number, out, leaves, before)
        if twin is None and any(other.name.rpartition(".")[0] == name.rpartition(".")[0] for other in self.calls[:-1]):
            self.alike[looks] = call  # the second of its kind: the first one's may be special
        return out

    def _handed_out(self, number: int, out: Any, leaves: list[Any], before: dict[int, tuple[int, int]]) -> Output:
        """Describe a block's output, and from here on follow it as `Carried`."""
        flat, spec = compat.flatten_tree(out)
        described: list[Any] = []
        for index, leaf in enumerate(flat):
            if not isinstance(leaf, Tensor):
                described.append(leaf)
                continue
            key = _storage(leaf)
            argument = before.get(key)
            if argument is not None and leaves[argument[0]].shape == leaf.shape and leaf._version == argument[1]:
                described.append(Same(argument[0]))
                continue
            carried = Carried(number, "", index)
            self.metas[carried] = _meta(leaf)
            described.append(_meta(leaf))
            self.made[key] = frozenset([carried])
            self.kept.append(leaf)
        return Output(spec, tuple(described))

    def _refusal(self, error: Exception) -> Exception:
        if isinstance(error, LayoutError):
            return error
        where = self.open[-1] if self.open and self.open[-1] else type(self.model).__name__
        if compat.needs_values(error):
            return LayoutError(
                f"{where} looks at the values of tensors to decide what to do ({type(error).__name__}), so what "
                "crosses a cut cannot be known beforehand: pp does not run it. Use fsdp or tp, or make it free of that."
            )
        return LayoutError(f"the example batch does not run through {where}: {type(error).__name__}: {error}")


class _Watched:
    """A block's forward while it is recorded."""

    def __init__(self, recorder: _Recorder, block: nn.Module, name: str, forward: Any) -> None:
        self.own = {"forward": forward} if "forward" in block.__dict__ else {}
        self.call = lambda args, kwargs: recorder.run_block(block, name, forward, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(args, kwargs)


# ---- small things -----------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _fake(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """On the CPU, of this shape: called where tensors have no memory."""
    return torch.empty(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype)


def _storage(tensor: Tensor) -> int:
    return compat.storage_number(tensor)


def _meta(tensor: Tensor) -> Meta:
    return Meta(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def _described(output: Any) -> Output:
    leaves, spec = compat.flatten_tree(output)
    return Output(spec, tuple(_meta(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves))


def _look(leaf: Any) -> Any:
    return _meta(leaf) if isinstance(leaf, Tensor) else str(leaf)


def _looks(block: nn.Module) -> Any:
    """Blocks that look alike return tensors of the same shapes for arguments of the same shapes."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


def _again(output: Output, leaves: list[Any]) -> Any:
    flat = []
    for leaf in output.leaves:
        if isinstance(leaf, Same):
            leaf = leaves[leaf.argument]
        elif isinstance(leaf, Meta):
            leaf = torch.empty(leaf.shape, dtype=leaf.dtype).requires_grad_(leaf.requires_grad)
        flat.append(leaf)
    return compat.unflatten_tree(flat, output.spec)


@contextlib.contextmanager
def without_eager_experts(model: nn.Module) -> Iterator[None]:
    """transformers' experts in the one way that needs no values: shapes are the same in all."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [(c, c._experts_implementation_internal) for c in configs if _has_experts(c)]
    try:
        for config, _ in before:
            config._experts_implementation_internal = "batched_mm"
        yield
    finally:
        for config, word in before:
            config._experts_implementation_internal = word


def _has_experts(config: Any) -> bool:
    return getattr(config, "_experts_implementation_internal", None) is not None
