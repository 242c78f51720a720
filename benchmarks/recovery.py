"""How long a killed rank stops a job: --elastic, against starting the job again from the last checkpoint.

    python benchmarks/recovery.py                  four ranks, dp=2,fsdp=2, each way three times; about three minutes

A rank of a running job is killed (SIGKILL); measured is the time from then to the next line of metrics.jsonl, so to
the end of the next step. The other job saves a checkpoint after every step, so that it too loses none, and is started
again as soon as torchrun has ended.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ("width=64", "layers=4", "heads=4", "kv_heads=4", "ffn_width=128")
RUN = ("--seq_len", "32", "--batch_size", "12", "--steps", "100000", "--report_steps", "100000")
WAYS = {
    "--elastic": ("--elastic",),
    "torchrun again, --resume auto": ("--checkpoint_steps", "1", "--resume", "auto"),
}
LIMIT = 120.0


def processes() -> dict[int, int]:
    """Process -> its parent."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    return found


def below(root: int) -> Iterator[int]:
    """All descendants."""
    parents = processes()
    waiting = [root]
    while waiting:
        parent = waiting.pop()
        children = [one for one, other in parents.items() if other == parent]
        yield from children
        waiting += children


def busiest(root: int) -> int:
    """The descendant without children that has worked most: a rank that trains."""

    def worked(process: int) -> int:
        try:
            return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[11])
        except OSError:
            return 0

    found = set(below(root))
    parents = {parent for process, parent in processes().items() if process in found}
    return max(found - parents, key=worked)


def last_step(path: Path) -> int:
    """Of the newest whole line."""
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:
            continue
    return 0


def wait_for_step(path: Path, step: int) -> float:
    """Seconds until metrics.jsonl has a later step."""
    start = time.perf_counter()
    while last_step(path) <= step:
        if time.perf_counter() - start > LIMIT:
            raise SystemExit(f"no step after {step} within {LIMIT:.0f} s")
        time.sleep(0.01)
    return time.perf_counter() - start


def measure(flags: tuple[str, ...], text: Path) -> float:
    """One job, one kill."""
    with tempfile.TemporaryDirectory(prefix="fms_parallel_recovery", dir="/dev/shm") as folder:
        command = ["torchrun", "--nproc_per_node=4", "--monitor-interval=0.1"]
        command += ["scripts/train_causal.py", *RUN, "--dataset_path", str(text), "--distributed", "dp=2,fsdp=2"]
        command += [word for field in MODEL for word in ("--override", field)]
        command += ["--output_path", f"{folder}/run", *flags]
        job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            metrics = Path(folder) / "run" / "metrics.jsonl"
            wait_for_step(metrics, 20)
            rank = busiest(job.pid)
            os.kill(rank, signal.SIGKILL)
            killed = time.perf_counter()
            if "--elastic" not in flags:
                job.wait(LIMIT)
                job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_for_step(metrics, last_step(metrics) + 1)  # one step may have been on its way
            return time.perf_counter() - killed
        finally:
            for process in [*below(job.pid), job.pid]:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            job.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("what a rank has learned is not lost. " * 4000)
        for _ in range(args.repeats):
            for way, flags in WAYS.items():
                found[way].append(measure(flags, text))
    for way, seconds in found.items():
        print(f"{way:32} {statistics.median(seconds):6.2f} s   ({', '.join(f'{s:.2f}' for s in seconds)})")
    quick, slow = (statistics.median(seconds) for seconds in found.values())
    print(f"ratio {slow / quick:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
