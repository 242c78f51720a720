"""What the training scripts share: flags of model and training, the layout, the tokenizer, progress lines, run files.

It knows command lines and what a person sees; what is trained on which rows is each script's.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fms_parallel.cli import add_fields, assignments
from fms_parallel.errors import ConfigError
from fms_parallel.layout import ParallelLayout
from fms_parallel.training.options import TrainOptions, option_fields

if TYPE_CHECKING:
    from fms_parallel.data import RowDataset
    from fms_parallel.distributed.start import Launch
    from fms_parallel.tokenizers import Tokenizer

STYLES = {".jsonl": "jsonl", ".json": "instruction", ".arrow": "arrow", ".parquet": "parquet"}
"""Suffix of --dataset_path -> style, when --dataset_style is not given; anything else is text."""

LOSS_CURVE, RUN, TOKENIZER = "loss.png", "run.json", "tokenizer.model"
"""What a run's folder holds beside what the training loop writes."""


# ---- flags --------------------------------------------------------------------------------------------------------


def add_model_flags(parser: argparse.ArgumentParser, architecture: str | None, default: str) -> None:
    """Which model (`default` says which when none is named), where its weights come from, how it is spread."""
    model = parser.add_argument_group("model")
    model.add_argument("--architecture", default=architecture, help=f"a registered one, or hf_pretrained ({default})")
    model.add_argument("--variant", help="one of its variants (default: the first, micro)")
    model.add_argument("--override", action="append", default=[], metavar="FIELD=VALUE", help="replace a config field")
    model.add_argument("--model_path", help="safetensors file or folder to start from; without it, weights are drawn")
    model.add_argument("--checkpoint_format", help="whose keys --model_path has: hf, meta, native (default: found out)")
    model.add_argument("--distributed", help='the layout, as "fsdp=2,tp=2,sp"; auto: planned; without it one process')
    model.add_argument("--gpus", metavar="SPEC", help="auto: what to plan for, as h100:64 (default: this machine)")
    model.add_argument("--devices", metavar="FILE.json", help="auto: device descriptions, as fms-plan calibrate writes")
    model.add_argument("--device_type", default="cpu", choices=("cpu", "cuda"))
    model.add_argument("--default_dtype", choices=("fp32", "bf16", "fp64"), help="precision; bf16 keeps fp32 weights")
    model.add_argument("--compile", action="store_true", help="torch.compile each block")
    model.add_argument("--deterministic", action="store_true", help="torch.use_deterministic_algorithms")
    model.add_argument("--timeout", type=float, default=600.0, help="seconds until a silent rank is given up")


def add_data_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which text, in which tokens."""
    data = parser.add_argument_group("data")
    data.add_argument("--tokenizer", default="char", help="char, a file, or sentencepiece:N to train one of N pieces")
    data.add_argument("--dataset_style", help="text, stdlib, jsonl, instruction, arrow, parquet, random")
    data.add_argument("--dataset_path", help="file or folder; without it the source of the Python standard library")
    data.add_argument("--dataset_option", action="append", default=[], metavar="NAME=VALUE", help="of that style")
    data.add_argument("--seq_len", type=int, default=256, help="tokens of a row (default: %(default)s)")
    data.add_argument("--validation_fraction", type=float, default=0.02, help="rows held out (default: %(default)s)")
    data.add_argument("--cache_dir", help="where token files are kept (default: cache/ in --output_path)")
    return data


def add_training_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Every field of `TrainOptions`."""
    training = parser.add_argument_group("training")
    add_fields(training, option_fields())
    return training


def read_options(args: argparse.Namespace) -> TrainOptions:
    """The training flags."""
    return TrainOptions.of(**{field.name: getattr(args, field.name) for field in option_fields()})


def refuse_idle(parser: argparse.ArgumentParser, args: argparse.Namespace, needs: Mapping[str, str]) -> None:
    """Refuse a flag that was given but does nothing. `needs`: flag -> the one without which it is idle."""
    for name, other in needs.items():
        if getattr(args, name) != parser.get_default(name) and not getattr(args, other):
            raise ConfigError(f"--{name} belongs to --{other}: add it, or drop --{name}.")


def read_layout(args: argparse.Namespace) -> ParallelLayout | None:
    """The layout that --distributed and --default_dtype describe, for the ranks that the launcher started.

    None: --distributed auto, which needs the model; see `automatic.settle`.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.distributed == "auto":
        return None
    for name in ("gpus", "devices"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} describes what --distributed auto plans for: add that, or drop it.")
    if args.distributed is None and world > 1:
        raise ConfigError(
            f"{world} ranks were started but --distributed says nothing: choose a layout, such as fsdp={world}."
        )
    layout = ParallelLayout.parse(args.distributed)
    if args.default_dtype is not None:
        if "precision" in (args.distributed or "") and layout.precision != args.default_dtype:
            raise ConfigError(
                f"--default_dtype {args.default_dtype} and precision={layout.precision} contradict each other."
            )
        layout = replace(layout, precision=args.default_dtype)
    return layout.resolve(world, int(os.environ.get("LOCAL_WORLD_SIZE", str(world))))


def check_request(args: argparse.Namespace, config: Any, layout: ParallelLayout) -> None:
    """What can be known to be wrong before a process group starts."""
    from fms_parallel.data.feed import check_divides
    from fms_parallel.strategy.compose import check_layout

    def divides(each: ParallelLayout) -> None:
        check_divides(args.batch_size, each.data_parallel, args.grad_accum_steps)

    check_layout(layout, divides, shape=config.shape(), compile_blocks=args.compile)
    if args.seq_len > config.max_positions:
        raise ConfigError(
            f"--seq_len {args.seq_len} is longer than the model's max_positions={config.max_positions}: "
            "use shorter rows, or --override max_positions=N for a model without a checkpoint."
        )


# ---- data ---------------------------------------------------------------------------------------------------------


def read_corpus_rows(args: argparse.Namespace, options: TrainOptions, launch: Launch) -> tuple[Tokenizer, RowDataset]:
    """Tokenizer and rows of --dataset_path. Rank 0 goes first, so that files are made once."""
    from fms_parallel.data import get_corpus, get_dataset
    from fms_parallel.distributed.start import first_rank_first

    path = args.dataset_path
    style = args.dataset_style or ("stdlib" if path is None else STYLES.get(Path(path).suffix, "text"))
    extras = assignments(args.dataset_option, "--dataset_option")
    cache = args.cache_dir or (options.output_path and str(Path(options.output_path) / "cache"))
    with first_rank_first(launch):
        tokenizer = make_tokenizer(args, options, lambda: get_corpus(style, path, **extras).texts())
        rows = get_dataset(style, tokenizer, path, seq_len=args.seq_len, cache_dir=cache, **extras)
    return tokenizer, rows


def make_tokenizer(args: argparse.Namespace, options: TrainOptions, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that --tokenizer names; `sentencepiece:N` is trained on the texts, once per run folder."""
    from fms_parallel.tokenizers import get_tokenizer, train_sentencepiece

    name = args.tokenizer
    kind, _, pieces = name.partition(":")
    if kind == "sentencepiece":
        if not pieces.isdigit() or options.output_path is None:
            raise ConfigError(f"--tokenizer {name}: write sentencepiece:N, with --output_path to keep it in.")
        name = Path(options.output_path) / TOKENIZER
        if not name.exists():
            train_sentencepiece(texts(), int(pieces), name)
    return get_tokenizer(name)


def held_out(args: argparse.Namespace, options: TrainOptions, rows: RowDataset) -> tuple[RowDataset, RowDataset | None]:
    """Training rows, and the rows to validate on when that is asked for."""
    from fms_parallel.data import train_validation_split

    if options.validate_steps is None:
        return rows, None
    return train_validation_split(rows, args.validation_fraction, options.seed)


# ---- what a person sees -------------------------------------------------------------------------------------------


class Progress:
    """Prints the first lines of a run, and one line every `report_steps`."""

    def __init__(self, options: TrainOptions, layout: ParallelLayout, model: Any, args: Any, launch: Launch) -> None:
        shape = model.config.shape()
        words = str(layout) or "one process"
        name = f"{model.architecture} {args.variant or ''}".strip()
        print(f"{name}: {shape.parameters():,} parameters, layout {words}", flush=True)
        ranks = "1 rank" if launch.world_size == 1 else f"{launch.world_size} ranks"
        print(f"{ranks} on {args.device_type}, {options.batch_size} x {args.seq_len} tokens per step", flush=True)
        self.every = options.report_steps
        self.seconds = self.tokens = 0.0

    def __call__(self, numbers: dict[str, Any]) -> None:
        self.seconds += numbers["seconds"]
        self.tokens += numbers["tokens"]
        if numbers["step"] % self.every and "validation_loss" not in numbers and numbers["step"] > 1:
            return
        held = f"  validation {numbers['validation_loss']:.4f}" if "validation_loss" in numbers else ""
        print(
            f"step {numbers['step']:>6}  loss {numbers['loss']:.4f}  norm {numbers['grad_norm']:.3f}  "
            f"lr {numbers['lr']:.2e}  {self.tokens / self.seconds:,.0f} tokens/s  "
            f"{numbers['peak_memory_bytes'] / 2**20:,.0f} MiB{held}",
            flush=True,
        )
        self.seconds = self.tokens = 0.0


def write_run(args: argparse.Namespace, options: TrainOptions, layout: ParallelLayout, model: Any, **more: Any) -> None:
    """What builds the model again, in any layout: `inference.py --run_folder` reads it."""
    if options.output_path is None:
        return
    folder = Path(options.output_path)
    folder.mkdir(parents=True, exist_ok=True)
    trained = args.tokenizer.startswith("sentencepiece:")
    content = {
        "architecture": model.architecture,
        "variant": args.variant,
        "overrides": asdict(model.config),
        "tokenizer": str((folder / TOKENIZER).resolve()) if trained else args.tokenizer,
        "layout": str(layout),
        "seq_len": args.seq_len,
        "options": options.as_dict(),
        **more,
    }
    (folder / RUN).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def finish(options: TrainOptions, outcome: Any) -> None:
    """The loss curve and a last word."""
    if options.output_path is None:
        return
    from fms_parallel.training.metrics import METRICS, plot_losses

    folder = Path(options.output_path)
    try:
        print(f"loss curve: {plot_losses(folder / METRICS, folder / LOSS_CURVE)}")
    except ConfigError as error:
        print(f"no loss curve: {error}")
    print(f"checkpoint: {outcome.checkpoint}")
    if outcome.interrupted:
        print(f"interrupted at step {outcome.step} of {outcome.steps}; the same command with --resume auto goes on")
