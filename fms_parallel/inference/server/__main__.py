"""Serve a model over HTTP, as OpenAI's API.

    python -m fms_parallel.inference.server --architecture hf_pretrained --model_path FOLDER --tokenizer FOLDER
    torchrun --nproc_per_node=2 -m fms_parallel.inference.server --distributed tp=2 --port 8000 \\
        --architecture llama --variant 3.2-1b --model_path FOLDER --tokenizer FOLDER

The first rank serves, the others follow its engine. The model is made by `get_model`, or by the --factory of your own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fms_parallel.cli import add_fast_weights, add_fields, assignments, run
from fms_parallel.errors import ConfigError
from fms_parallel.inference.server.options import ServerOptions
from fms_parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from torch import nn

    from fms_parallel.inference.engine import InferenceEngine

FACTORIES = "fms_parallel.factories"
"""Entry points of packages that bring models: callables that make one, called as `get_model` is."""
ENGINE = ("max_batch_size", "max_seq_len", "cache", "cache_tokens", "block_size", "max_step_tokens")
"""Flags that are arguments of the engine, under the same name."""


def build_parser() -> argparse.ArgumentParser:
    """Every flag."""
    parser = argparse.ArgumentParser(
        prog="python -m fms_parallel.inference.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--factory", help="module:callable that makes the model (default: the installed get_model)")
    model.add_argument("--architecture", required=True, help="hf_pretrained: what model_path/config.json says")
    model.add_argument("--variant", help="(default: the architecture's first)")
    model.add_argument("--override", action="append", default=[], metavar="FIELD=VALUE", help="replace a config field")
    model.add_argument("--model_path", help="safetensors file or folder; without it, weights are drawn")
    model.add_argument("--data_type", help="of the weights: fp32, bf16, fp16, fp64 (default: the layout's)")
    model.add_argument("--linear_type", help="how matrices are stored: int8 rounds them while they are read")
    model.add_argument("--tokenizer", help="char, a file, or a folder (default: model_path)")
    model.add_argument("--distributed", help='the layout, such as "tp=2"; without it one process')
    model.add_argument("--device_type", default="cpu", choices=("cpu", "cuda"))
    model.add_argument("--timeout", type=float, default=600.0, help="seconds until a silent rank is given up")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--max_batch_size", type=int, default=8, help="rows running at a time (default: %(default)s)")
    engine.add_argument("--max_seq_len", type=int, help="tokens of a row, prompt and new (default: the model's)")
    engine.add_argument("--cache", help="paged, manager, internal or none (default: paged)")
    engine.add_argument("--cache_tokens", type=int, help="of the paged cache (default: max_batch_size * max_seq_len)")
    engine.add_argument("--block_size", type=int, default=16, help="tokens of its blocks (default: %(default)s)")
    engine.add_argument("--max_step_tokens", type=int, default=512, help="of all rows in a step (default: %(default)s)")
    add_fast_weights(engine)
    engine.add_argument("--prompt_lookup", type=int, metavar="N", help="propose N tokens that followed before")
    add_fields(parser.add_argument_group("server"), fields(ServerOptions))
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Check the command, then serve until a signal."""
    args = build_parser().parse_args(words)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.distributed is None and world > 1:
        raise ConfigError(f"{world} ranks were started but --distributed says nothing: choose a layout, as tp={world}.")
    layout = ParallelLayout.parse(args.distributed).resolve(world, int(os.environ.get("LOCAL_WORLD_SIZE", str(world))))
    options = ServerOptions(**{one.name: getattr(args, one.name) for one in fields(ServerOptions)})
    tokenizer = args.tokenizer or args.model_path
    if tokenizer is None:
        raise ConfigError("no tokenizer: give --tokenizer (char, a file, or a folder).")
    factory = find_factory(args.factory)

    from fms_parallel.distributed.start import process_group
    from fms_parallel.inference.server.run import bind, require
    from fms_parallel.log import log_to_stderr

    require()
    with process_group(args.device_type, args.timeout) as launch:
        log_to_stderr(rank=launch.rank)
        listener = bind(options) if launch.rank == 0 else None
        engine = make_engine(args, factory, layout, tokenizer)
        if listener is None:
            follow(engine)
        else:
            serve(args, engine, options, listener, Path(tokenizer))
    return 0


def find_factory(name: str | None) -> Callable[..., nn.Module]:
    """What makes the model: `module:callable`, or the one that is installed.

    Raises:
        ConfigError: there is none, or several.
    """
    if name is None:
        found = list(entry_points(group=FACTORIES))
        if len(found) != 1:
            known = ", ".join(one.value for one in found) or "none; pip install -e . brings get_model"
            raise ConfigError(f"--factory module:callable must say what makes the model. Installed: {known}.")
        name = found[0].value
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"--factory {name!r}: write module:callable.")
    sys.path.insert(0, "")  # `python -m` has it, torchrun's workers do not always
    try:
        factory = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--factory {name!r}: {error}.") from None
    if not callable(factory):
        raise ConfigError(f"--factory {name!r}: {module} has nothing callable named {attribute!r}.")
    return factory  # type: ignore[no-any-return]


def make_engine(
    args: argparse.Namespace, factory: Callable[..., nn.Module], layout: ParallelLayout, tokenizer: str
) -> InferenceEngine:
    """Model and engine, on every rank."""
    from fms_parallel.inference import InferenceEngine, PromptLookup
    from fms_parallel.tokenizers import get_tokenizer

    text = get_tokenizer(tokenizer)
    given = {"data_type": args.data_type, "linear_type": args.linear_type}
    model = factory(
        args.architecture,
        args.variant,
        args.model_path,
        device_type=args.device_type,
        distributed_strategy=layout,
        **{name: value for name, value in given.items() if value is not None},
        **assignments(args.override, "--override"),
    )
    speculative = None if args.prompt_lookup is None else PromptLookup(args.prompt_lookup)
    words: dict[str, Any] = {name: getattr(args, name) for name in ENGINE}
    return InferenceEngine(model, text, speculative=speculative, fast_weights=args.fast_weights or False, **words)


def serve(
    args: argparse.Namespace, engine: InferenceEngine, options: ServerOptions, listener: socket.socket, folder: Path
) -> None:
    """On the first rank: until a signal. Says on stdout where, once it listens."""
    from fms_parallel.inference.server.run import Server

    path = args.model_path
    name = Path(path).resolve().stem if path else "-".join(filter(None, (args.architecture, args.variant)))
    folder = folder.parent if folder.is_file() else folder
    server = Server(engine, name, options, folder=folder, ends=end_tokens(engine, path), listener=listener)
    engine.eval()
    server.run(lambda: sys.stdout.write(f"serving {server.name} on {server.url}/v1\n") and sys.stdout.flush())


def follow(engine: InferenceEngine) -> None:
    """On the other ranks: until the first closes its engine. Signals are for the first, which lets requests end."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    engine.eval().follow()


def end_tokens(engine: InferenceEngine, model_path: str | None) -> frozenset[int] | None:
    """The tokenizer's eos, and those of a model's generation_config.json; None: nobody names any."""
    file = None if model_path is None else Path(model_path) / "generation_config.json"
    given: Any = []
    if file is not None and file.is_file():
        try:
            given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") or []
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{file} is not a JSON object: {error}.") from None
    several = set(given if isinstance(given, list) else [given])
    if engine.intake.eos_id is not None:
        several.add(engine.intake.eos_id)
    return frozenset(several) or None


if __name__ == "__main__":
    run(main)
