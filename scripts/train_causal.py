"""Train a causal language model over any layout.

    python scripts/train_causal.py --steps 100                                            one process
    torchrun --nproc_per_node=2 scripts/train_causal.py --distributed tp=2,sp --steps 100
    torchrun --nproc_per_node=8 scripts/train_causal.py --distributed fsdp=4,tp=2,sp --default_dtype bf16 ...

What is wrong with a command is said before torch is imported or a process group starts, where it can be known there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fms_parallel.cli import add_fields, assignments, run
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


def build_parser() -> argparse.ArgumentParser:
    """Every flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--architecture", default="llama", help="a registered architecture (default: %(default)s)")
    model.add_argument("--variant", default="micro", help="one of its variants (default: %(default)s)")
    model.add_argument("--override", action="append", default=[], metavar="FIELD=VALUE", help="replace a config field")
    model.add_argument("--model_path", help="safetensors file or folder to start from; without it, weights are drawn")
    model.add_argument("--checkpoint_format", help="whose keys --model_path has: hf, native (default: found out)")
    model.add_argument("--distributed", help='the layout, such as "fsdp=2,tp=2,sp"; without it one process')
    model.add_argument("--device_type", default="cpu", choices=("cpu", "cuda"))
    model.add_argument("--default_dtype", choices=("fp32", "bf16", "fp64"), help="precision; bf16 keeps fp32 weights")
    model.add_argument("--compile", action="store_true", help="torch.compile each block")
    model.add_argument("--deterministic", action="store_true", help="torch.use_deterministic_algorithms")
    model.add_argument("--timeout", type=float, default=600.0, help="seconds until a silent rank is given up")
    data = parser.add_argument_group("data")
    data.add_argument("--tokenizer", default="char", help="char, a file, or sentencepiece:N to train one of N pieces")
    data.add_argument("--dataset_style", help="text, stdlib, jsonl, instruction, arrow, parquet, random")
    data.add_argument("--dataset_path", help="file or folder; without it the source of the Python standard library")
    data.add_argument("--dataset_option", action="append", default=[], metavar="NAME=VALUE", help="of that style")
    data.add_argument("--seq_len", type=int, default=256, help="tokens of a row (default: %(default)s)")
    data.add_argument("--validation_fraction", type=float, default=0.02, help="rows held out (default: %(default)s)")
    data.add_argument("--cache_dir", help="where token files are kept (default: cache/ in --output_path)")
    training = parser.add_argument_group("training")
    add_fields(training, option_fields())
    training.add_argument("--sample_prompt", default="def ", help="what the sample continues (default: %(default)r)")
    training.add_argument("--sample_tokens", type=int, default=48, help="length of the sample (default: %(default)s)")
    return parser


def main() -> int:
    """Check the command, then train."""
    args = build_parser().parse_args()
    options = TrainOptions.of(**{field.name: getattr(args, field.name) for field in option_fields()})
    layout = read_layout(args)
    overrides = assignments(args.override, "--override")
    return train_with(args, options, layout, overrides)


def read_layout(args: argparse.Namespace) -> ParallelLayout:
    """The layout that --distributed and --default_dtype describe, for the ranks that the launcher started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
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


def train_with(
    args: argparse.Namespace, options: TrainOptions, layout: ParallelLayout, overrides: dict[str, Any]
) -> int:
    """Everything that needs torch."""
    import torch

    from fms_parallel.distributed.start import process_group
    from fms_parallel.log import log_to_stderr
    from fms_parallel.models import get_config, get_model
    from fms_parallel.strategy.compose import refuse_unimplemented
    from fms_parallel.training import train

    config = get_config(args.architecture, args.variant, **overrides)
    layout.validate(config.shape())
    refuse_unimplemented(layout)
    if args.seq_len > config.max_positions:
        raise ConfigError(
            f"--seq_len {args.seq_len} is longer than the model's max_positions={config.max_positions}: "
            "use shorter rows, or --override max_positions=N for a model without a checkpoint."
        )
    torch.use_deterministic_algorithms(args.deterministic)
    with process_group(args.device_type, args.timeout) as launch:
        log_to_stderr(logging.INFO, launch.rank)
        tokenizer, training, validation = read_data(args, options, launch)
        overrides = fit_vocabulary(args, overrides, tokenizer)
        model = get_model(
            args.architecture,
            args.variant,
            args.model_path,
            args.checkpoint_format,
            args.device_type,
            distributed_strategy=layout,
            seed=options.seed,
            compile_blocks=args.compile,
            **overrides,
        )
        progress = None
        if launch.rank == 0:
            write_run(args, options, layout, overrides)
            progress = Progress(options, layout, model, args, launch)
        outcome = train(
            model,
            training,
            validation=validation,
            options=options,
            on_step=progress,
            sample=sampler(tokenizer, args) if options.sample_steps else None,
        )
        if launch.rank == 0:
            finish(options, outcome)
    return outcome.interrupted.exit_code if outcome.interrupted else 0


def read_data(
    args: argparse.Namespace, options: TrainOptions, launch: Launch
) -> tuple[Tokenizer, RowDataset, RowDataset | None]:
    """Tokenizer, training rows and validation rows. Rank 0 goes first, so that files are made once."""
    from fms_parallel.data import get_corpus, get_dataset, train_validation_split
    from fms_parallel.distributed.start import first_rank_first
    from fms_parallel.tokenizers import get_tokenizer, train_sentencepiece

    path = args.dataset_path
    style = args.dataset_style or ("stdlib" if path is None else STYLES.get(Path(path).suffix, "text"))
    extras = assignments(args.dataset_option, "--dataset_option")
    cache = args.cache_dir or (options.output_path and str(Path(options.output_path) / "cache"))
    with first_rank_first(launch):
        name = args.tokenizer
        kind, _, pieces = name.partition(":")
        if kind == "sentencepiece":
            if not pieces.isdigit() or options.output_path is None:
                raise ConfigError(f"--tokenizer {name}: write sentencepiece:N, with --output_path to keep it in.")
            name = Path(options.output_path) / TOKENIZER
            if not name.exists():
                train_sentencepiece(get_corpus(style, path, **extras).texts(), int(pieces), name)
        tokenizer = get_tokenizer(name)
        rows = get_dataset(style, tokenizer, path, seq_len=args.seq_len, cache_dir=cache, **extras)
    if options.validate_steps is None:
        return tokenizer, rows, None
    training, validation = train_validation_split(rows, args.validation_fraction, options.seed)
    return tokenizer, training, validation


def fit_vocabulary(args: argparse.Namespace, overrides: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A model that starts from drawn weights takes the tokenizer's vocabulary; one from a checkpoint must fit it."""
    from fms_parallel.models import get_config
    from fms_parallel.tokenizers import check_vocab

    if args.model_path is None and "vocab_size" not in overrides:
        overrides = {**overrides, "vocab_size": tokenizer.vocab_size}
    config = get_config(args.architecture, args.variant, **overrides)
    check_vocab(tokenizer, config.vocab_size)
    return overrides


def sampler(tokenizer: Tokenizer, args: argparse.Namespace) -> Any:
    """Text that the model makes now, greedily."""
    from fms_parallel.inference import generate_text

    def sample(model: Any) -> str:
        text = generate_text(model, tokenizer, args.sample_prompt, max_new_tokens=args.sample_tokens)
        return str(args.sample_prompt) + text[0]

    return sample


class Progress:
    """Prints the first lines of a run, and one line every `report_steps`."""

    def __init__(self, options: TrainOptions, layout: ParallelLayout, model: Any, args: Any, launch: Launch) -> None:
        shape = model.config.shape()
        words = str(layout) or "one process"
        print(f"{args.architecture} {args.variant}: {shape.parameters():,} parameters, layout {words}", flush=True)
        print(
            f"{launch.world_size} ranks on {args.device_type}, {options.batch_size} x {args.seq_len} tokens per step",
            flush=True,
        )
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


def write_run(
    args: argparse.Namespace, options: TrainOptions, layout: ParallelLayout, overrides: dict[str, Any]
) -> None:
    """What `inference.py --run_folder` needs to build the model again, in any layout."""
    if options.output_path is None:
        return
    folder = Path(options.output_path)
    folder.mkdir(parents=True, exist_ok=True)
    trained = args.tokenizer.startswith("sentencepiece:")
    content = {
        "architecture": args.architecture,
        "variant": args.variant,
        "overrides": overrides,
        "tokenizer": str((folder / TOKENIZER).resolve()) if trained else args.tokenizer,
        "layout": str(layout),
        "seq_len": args.seq_len,
        "options": options.as_dict(),
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


if __name__ == "__main__":
    run(main)
