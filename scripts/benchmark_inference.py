"""What generation costs with each kind of cache, and what a cache that is kept between requests saves.

    python scripts/benchmark_inference.py --variant micro --seq_len 128 --batch_size 2 --max_new_tokens 32
    torchrun --nproc_per_node=2 scripts/benchmark_inference.py --distributed tp=2 --num_requests 10
    python scripts/benchmark_inference.py --num_requests 10 --use-kv-manager --skip_single_token_runs --skip_e2e_runs

Three parts, each of which may be skipped: one token behind a cached prompt; whole sequences, end to end; and the same
request several times in batch mode (the cache is freed after each) and in serving mode (it is kept). Tokens of all
caches must agree. Times are wall times of this machine as it is; memory is what the engine holds (weights and cache),
and what the process has (CUDA: what torch has reserved).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fms_parallel.cli import add_fast_weights, assignments, run
from fms_parallel.errors import ConfigError, FmsError
from fms_parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from torch import nn

    from fms_parallel.inference import InferenceEngine

REPEAT = 3
MIB = 2**20
CACHES = {"internal": "kvcache", "manager": "kvcache", "paged": "paged_kvcache", "none": "nokvcache"}
"""Cache of the engine -> what skips it."""


def build_parser() -> argparse.ArgumentParser:
    """Every flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--architecture", default="llama", help="(default: %(default)s)")
    model.add_argument("--variant", help="(default: the architecture's first)")
    model.add_argument("--model_path", help="weights; without it they are drawn")
    model.add_argument("--override", action="append", default=[], metavar="FIELD=VALUE", help="replace a config field")
    model.add_argument("--tokenizer", help="checked against the model's vocabulary; prompts are drawn tokens")
    model.add_argument("--device_type", default="cpu", choices=("cpu", "cuda"))
    model.add_argument("--default_dtype", choices=("fp32", "bf16", "fp16", "fp64"), help="of the parameters")
    model.add_argument("--distributed", help='the layout, such as "tp=2"; without it one process')
    add_fast_weights(model)
    model.add_argument("--timeout", type=float, default=600.0, help="seconds until a silent rank is given up")
    work = parser.add_argument_group("work")
    work.add_argument("--seq_len", type=int, default=512, help="tokens of a prompt (default: %(default)s)")
    work.add_argument("--batch_size", type=int, default=2, help="prompts at once (default: %(default)s)")
    work.add_argument("--max_new_tokens", type=int, default=256, help="(default: %(default)s)")
    work.add_argument("--compile_mode", choices=("default", "reduce-overhead"), help="also time the compiled model")
    work.add_argument("--skip_correctness_check", action="store_true", help="do not compare tokens of the caches")
    work.add_argument("--skip_eager_runs", action="store_true")
    work.add_argument("--skip_compile_runs", action="store_true")
    for name in sorted(set(CACHES.values())):
        work.add_argument(f"--skip_{name}_runs", action="store_true")
    work.add_argument("--skip_single_token_runs", action="store_true")
    work.add_argument("--skip_e2e_runs", action="store_true")
    requests = parser.add_argument_group("batch mode and serving mode")
    requests.add_argument("--num_requests", "--num-requests", type=int, default=0, help="of each mode (default: none)")
    requests.add_argument("--use_kv_cache", "--use-kv-cache", action="store_true", help="inside the model's attention")
    requests.add_argument("--use_kv_manager", "--use-kv-manager", action="store_true", help="a manager's (else: paged)")
    requests.add_argument("--serving_mode", "--serving-mode", action="store_true", help="only serving mode")
    return parser


def main() -> int:
    """Check the command, build the model, measure."""
    args = build_parser().parse_args()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.distributed is None and world > 1:
        raise ConfigError(f"{world} ranks were started but --distributed says nothing: choose a layout, as tp={world}.")
    if args.compile_mode and args.skip_compile_runs:
        raise ConfigError("--compile_mode and --skip_compile_runs contradict each other: drop one of them.")
    for name in ("seq_len", "batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be >= 1.")
    if args.num_requests < 0:
        raise ConfigError(f"--num_requests {args.num_requests}: must be >= 0.")
    if args.use_kv_cache and args.use_kv_manager:
        raise ConfigError("--use_kv_cache and --use_kv_manager each name a cache: drop one of them.")
    layout = ParallelLayout.parse(args.distributed).resolve(world, int(os.environ.get("LOCAL_WORLD_SIZE", str(world))))
    return measure(args, layout)


def measure(args: argparse.Namespace, layout: ParallelLayout) -> int:
    """Everything that needs torch."""
    import torch

    from fms_parallel.distributed.start import process_group
    from fms_parallel.models import get_config, get_model
    from fms_parallel.tokenizers import check_vocab, get_tokenizer

    overrides = assignments(args.override, "--override")
    config = get_config(args.architecture, args.variant, args.model_path, **overrides)
    layout.validate(config.shape())
    if args.tokenizer is not None:
        check_vocab(get_tokenizer(args.tokenizer), config.vocab_size)
    with process_group(args.device_type, args.timeout) as launch:
        model = get_model(
            args.architecture,
            args.variant,
            args.model_path,
            device_type=args.device_type,
            data_type=args.default_dtype,
            distributed_strategy=layout,
            **overrides,
        )
        say: Callable[[str], None] = lambda text: print(text, flush=True) if launch.rank == 0 else None  # noqa: E731
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (args.batch_size, args.seq_len), generator=generator)
        if not args.skip_eager_runs:
            measure_caches(args, model, ids, say)
        if args.compile_mode:
            measure_compiled(args, model, ids, say)
        if args.num_requests:
            compare_modes(args, model, ids, say)
    return 0


# ---- caches -----------------------------------------------------------------------------------------------------


def measure_caches(args: argparse.Namespace, model: nn.Module, ids: Any, say: Callable[[str], None]) -> None:
    """One token behind a prompt, and whole sequences, with every cache."""
    say(f"batch size {args.batch_size}, sequence length {args.seq_len}, new tokens {args.max_new_tokens}")
    caches = [cache for cache, word in CACHES.items() if not getattr(args, f"skip_{word}_runs")]
    tokens: dict[str, Any] = {}
    if not args.skip_single_token_runs:
        say("\nSingle token generation")
        for cache in caches:
            with make_engine(args, model, cache=cache) as engine:
                report_time(f"cache={cache}", one_token_times(args, engine, ids), say)
    if not args.skip_e2e_runs:
        say("\nEnd-to-end sequence generation")
        for cache in caches:
            with make_engine(args, model, cache=cache, share_prefixes=False) as engine:
                times = []
                for _ in range(REPEAT):
                    seconds, tokens[cache] = timed(lambda: generated(args, engine, ids))
                    times.append(seconds / args.max_new_tokens)
                report_time(f"cache={cache}", times, say)
        if not args.skip_correctness_check and len({str(found) for found in tokens.values()}) > 1:
            raise FmsError("the caches gave different tokens: in half precision near-ties may, in fp64 none does.")


def make_engine(args: argparse.Namespace, model: nn.Module, **options: Any) -> InferenceEngine:
    """An engine that has room for the prompts and what follows."""
    from fms_parallel.inference import InferenceEngine

    longest = args.seq_len + args.max_new_tokens
    steps = max(512, args.batch_size + 1)
    options["fast_weights"] = args.fast_weights or False
    options = {"max_seq_len": longest, "max_batch_size": args.batch_size, "max_step_tokens": steps} | options
    return InferenceEngine(model, **options)


def one_token_times(args: argparse.Namespace, engine: InferenceEngine, ids: Any) -> list[float]:
    """Seconds of a decode step at the same position, over and over."""
    first = engine.prefill(ids).argmax(-1)
    times = []
    for _ in range(max(REPEAT, min(args.max_new_tokens, 32))):
        times.append(timed(lambda: engine.decode_step(first, args.seq_len))[0])
    return times


def generated(args: argparse.Namespace, engine: InferenceEngine, ids: Any) -> list[tuple[int, ...]]:
    """New tokens of all prompts."""
    return [one.tokens for one in engine.generate(ids, max_new_tokens=args.max_new_tokens)]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    start = time.perf_counter()
    found = work()  # tokens were read on the host: nothing is still under way
    return time.perf_counter() - start, found


def report_time(name: str, times: list[float], say: Callable[[str], None]) -> None:
    """One line."""
    say(f"  {name:18}{statistics.median(times) * 1000:10.2f} ms per token")


def measure_compiled(args: argparse.Namespace, model: nn.Module, ids: Any, say: Callable[[str], None]) -> None:
    """One token without a cache, compiled: a step of the engine has another shape each time and stays eager."""
    import torch

    compiled = torch.compile(model.eval(), mode=args.compile_mode)
    with torch.no_grad():
        wanted = model(ids, last=1).argmax(-1)
        found = compiled(ids, last=1).argmax(-1)
        if not args.skip_correctness_check and not torch.equal(found, wanted):
            raise FmsError("the compiled model gave another token: in half precision near-ties may, in fp64 none does.")
        say("\nCompiled, single token generation")
        report_time(
            "cache=none", [timed(lambda: compiled(ids, last=1).argmax(-1).tolist())[0] for _ in range(REPEAT)], say
        )


# ---- batch mode and serving mode ----------------------------------------------------------------------------------


def compare_modes(args: argparse.Namespace, model: nn.Module, ids: Any, say: Callable[[str], None]) -> None:
    """The same request several times, with a cache that is freed after each and with one that is kept."""
    found = {}
    for serving in (True,) if args.serving_mode else (False, True):
        found[serving] = one_mode(args, model, ids, serving, say)
    if len(found) == 2:
        batch, serving_rows = found[False][1], found[True][1]
        say(f"\n{'':24}{'batch':>12}{'serving':>12}")
        for name, column in (("cache after it (MB)", 0), ("time per request (s)", 1)):
            say(f"{name:24}{mean(batch, column):12.3f}{mean(serving_rows, column):12.3f}")
        say(f"{'  from the 2nd (s)':24}{mean(batch[1:], 1):12.3f}{mean(serving_rows[1:], 1):12.3f}")


def one_mode(
    args: argparse.Namespace, model: nn.Module, ids: Any, serving: bool, say: Callable[[str], None]
) -> tuple[float, list[tuple[float, float]]]:
    """Requests of one mode: memory before the first, then (MB of cache, seconds) of each."""
    name, after = ("SERVING", "cache kept") if serving else ("BATCH", "cache freed")
    words = {"use_kv_cache": args.use_kv_cache, "use_kv_manager": args.use_kv_manager}
    rows = []
    with make_engine(args, model, serving_mode=serving, share_prefixes=False, **words) as engine:
        base = held_mb(engine)
        say(f"\n[{name} MODE] {args.num_requests} requests\n")
        say(f"{'Request':>9}{'Alloc(MB)':>12}{'Reserv(MB)':>12}{'Delta(MB)':>12}{'Time(s)':>10}  Status")
        for number in range(args.num_requests):
            seconds, _ = timed(lambda: generated(args, engine, ids))
            held = held_mb(engine)
            rows.append((held - base, seconds))
            line = f"{number + 1:9}{held:12.1f}{reserved_mb(args.device_type):12.1f}{held - base:+12.1f}{seconds:10.3f}"
            say(f"{line}  {after}")
        engine.release_kv_cache()
        say(f"after release_kv_cache(): {held_mb(engine):.1f} MB; before the first request {base:.1f} MB")
    return base, rows


def held_mb(engine: InferenceEngine) -> float:
    """Weights and cache of this rank."""
    report = engine.memory_report()
    return (report.weights + report.cache) / MIB


def reserved_mb(device_type: str) -> float:
    """What the process has: of the device, or of the host."""
    if device_type == "cuda":
        import torch

        return torch.cuda.memory_reserved() / MIB
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def mean(rows: list[tuple[float, float]], column: int) -> float:
    """Of one column; NaN where there is nothing."""
    return statistics.fmean(row[column] for row in rows) if rows else float("nan")


if __name__ == "__main__":
    run(main)
