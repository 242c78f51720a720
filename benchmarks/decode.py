"""What a new token costs: this library beside transformers (and ibm-fms where it is installed), the same weights.

    python benchmarks/decode.py                                        both sizes, every dtype, batch 1 and 8; long
    python benchmarks/decode.py --size 110m --dtype fp32 --rows 1 --new-tokens 32
    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode.py --threads 2    on cores that others use as well
    python benchmarks/decode.py --device cuda --compiled --rows 1      a GPU: 1.2 billion weights in bf16
    python benchmarks/decode.py --json

Contestants live in one process and generate in turn (A B A B ...), greedily, with the same prompts, so whatever
disturbs the machine disturbs all of them. A prompt's time ends, and a token's begins, where the next forward starts.
Ratios are medians over rounds of neighbours' medians: of CPU seconds with one thread (wall time depends on who else
uses the cores), of wall time with several, whose waiting costs CPU too, and on a GPU, whose kernels are waited for at
every stamp. `best` compares the least disturbed tenth of each contestant's tokens.

GB/s counts what a token must read: every matrix once, and the keys and values of the mean context. The roofline is the
fastest of several readings of memory in this run, with as many threads, or by the same GPU. Tokens must agree in fp32,
or the benchmark fails: nobody is faster by computing something else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.cli import run
from fms_parallel.errors import ConfigError

Tokens = list[list[int]]


@dataclass(frozen=True)
class Contestant:
    """Something that generates.

    Attributes:
        model: whose forward is called once for each token.
        generate: (prompts [B, S], new tokens) -> the new tokens of each row.
    """

    model: nn.Module
    generate: Callable[[Tensor, int], Tokens]


@dataclass(frozen=True)
class Size:
    """A LLaMA with a tied head, how long its sequences get, and the dtype of the file that all read."""

    width: int
    layers: int
    heads: int
    ffn_width: int
    vocab_size: int = 32000
    max_positions: int = 1024
    kv_heads: int | None = None
    saved: torch.dtype = torch.float32

    @property
    def kv_width(self) -> int:
        """Numbers of a token's keys in one layer."""
        return self.width // self.heads * (self.kv_heads or self.heads)

    @property
    def matrices(self) -> int:
        """Weights that a token reads: those of the layers, and the head."""
        layer = 2 * self.width**2 + 2 * self.width * self.kv_width + 3 * self.width * self.ffn_width
        return self.layers * layer + self.vocab_size * self.width

    def bytes_read(self, weight_bytes: int, rows: int, context: float, cache_bytes: int) -> float:
        """Of one step of `rows` sequences with so many earlier tokens each."""
        return self.matrices * weight_bytes + rows * context * 2 * self.layers * self.kv_width * cache_bytes


SIZES = {
    "15m": Size(288, 6, 6, 768),
    "110m": Size(768, 12, 12, 2048),
    "1b": Size(2048, 16, 32, 8192, vocab_size=128256, kv_heads=8, saved=torch.bfloat16),  # LLaMA 3.2's shape
}

DTYPES = {"fp32": (torch.float32, 4), "bf16": (torch.bfloat16, 2), "int8": (torch.bfloat16, 1)}
"""Word -> dtype of activations and of the peers' weights, and bytes of our weights."""

PEERS = ("transformers", "ibm-fms")

DEFAULTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "cpu": {"size": ("15m", "110m"), "dtype": tuple(DTYPES), "threads": (1, 2)},
    "cuda": {"size": ("1b",), "dtype": ("bf16",), "threads": (1,)},
}
"""Of a device, what is measured unless flags say otherwise."""


# ---- contestants ------------------------------------------------------------------------------------------------


def ours(size: Size, folder: str, dtype: str, rows: int, device: torch.device, compiled: bool = False) -> Contestant:
    """This library, its weights laid out for so many rows."""
    from fms_parallel.inference import generate
    from fms_parallel.inference.weights import prepare_for_decode
    from fms_parallel.models import get_model

    options = {"data_type": DTYPES[dtype][0], "linear_type": "int8" if dtype == "int8" else None}
    model = get_model("hf_pretrained", None, folder, "hf", device.type, **options)  # type: ignore[arg-type]
    prepare_for_decode(model, rows, compiled)
    return Contestant(model, lambda prompts, new: generate(model, prompts, max_new_tokens=new))


def transformers(size: Size, folder: str, dtype: str, rows: int, device: torch.device) -> Contestant:
    """`LlamaForCausalLM.generate` as it comes: dynamic cache, torch's fused attention."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype][0]).eval()
    model.to(device)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    def generate(prompts: Tensor, new: int) -> Tokens:
        prompts = prompts.to(device)
        mask = torch.ones_like(prompts)
        out = model.generate(prompts, attention_mask=mask, max_new_tokens=new, do_sample=False)
        return out[:, prompts.shape[1] :].tolist()  # type: ignore[no-any-return]

    return Contestant(model, generate)


def ibm_fms(size: Size, folder: str, dtype: str, rows: int, device: torch.device) -> Contestant:
    """ibm-fms with its contiguous cache and weights of its own: its time is compared, not its tokens."""
    from fms.models.llama import LLaMA, LLaMAConfig  # type: ignore[import-not-found]
    from fms.utils.generation import generate as fms_generate  # type: ignore[import-not-found]

    config = LLaMAConfig(
        src_vocab_size=size.vocab_size,
        emb_dim=size.width,
        nheads=size.heads,
        kvheads=size.kv_heads or 0,
        nlayers=size.layers,
        hidden_grow_factor=size.ffn_width / size.width,
        multiple_of=1,
        max_expected_seq_len=size.max_positions,
        tie_heads=True,
    )
    model: nn.Module = LLaMA(config).to(device, DTYPES[dtype][0]).eval()
    model.reset_parameters()  # type: ignore[operator]
    options = {"do_sample": False, "use_cache": True, "contiguous_cache": True, "max_seq_len": size.max_positions}

    def generate(prompts: Tensor, new: int) -> Tokens:
        with torch.no_grad():
            out = fms_generate(model, prompts.to(device), max_new_tokens=new, **options)
        return out.view(prompts.shape[0], -1)[:, prompts.shape[1] :].tolist()  # type: ignore[no-any-return]

    return Contestant(model, generate)


CONTESTANTS: dict[str, Callable[..., Contestant]] = {"ours": ours, "transformers": transformers, "ibm-fms": ibm_fms}


def config_for(size: Size) -> Any:
    """Its config, as transformers has it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        intermediate_size=size.ffn_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads or size.heads,
        max_position_embeddings=size.max_positions,
        tie_word_embeddings=True,
    )


@contextmanager
def weights_for(size: Size) -> Iterator[str]:
    """A folder with the same drawn weights for everybody."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model: Any = LlamaForCausalLM(config_for(size))
        model.to(size.saved).save_pretrained(folder)
        yield folder


# ---- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """Seconds of one prompt with its first token, and of each further token (of every row)."""

    prompt: float
    tokens: list[float]


def pick_device(name: str) -> torch.device:
    """The device. Raises ConfigError where there is none of that kind."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch build or machine has no CUDA device; use --device cpu.")
    return torch.device(name)


def clock_of(device: torch.device) -> Callable[[], float]:
    """CPU seconds with one thread, wall seconds with several; on a GPU wall seconds when all its work is done."""
    if device.type == "cuda":

        def now() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return now
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def one_round(contestant: Contestant, prompts: Tensor, new: int, clock: Callable[[], float]) -> Round:
    """Time one contestant once."""
    stamps: list[float] = [clock()]
    hook = contestant.model.register_forward_pre_hook(lambda *_: stamps.append(clock()))
    contestant.generate(prompts, new + 1)
    hook.remove()
    stamps.append(clock())
    start, _, *tokens = stamps
    return Round(tokens[0] - start, [end - begin for begin, end in pairwise(tokens)])


def read_bandwidth(device: torch.device, rounds: int = 15) -> float:
    """Bytes per second that memory can be read with."""
    return _of_gpu(device, rounds) if device.type == "cuda" else _of_cores(rounds)


def _of_gpu(device: torch.device, rounds: int, size: int = 2**31) -> float:
    """The faster of a sum, which reads, and a copy, which reads and writes; of more bytes than caches hold."""
    numbers = torch.ones(size // 4, device=device)
    other = torch.empty_like(numbers)
    ways: list[tuple[Callable[[], object], int]] = [(numbers.sum, 1), (lambda: other.copy_(numbers), 2)]
    return max(times * size / min(_on_gpu(way) for _ in range(rounds)) for way, times in ways)


def _on_gpu(call: Callable[[], object]) -> float:
    """Seconds between two events around it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def _of_cores(rounds: int) -> float:
    """Bytes per second that memory can be read with by as many threads as torch has: the fastest of four ways."""
    weights = torch.ones(768, 1 << 16)  # 192 MiB, more than caches hold
    row, other = torch.ones(1, 768), torch.ones(768, 1 << 16)
    ways: list[tuple[Callable[[], object], int]] = [
        (weights.sum, 1),
        (lambda: torch.equal(weights, other), 2),
        (lambda: row @ weights, 1),
        (lambda: torch.dot(weights.view(-1), other.view(-1)), 2),
    ]
    size = weights.numel() * 4
    return max(times * size / min(_wall(way) for _ in range(rounds)) for way, times in ways)


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    size: Size, folder: str, dtype: str, rows: int, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Every contestant of one case, in turn. One that cannot run gives its reason instead."""
    prompts = torch.randint(size.vocab_size, (rows, args.prompt), generator=torch.Generator().manual_seed(1))
    ready: dict[str, Contestant] = {}
    found: dict[str, Any] = {}
    for name in ("ours", *args.peer):
        try:
            own = {"compiled": args.compiled} if name == "ours" else {}
            ready[name] = CONTESTANTS[name](size, folder, dtype, rows, device, **own)
        except ImportError as error:
            found[name] = f"not installed ({error})"
    tokens = {name: contestant.generate(prompts, args.new_tokens) for name, contestant in ready.items()}
    rounds: dict[str, list[Round]] = {name: [] for name in ready}
    for _ in range(args.rounds):
        for name, contestant in ready.items():
            rounds[name].append(one_round(contestant, prompts, args.new_tokens, clock_of(device)))
    agreed = agreement(tokens, dtype)
    context = args.prompt + args.new_tokens / 2
    roofline = read_bandwidth(device)
    for name, timed in rounds.items():
        weight = DTYPES[dtype][1] if name == "ours" else DTYPES[dtype][0].itemsize
        needed = size.bytes_read(weight, rows, context, DTYPES[dtype][0].itemsize)
        found[name] = summary(timed, rounds["ours"], rows, needed, roofline)
    return {"roofline_GB_s": roofline / 1e9, "tokens_agree": agreed, "contestants": found}


def agreement(tokens: dict[str, list[list[int]]], dtype: str) -> float | None:
    """Share of our tokens that are also transformers', up to the first difference of each row.

    Raises:
        ConfigError: not all of them, in fp32.
    """
    if "transformers" not in tokens:
        return None
    alike = total = 0
    for mine, theirs in zip(tokens["ours"], tokens["transformers"], strict=True):
        first = next((i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), len(mine))
        alike, total = alike + first, total + len(mine)
    if dtype == "fp32" and alike < total:
        raise ConfigError(f"ours and transformers agree on {alike} of {total} tokens only.")
    return alike / total


def summary(timed: list[Round], own: list[Round], rows: int, needed: float, roofline: float) -> dict[str, float]:
    """Figures of one contestant; `own` are our rounds that ran beside its."""
    median = statistics.median
    seconds, least = median(token for r in timed for token in r.tokens), least_disturbed(timed)
    return {
        "token_ms": 1e3 * seconds,
        "best_token_ms": 1e3 * least,
        "tokens_per_s": rows / seconds,
        "GB_per_s": needed / seconds / 1e9,
        "best_GB_per_s": needed / least / 1e9,
        "of_roofline": needed / least / roofline,
        "prompt_ms": 1e3 * median(r.prompt for r in timed),
        "token_ratio": median(median(a.tokens) / median(b.tokens) for a, b in zip(timed, own, strict=True)),
        "best_ratio": least / least_disturbed(own),
        "prompt_ratio": min(r.prompt for r in timed) / min(r.prompt for r in own),
    }


def least_disturbed(rounds: list[Round]) -> float:
    """Seconds of a token: the first decile over all rounds."""
    tokens = sorted(token for r in rounds for token in r.tokens)
    return tokens[len(tokens) // 10]


# ---- the table --------------------------------------------------------------------------------------------------


def print_case(title: str, case: dict[str, Any]) -> None:
    """A few lines; ratios say how many times as long as ours a contestant takes."""
    agreed = case["tokens_agree"]
    alike = "" if agreed is None else f", {agreed:.0%} of tokens as transformers"
    print(f"{title}: memory read at {case['roofline_GB_s']:.1f} GB/s{alike}")
    print(
        "                  tokens/s  ms/token (best)    best GB/s  of roofline  prompt ms   x ours: token  best prompt"
    )
    for name, found in case["contestants"].items():
        if isinstance(found, str):
            print(f"  {name:<14}  did not run: {found}")
            continue
        print(
            f"  {name:<14}{found['tokens_per_s']:10.1f}{found['token_ms']:10.2f} ({found['best_token_ms']:6.2f})"
            f"{found['best_GB_per_s']:11.1f}{found['of_roofline']:12.0%}{found['prompt_ms']:12.1f}"
            f"{found['token_ratio']:15.2f}{found['best_ratio']:6.2f}{found['prompt_ratio']:7.2f}",
            flush=True,
        )


def build_parser() -> argparse.ArgumentParser:
    """Every flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=tuple(DEFAULTS), help="(default: %(default)s)")
    parser.add_argument("--size", action="append", choices=tuple(SIZES), help="(default: 15m, 110m; of a GPU 1b)")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="(default: all; of a GPU bf16)")
    parser.add_argument("--rows", action="append", type=int, help="sequences at a time (default: 1 and 8)")
    parser.add_argument("--threads", action="append", type=int, help="(default: 1 and 2; of a GPU 1)")
    parser.add_argument("--peer", action="append", choices=PEERS, help="beside whom (default: all)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--compiled", action="store_true", help="ours: kernels compiled for the shapes as well")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main() -> int:
    """Measure and print."""
    args = build_parser().parse_args()
    args.peer = args.peer or list(PEERS)
    device, default = pick_device(args.device), DEFAULTS[args.device]
    table = []
    for name in args.size or default["size"]:
        with weights_for(SIZES[name]) as folder:
            for threads in args.threads or default["threads"]:
                torch.set_num_threads(threads)
                for dtype in args.dtype or default["dtype"]:
                    for rows in args.rows or (1, 8):
                        case = measure(SIZES[name], folder, dtype, rows, args, device)
                        words = {"device": device.type, "size": name, "dtype": dtype, "rows": rows, "threads": threads}
                        table.append({**words, **case})
                        if not args.json:
                            where = f"{threads} threads" if device.type == "cpu" else torch.cuda.get_device_name()
                            print_case(f"{name}, {dtype}, {rows} rows, {where}", case)
    if args.json:
        print(json.dumps({"sizes": {k: asdict(v) for k, v in SIZES.items()}, "cases": table}, default=str))
    return 0


if __name__ == "__main__":
    run(main)
