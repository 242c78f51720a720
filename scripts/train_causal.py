"""Train a causal language model over any layout.

    python scripts/train_causal.py --steps 100                                            one process
    torchrun --nproc_per_node=2 scripts/train_causal.py --distributed tp=2,sp --steps 100
    torchrun --nproc_per_node=8 scripts/train_causal.py --distributed fsdp=4,tp=2,sp --default_dtype bf16 ...

What is wrong with a command is said before torch is imported or a process group starts, where it can be known there.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # started as a file: then scripts/ is on the path, and not the folder that holds it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fms_parallel.cli import assignments, run
from fms_parallel.errors import ConfigError
from fms_parallel.layout import ParallelLayout
from fms_parallel.training.options import TrainOptions
from scripts import automatic, changing, common

if TYPE_CHECKING:
    from fms_parallel.tokenizers import Tokenizer


IDLE_WITHOUT = {
    "validation_fraction": "validate_steps",
    "sample_prompt": "sample_steps",
    "sample_tokens": "sample_steps",
    "silence": "elastic",
    "buddy_every": "elastic",
    "replacements": "elastic",
    "policy": "dynamic",
}
"""Flag -> the one without which it does nothing."""


def build_parser() -> argparse.ArgumentParser:
    """Every flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_flags(parser, "llama", "default: llama")
    common.add_data_flags(parser)
    training = common.add_training_flags(parser)
    training.add_argument("--sample_prompt", default="def ", help="what the sample continues (default: %(default)r)")
    training.add_argument("--sample_tokens", type=int, default=48, help="length of the sample (default: %(default)s)")
    changing.add_flags(parser)
    return parser


def main() -> int:
    """Check the command, then train."""
    parser = build_parser()
    args = parser.parse_args()
    options, layout = common.read_options(args), common.read_layout(args)
    common.refuse_idle(parser, args, IDLE_WITHOUT)
    if args.sample_tokens < 1:
        raise ConfigError(f"--sample_tokens {args.sample_tokens}: a sample has at least one token.")
    changing.check(args)
    return train_with(args, options, layout, assignments(args.override, "--override"))


def train_with(
    args: argparse.Namespace, options: TrainOptions, asked: ParallelLayout | None, overrides: dict[str, Any]
) -> int:
    """Everything that needs torch."""
    import torch

    from fms_parallel.distributed.start import process_group
    from fms_parallel.log import log_to_stderr
    from fms_parallel.models import get_config, get_model
    from fms_parallel.training import train

    config = get_config(args.architecture, args.variant, args.model_path, **overrides)
    options, layout, planned = automatic.settle(args, options, asked, config)
    common.check_request(args, config, layout)
    torch.use_deterministic_algorithms(args.deterministic)
    if args.elastic:
        return changing.run_elastic(args, options, layout, overrides)
    layouts = changing.read_schedule(args, config, layout)
    changing.check_phases(args, layout, layouts)
    with process_group(args.device_type, args.timeout) as launch:
        log_to_stderr(logging.INFO, launch.rank)
        automatic.agree(planned, layout, launch)
        tokenizer, rows = common.read_corpus_rows(args, options, launch)
        training, validation = common.held_out(args, options, rows)
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
            common.write_run(args, options, layout, model, **planned)
            progress = common.Progress(options, layout, model, args, launch)
        switches = changing.switches(args, layouts, changing.model_factory(args, options, overrides), launch)
        outcome = train(
            model,
            training,
            validation=validation,
            options=options,
            on_step=changing.hearers(switches, progress),
            sample=sampler(tokenizer, args, config.max_positions) if options.sample_steps else None,
            between_steps=switches,
            phases=args.phases,
        )
        changing.finish(switches, options, launch)
        if launch.rank == 0:
            common.finish(options, outcome)
    return outcome.interrupted.exit_code if outcome.interrupted else 0


def fit_vocabulary(args: argparse.Namespace, overrides: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A model that starts from drawn weights takes the tokenizer's vocabulary; one from a checkpoint must fit it."""
    from fms_parallel.models import get_config
    from fms_parallel.tokenizers import check_vocab

    if args.model_path is None and "vocab_size" not in overrides:
        overrides = {**overrides, "vocab_size": tokenizer.vocab_size}
    config = get_config(args.architecture, args.variant, args.model_path, **overrides)
    check_vocab(tokenizer, config.vocab_size)
    return overrides


def sampler(tokenizer: Tokenizer, args: argparse.Namespace, positions: int) -> Any:
    """Text that the model makes now, greedily.

    Raises:
        ConfigError: now, not at the first sample, when prompt and sample do not fit into so many positions.
    """
    from fms_parallel.inference import generate_text

    prompt = len(tokenizer.encode(args.sample_prompt, bos=tokenizer.bos_id is not None))
    if prompt + args.sample_tokens > positions:
        raise ConfigError(
            f"--sample_tokens {args.sample_tokens} after a prompt of {prompt} tokens is beyond the model's "
            f"max_positions={positions}: ask for at most {positions - prompt}."
        )

    def sample(model: Any) -> str:
        text = generate_text(model, tokenizer, args.sample_prompt, max_new_tokens=args.sample_tokens)
        return str(args.sample_prompt) + text[0]

    return sample


if __name__ == "__main__":
    run(main)
