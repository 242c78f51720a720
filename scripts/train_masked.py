"""Train an encoder over any layout: on hidden tokens, or to classify texts.

    python scripts/train_masked.py --steps 100                                                   hidden tokens
    torchrun --nproc_per_node=2 scripts/train_masked.py --distributed tp=2,sp --export_path runs/model
    torchrun --nproc_per_node=4 scripts/train_masked.py --distributed pp=2,cp=2
    python scripts/train_masked.py --task classification --dataset_path reviews.jsonl \\
        --architecture hf_pretrained --model_path runs/model                                      fine-tune it

Classification reads JSON lines {"text": ..., "label": ...} or a .csv or .tsv file with such columns. A checkpoint of
another task gives its body, and the head is drawn anew. What is wrong with a command is said before a process group
starts, where it can be known there.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # started as a file: then scripts/ is on the path, and not the folder that holds it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fms_parallel.cli import assignments, run
from fms_parallel.errors import ConfigError
from fms_parallel.layout import ParallelLayout
from fms_parallel.training.options import TrainOptions
from scripts import automatic, common

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fms_parallel.data import RowDataset
    from fms_parallel.distributed.start import Launch
    from fms_parallel.tokenizers import Tokenizer

TASKS = {"masked": "roberta", "classification": "roberta_classification"}
"""--task -> the architecture that it trains."""

OF_OTHER_TASKS = {
    "masked": ("validation_path", "text_field", "label_field"),
    "classification": ("dataset_style", "dataset_option", "mask_id"),
}
"""--task -> flags without a meaning there."""


def build_parser() -> argparse.ArgumentParser:
    """Every flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="masked", choices=tuple(TASKS), help="(default: %(default)s)")
    common.add_model_flags(parser, None, "default: that of the task")
    data = common.add_data_flags(parser)
    data.add_argument("--mask_fraction", type=float, default=0.15, help="of tokens that are hidden and asked for")
    data.add_argument("--mask_id", type=int, help="token that hides others (default: the tokenizer's, or a new one)")
    data.add_argument("--text_field", help="classification: of the text (default: text)")
    data.add_argument("--label_field", help="classification: of the class (default: label)")
    data.add_argument("--validation_path", help="classification: held-out texts (default: --validation_fraction)")
    training = common.add_training_flags(parser)
    training.add_argument("--export_path", help="folder for the trained model in Hugging Face's form")
    return parser


def main() -> int:
    """Check the command, then train."""
    parser = build_parser()
    args = parser.parse_args()
    options, layout = common.read_options(args), common.read_layout(args)
    common.refuse_idle(parser, args, {"validation_fraction": "validate_steps"})
    if args.validation_path is not None and args.validation_fraction != parser.get_default("validation_fraction"):
        raise ConfigError("--validation_path and --validation_fraction both say what is held out: give one of them.")
    if options.sample_steps is not None:
        raise ConfigError("--sample_steps: an encoder writes no text; leave it out.")
    if args.task == "classification" and args.dataset_path is None:
        raise ConfigError("--task classification needs --dataset_path: a .jsonl, .csv or .tsv file.")
    for name in OF_OTHER_TASKS[args.task]:
        if getattr(args, name) not in (None, []):
            raise ConfigError(f"--{name} means nothing to --task {args.task}; leave it out.")
    args.text_field, args.label_field = args.text_field or "text", args.label_field or "label"
    return train_with(args, options, layout, assignments(args.override, "--override"))


@dataclass
class Plan:
    """What is trained on which rows.

    Attributes:
        overrides: of the config. fill: writes the weights where a new head is put on another task's body; overrides are
            the whole config then. labels: names of the classes.
    """

    training: RowDataset
    validation: RowDataset | None
    overrides: dict[str, Any]
    fill: Callable[[nn.Module], None] | None = None
    labels: tuple[str, ...] = ()


def train_with(
    args: argparse.Namespace, options: TrainOptions, asked: ParallelLayout | None, overrides: dict[str, Any]
) -> int:
    """Everything that needs torch."""
    import torch

    from fms_parallel.distributed.start import process_group
    from fms_parallel.log import log_to_stderr
    from fms_parallel.models import get_model, save_hf
    from fms_parallel.training import train

    args.architecture = args.architecture or TASKS[args.task]
    _, config = find(args, overrides)
    options, layout, planned = automatic.settle(args, options, asked, config)
    common.check_request(args, config, layout)
    torch.use_deterministic_algorithms(args.deterministic)
    with process_group(args.device_type, args.timeout) as launch:
        log_to_stderr(logging.INFO, launch.rank)
        automatic.agree(planned, layout, launch)
        plan = PLANS[args.task](args, options, launch, overrides)
        files = {"variant": args.variant, "model_path": args.model_path, "source": args.checkpoint_format}
        model = get_model(
            TASKS[args.task] if plan.fill else args.architecture,
            device_type=args.device_type,
            distributed_strategy=layout,
            seed=options.seed,
            compile_blocks=args.compile,
            fill=plan.fill,
            **({} if plan.fill else files),
            **plan.overrides,
        )
        progress = None
        if launch.rank == 0:
            common.write_run(args, options, layout, model, task=args.task, labels=plan.labels, **planned)
            progress = common.Progress(options, layout, model, args, launch)
        outcome = train(model, plan.training, validation=plan.validation, options=options, on_step=progress)
        right = None if plan.validation is None or outcome.interrupted else accuracy(model, plan.validation, options)
        if args.export_path is not None and not outcome.interrupted:
            save_hf(model, args.export_path)
        if launch.rank == 0:
            common.finish(options, outcome)
            if right is not None:
                print(f"held out: {right:.1%} of {'tokens' if args.task == 'masked' else 'texts'} right")
    return outcome.interrupted.exit_code if outcome.interrupted else 0


def find(args: argparse.Namespace, overrides: dict[str, Any]) -> tuple[str, Any]:
    """Name and config of the model that --architecture means.

    Raises:
        ConfigError: it is of another task, and there is no checkpoint whose body could be used.
    """
    from fms_parallel.models.build import find_model

    words = (args.architecture, args.variant, args.model_path)
    known, config = find_model(*words, {})
    wanted = TASKS[args.task]
    if known.name == wanted:
        return known.name, find_model(*words, overrides)[1]
    if known.name not in TASKS.values() or args.model_path is None:
        raise ConfigError(f"--task {args.task} trains {wanted}, not {known.name}: name that architecture.")
    if args.task == "masked":
        raise ConfigError(f"--model_path is a {known.name}, which has no head for hidden tokens: start from another.")
    return known.name, config  # its body; overrides are of the new model


def check_tokenizer(tokenizer: Tokenizer, config: Any) -> None:
    """Raise ConfigError or DataError when the model does not fit the tokenizer's ids."""
    from fms_parallel.tokenizers import check_vocab

    check_vocab(tokenizer, config.vocab_size)
    if tokenizer.pad_id is not None and config.padding_id != tokenizer.pad_id:
        raise ConfigError(
            f"the model pads with id {config.padding_id}, the tokenizer with {tokenizer.pad_id}: use the model's own."
        )


def fit_tokenizer(overrides: dict[str, Any], tokenizer: Tokenizer, more: int = 0) -> dict[str, Any]:
    """A model whose weights are drawn takes the tokenizer's vocabulary, and `more` ids, and its padding."""
    fitted: dict[str, Any] = {"vocab_size": tokenizer.vocab_size + more}
    if tokenizer.pad_id is not None:
        fitted["padding_id"] = tokenizer.pad_id
    elif "padding_id" not in overrides:
        raise ConfigError("the tokenizer has no padding token: name one that no text uses, --override padding_id=N.")
    return fitted | overrides


# ---- hidden tokens ----------------------------------------------------------------------------------------------


def plan_masked(args: argparse.Namespace, options: TrainOptions, launch: Launch, overrides: dict[str, Any]) -> Plan:
    """Rows of packed text, hidden anew in every step."""
    from fms_parallel.data.masked import MaskedRows, Masking

    tokenizer, rows = common.read_corpus_rows(args, options, launch)
    mask_id = tokenizer.mask_id if args.mask_id is None else args.mask_id
    if args.model_path is None:
        overrides = fit_tokenizer(overrides, tokenizer, more=int(mask_id is None))
        mask_id = tokenizer.vocab_size if mask_id is None else mask_id
    if mask_id is None:
        raise ConfigError("the tokenizer names no token that hides others: give --mask_id.")
    _, config = find(args, overrides)
    check_tokenizer(tokenizer, config)
    special = {*tokenizer.special_ids, config.padding_id} - {None}
    masking = Masking(mask_id, config.vocab_size, special, args.mask_fraction)
    training, validation = common.held_out(args, options, rows)
    return Plan(
        MaskedRows(training, masking, options.seed),
        None if validation is None else MaskedRows(validation, masking, options.seed),
        overrides,
    )


# ---- classification ---------------------------------------------------------------------------------------------


def plan_classification(
    args: argparse.Namespace, options: TrainOptions, launch: Launch, overrides: dict[str, Any]
) -> Plan:
    """One text per row; as many classes as the file has labels."""
    from fms_parallel.data.labelled import labelled_rows
    from fms_parallel.distributed.start import first_rank_first
    from fms_parallel.models.new_head import with_new_head

    with first_rank_first(launch):
        tokenizer = common.make_tokenizer(args, options, lambda: texts_of(args))
    if args.model_path is None:
        overrides = fit_tokenizer(overrides, tokenizer)
    name, config = find(args, overrides)
    check_tokenizer(tokenizer, config)
    if config.padding_id is None:
        raise ConfigError("texts of unequal length need a token that pads them: --override padding_id=N.")
    words: dict[str, Any] = {"seq_len": args.seq_len, "text": args.text_field, "label": args.label_field}
    words["padding_id"] = config.padding_id
    rows = labelled_rows(tokenizer, args.dataset_path, **words)
    has_head = name == TASKS[args.task] and args.model_path is not None
    if has_head and len(rows.names) > config.classes:
        raise ConfigError(f"{args.dataset_path} has {len(rows.names)} labels, the checkpoint {config.classes} classes.")
    fill = None
    if not has_head:
        overrides = {"classes": max(len(rows.names), 2)} | overrides
    if name != TASKS[args.task]:
        overrides, fill = with_new_head(
            TASKS[args.task], args.model_path, seed=options.seed, source=args.checkpoint_format, **overrides
        )
    training, validation = common.held_out(args, options, rows)
    if args.validation_path is not None:
        training, validation = rows, labelled_rows(tokenizer, args.validation_path, names=rows.names, **words)
    return Plan(training, validation, overrides, fill, rows.names)


def texts_of(args: argparse.Namespace) -> list[str]:
    """The texts of a classification file, for a tokenizer to learn from."""
    from fms_parallel.data.labelled import read_labelled

    return [text for text, _, _ in read_labelled(args.dataset_path, args.text_field, args.label_field)]


PLANS = {"masked": plan_masked, "classification": plan_classification}


# ---- how good ---------------------------------------------------------------------------------------------------


def accuracy(model: nn.Module, data: RowDataset, options: TrainOptions) -> float:
    """Share of the held-out labels that the model finds likeliest. Collective over all ranks."""
    from fms_parallel.distributed.boxes import local_tensor
    from fms_parallel.training import evaluate

    device = local_tensor(next(model.parameters())).device
    return evaluate(model, data, batch_size=options.batch_size, device=device, judge=count_right)


def count_right(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are the likeliest."""
    return (logits.argmax(-1) == labels).sum()


if __name__ == "__main__":
    run(main)
