"""The main job, end to end, on two ranks of this machine: train, look, reload in other layouts, generate.

    make demo

It runs the commands that a person would type, shows each before it runs, and fails when one fails or when two layouts
generate different tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from fms_parallel.cli import run
from fms_parallel.errors import TrainingError

SCRIPTS = Path(__file__).resolve().parent
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

TRAIN = """
    --architecture llama --variant micro --distributed tp=2,sp
    --tokenizer sentencepiece:1024 --dataset_style stdlib --dataset_option max_bytes=3000000
    --seq_len 128 --batch_size 16 --lr 2e-3
    --report_steps 20 --validate_steps 100 --sample_steps 100 --checkpoint_steps 100
"""
PROMPTS = ("def __init__(self", "import ", "    for ")


def main() -> int:
    """Train, then generate from the checkpoint in one process and over two ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", default="runs/demo", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of training (default: %(default)s)")
    args = parser.parse_args()
    start = time.monotonic()
    folder = Path(args.output_path)
    if folder.exists():
        folder = next(new for n in range(2, 1000) if not (new := folder.with_name(f"{folder.name}-{n}")).exists())
    words = [*TRAIN.split(), "--steps", str(args.steps), "--warmup_steps", str(min(20, args.steps))]
    words += ["--output_path", str(folder)]
    show("train over two ranks, tensor + sequence parallel", [*RANKS, str(SCRIPTS / "train_causal.py"), *words])
    ask = ["--run_folder", str(folder), "--max_new_tokens", "48", "--temperature", "0.7", "--seed", "1", "--json"]
    ask += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    inference = str(SCRIPTS / "inference.py")
    alone = lines(show("the same checkpoint in one process", [sys.executable, inference, *ask], quiet=True))
    over_two = [*RANKS, inference, "--distributed", "tp=2", *ask]
    together = lines(show("the same checkpoint over two ranks", over_two, quiet=True))
    if alone != together:
        raise TrainingError("one process and two ranks generated different tokens.")
    for answer in alone:
        print(f"---- {answer['prompt']!r} continued, the same tokens from both layouts:")
        print(answer["prompt"] + answer["text"])
    print(f"---- metrics, loss curve, samples and checkpoints: {folder}  ({time.monotonic() - start:.0f} s)")
    return 0


def show(what: str, command: list[str], quiet: bool = False) -> str:
    """Say what comes, run it, and return its output."""
    print(f"==== {what}\n     {' '.join(command)}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE if quiet else None, text=True, check=False)
    if result.returncode:
        raise TrainingError(f"this step ended with exit code {result.returncode}; its message is above.")
    return result.stdout or ""


def lines(output: str) -> list[dict[str, str]]:
    """The JSON objects of `inference.py --json`."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    run(main)
