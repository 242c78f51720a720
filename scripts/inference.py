"""Continue prompts with a model, over any layout.

    python scripts/inference.py --run_folder runs/demo --prompt "def "                  a run of train_causal.py
    torchrun --nproc_per_node=2 scripts/inference.py --run_folder runs/demo --distributed tp=2 --prompt "def "
    python scripts/inference.py --variant 3.2-1b --model_path FOLDER --tokenizer FOLDER --prompt "Once"

Every rank makes the same tokens; rank 0 prints them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fms_parallel.cli import add_fast_weights, assignments, run
from fms_parallel.errors import CheckpointError, ConfigError
from fms_parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from torch import nn


def build_parser() -> argparse.ArgumentParser:
    """Every flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--run_folder", help="folder of a training run: gives architecture, tokenizer and newest checkpoint"
    )
    model.add_argument(
        "--architecture", help="hf_pretrained: what model_path/config.json says (default: the run's, else llama)"
    )
    model.add_argument("--variant", help="(default: the run's, else the architecture's first)")
    model.add_argument("--override", action="append", default=[], metavar="FIELD=VALUE", help="replace a config field")
    model.add_argument("--model_path", help="safetensors file or folder")
    model.add_argument("--checkpoint_format", help="whose keys --model_path has: hf, meta, native (default: found out)")
    model.add_argument("--linear_type", help="how matrices are stored: int8 rounds them while they are read")
    model.add_argument("--tokenizer", help="char or a file (default: the run's, else char)")
    model.add_argument("--distributed", help='the layout, such as "tp=2"; without it one process')
    model.add_argument("--device_type", default="cpu", choices=("cpu", "cuda"))
    add_fast_weights(model)
    model.add_argument("--timeout", type=float, default=600.0, help="seconds until a silent rank is given up")
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", action="append", help="may be given several times: one batch")
    text.add_argument("--max_new_tokens", type=int, default=64, help="(default: %(default)s)")
    text.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: %(default)s)"
    )
    text.add_argument("--top_k", type=int, help="sample from the k likeliest tokens only")
    text.add_argument("--top_p", type=float, help="sample from the smallest set with this probability")
    text.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the sampling: any whole number, the same one gives the same tokens, -1 too (default: %(default)s)",
    )
    text.add_argument("--no_use_cache", dest="use_cache", action="store_false", help="compute every position each time")
    text.add_argument("--json", action="store_true", help="one JSON object per prompt: prompt, text")
    return parser


def main() -> int:
    """Check the command, then generate."""
    args = build_parser().parse_args()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.distributed is None and world > 1:
        raise ConfigError(
            f"{world} ranks were started but --distributed says nothing: choose a layout, such as tp={world}."
        )
    layout = ParallelLayout.parse(args.distributed).resolve(world, int(os.environ.get("LOCAL_WORLD_SIZE", str(world))))
    overrides = assignments(args.override, "--override")
    if not args.prompt:
        raise ConfigError("nothing to continue: give --prompt TEXT.")
    if args.run_folder is not None:
        overrides = read_run(args) | overrides
    elif args.model_path is None:
        raise ConfigError("no weights: give --run_folder FOLDER (of a training run) or --model_path.")
    args.architecture = args.architecture or "llama"
    return generate_with(args, layout, overrides)


def read_run(args: argparse.Namespace) -> dict[str, Any]:
    """Take architecture, variant and tokenizer from a run's run.json; returns its config overrides."""
    if args.model_path is not None:
        raise ConfigError("--run_folder and --model_path both name weights: give one of them.")
    for name in ("architecture", "variant", "checkpoint_format"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} is what --run_folder {args.run_folder} says itself: drop it.")
    file = Path(args.run_folder) / "run.json"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: {args.run_folder} is not the --output_path of a training run.")
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        args.architecture, args.variant = known["architecture"], known["variant"]
        own = file.with_name("tokenizer.model")  # where it is now: a run's folder may have moved
        moved = not Path(known["tokenizer"]).exists() and own.is_file()
        args.tokenizer = args.tokenizer or (str(own) if moved else known["tokenizer"])
        return dict(known["overrides"])
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file} is not what a training run wrote ({error!r}): write it anew.") from None


def generate_with(args: argparse.Namespace, layout: ParallelLayout, overrides: dict[str, Any]) -> int:
    """Everything that needs torch."""
    from fms_parallel.distributed.start import process_group
    from fms_parallel.inference import generate_text
    from fms_parallel.inference.weights import prepare_for_decode
    from fms_parallel.models import get_config, get_model
    from fms_parallel.tokenizers import check_vocab, get_tokenizer

    tokenizer = get_tokenizer(args.tokenizer or "char")
    config = get_config(args.architecture, args.variant, args.model_path, **overrides)
    check_vocab(tokenizer, config.vocab_size)
    layout.validate(config.shape())
    checkpoint = None if args.run_folder is None else newest_checkpoint(Path(args.run_folder))
    words: dict[str, Any] = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    with process_group(args.device_type, args.timeout) as launch:
        model = get_model(
            args.architecture,
            args.variant,
            args.model_path,
            args.checkpoint_format,
            args.device_type,
            distributed_strategy=layout,
            fill=checkpoint,
            linear_type=args.linear_type,
            **overrides,
        )
        words |= {"seed": args.seed, "use_cache": args.use_cache}
        with (
            prepare_for_decode(model, len(args.prompt), args.fast_weights == "compiled")
            if args.fast_weights
            else nullcontext()
        ):
            texts = generate_text(model, tokenizer, args.prompt, **words)
        if launch.rank == 0:
            for prompt, text in zip(args.prompt, texts, strict=True):
                print(json.dumps({"prompt": prompt, "text": text}) if args.json else f"{prompt}{text}\n", flush=True)
    return 0


def newest_checkpoint(folder: Path) -> Callable[[nn.Module], None]:
    """What fills a model with the weights of a run's newest whole checkpoint."""
    from fms_parallel.checkpoint.training_state import latest_training_state, load_model_state

    found = latest_training_state(folder / "checkpoints")
    if found is None:
        raise CheckpointError(f"{folder}/checkpoints holds no whole checkpoint: let the run write one first.")
    return lambda model: load_model_state(found, model)


if __name__ == "__main__":
    run(main)
