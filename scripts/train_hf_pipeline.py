"""Train any transformers model in any layout: an architecture by name (tiny, random) or a local folder of weights.

    torchrun --nproc_per_node=2 scripts/train_hf_pipeline.py --model gpt2 --distributed pp=2 --steps 20
    torchrun --nproc_per_node=4 scripts/train_hf_pipeline.py --model /models/mine --distributed pp=2,fsdp=2 \\
        --schedule interleaved1f1b --microbatches 4 --output_path runs/mine

Rows are random by default, so that it runs anywhere; `--dataset_path` takes a text file for models of text.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __package__ in (None, ""):  # started as a file: then scripts/ is on the path, and not the folder that holds it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fms_parallel.cli import run
from fms_parallel.distributed.start import pick_device, process_group
from fms_parallel.errors import ConfigError, TrainingError, unknown
from fms_parallel.schedules import SCHEDULES


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="gpt2", help="architecture of fms_parallel.auto.families, or a folder")
    parser.add_argument("--task", help="causal_lm, masked_lm, seq2seq, classification (default: by the model's class)")
    parser.add_argument("--distributed", help='the layout, such as "pp=2,fsdp=2"; without it one process')
    parser.add_argument("--schedule", help="gpipe, 1f1b, interleaved1f1b, ... (default: 1f1b)")
    parser.add_argument("--microbatches", type=int, help="pieces of a step's rows (default: as many as stages)")
    parser.add_argument("--split", default="cost", help="cost, even, or blocks of each stage as 2,2")
    parser.add_argument("--lora", help="comma-separated last words of the layers that get adapters")
    parser.add_argument("--lora_rank", type=int, default=8)
    parser.add_argument("--dataset_path", help="a text file, tokenised by bytes (models of text)")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="rows of a step over all ranks (default: %(default)s)"
    )
    parser.add_argument("--seq_len", type=int, default=32, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device_type", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output_path", help="folder for the trained weights, as from_pretrained reads them")
    return parser


def check(args: argparse.Namespace) -> None:
    """What can be known to be wrong before a process group starts."""
    from fms_parallel.auto.tasks import TASKS

    for name in ("steps", "batch_size", "seq_len", "microbatches", "lora_rank"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be >= 1.")
    for name in ("lr", "max_grad_norm"):
        value = getattr(args, name)
        if not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value}: must be a number > 0.")
    if args.task is not None and args.task not in TASKS:
        raise ConfigError(unknown("task", args.task, TASKS))
    if args.schedule is not None and args.schedule not in SCHEDULES:
        raise ConfigError(unknown("schedule", args.schedule, SCHEDULES))
    if args.dataset_path is not None and not Path(args.dataset_path).is_file():
        raise ConfigError(f"--dataset_path {args.dataset_path}: no such file.")
    read_split(args.split)


def read_split(word: str) -> str | tuple[int, ...]:
    """`cost` and `even` as they are; `2,2` as numbers."""
    if word in ("cost", "even"):
        return word
    if not all(part.isdecimal() and int(part) for part in word.split(",")):
        raise ConfigError(f"--split {word}: write cost, even, or the blocks of each stage, as 2,2.")
    return tuple(int(part) for part in word.split(","))


class Rows:
    """Batches for a model: random ones, or windows of a text file, the same on every rank."""

    def __init__(self, args: argparse.Namespace, config: Any, kind: str) -> None:
        self.args, self.kind, self.config = args, kind, config
        self.vocabulary = int(getattr(config, "vocab_size", 0))
        most = getattr(config, "max_position_embeddings", None)
        if kind == "text" and most is not None and args.seq_len > most:
            raise ConfigError(f"--seq_len {args.seq_len}: {args.model} has {most} positions; use shorter rows.")
        self.text: Tensor | None = None
        if args.dataset_path is not None:
            if kind != "text":
                raise ConfigError(
                    f"--dataset_path is for models of text, and {args.model} reads {kind} input: leave it out."
                )
            raw = Path(args.dataset_path).read_bytes()
            if len(raw) <= args.seq_len:
                raise ConfigError(
                    f"--dataset_path {args.dataset_path} has {len(raw)} bytes; a row of --seq_len {args.seq_len} needs "
                    f"{args.seq_len + 1}: give a longer text or shorter rows."
                )
            self.text = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() % self.vocabulary

    def batch(self, step: int) -> dict[str, Tensor]:
        """The global batch of a step."""
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        rows, length = self.args.batch_size, self.args.seq_len
        if self.kind == "picture":
            size = self.config.image_size
            pixels = torch.randn(rows, self.config.num_channels, size, size, generator=generator)
            return {
                "pixel_values": pixels,
                "labels": torch.randint(self.config.num_labels, (rows,), generator=generator),
            }
        if self.text is not None:
            starts = torch.randint(len(self.text) - length, (rows,), generator=generator)
            ids = torch.stack([self.text[start : start + length] for start in starts])
        else:
            ids = torch.randint(3, self.vocabulary, (rows, length), generator=generator)
        if self.kind == "spoken":
            frames = 2 * self.config.max_source_positions
            features = torch.randn(rows, self.config.num_mel_bins, frames, generator=generator)
            return {"input_features": features, "labels": ids}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


KINDS = {"pixel_values": "picture", "input_features": "spoken"}
"""A model's main input -> what its rows are; anything else is text."""


def train(args: argparse.Namespace) -> None:
    """Train, and write the weights."""
    from fms_parallel.auto import parallelize
    from fms_parallel.auto.lora import add_lora, merge_lora
    from fms_parallel.auto.source import build_skeleton

    with process_group(args.device_type) as launch:
        if launch.world_size > 1 and args.distributed is None:
            raise ConfigError(
                f"{launch.world_size} ranks were started but --distributed says nothing: choose a layout, such as "
                f"pp={launch.world_size}."
            )
        folder = Path(args.model) if Path(args.model).is_dir() else None
        skeleton, _, _ = build_skeleton(_source(args.model), args.task)
        if args.lora:
            add_lora(skeleton, args.lora.split(","), args.lora_rank)
        kind = KINDS.get(getattr(skeleton, "main_input_name", ""), "text")
        rows = Rows(args, skeleton.config, kind)
        engine = parallelize(
            skeleton,
            args.distributed,
            _share(rows.batch(0), args, launch.world_size),
            task=args.task,
            schedule=args.schedule,
            microbatches=args.microbatches,
            split=read_split(args.split),
            weights=folder,
            device=pick_device(args.device_type, launch),
            seed=args.seed,
        )
        optimizer = engine.adamw(lr=args.lr)
        for step in range(1, args.steps + 1):
            loss = engine.train_step(engine.rows_of(rows.batch(step)))
            norm = engine.clip_grad_norm_(args.max_grad_norm)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise TrainingError(f"step {step}: loss {float(loss)}, gradient norm {float(norm)}: try a lower --lr.")
            optimizer.step()
            if launch.rank == 0:
                print(f"step {step:>5}  loss {float(loss):.4f}  norm {float(norm):.3f}", flush=True)
        if args.output_path:
            if args.lora:
                merge_lora(engine)
            engine.save_pretrained(args.output_path)


def _source(model: str) -> Any:
    from fms_parallel.auto.families import tiny_config

    return model if Path(model).is_dir() else tiny_config(model)


def _share(batch: dict[str, Tensor], args: argparse.Namespace, world: int) -> dict[str, Tensor]:
    """As many rows as a rank will have: only their number counts."""
    from fms_parallel.layout import ParallelLayout

    count = ParallelLayout.parse(args.distributed).resolve(world).data_parallel
    return {name: value[: max(1, len(value) // count)] for name, value in batch.items()}


def main() -> int:
    """Train as the flags say."""
    args = build_parser().parse_args()
    check(args)
    train(args)
    return 0


if __name__ == "__main__":
    run(main)
