"""A step of an unmodified transformers model: `parallelize` beside OptimusPrime's pattern and `tp_plan="auto"`.

    python benchmarks/auto_step.py                      a tiny llama and a tiny gpt2, two ranks
    python benchmarks/auto_step.py --steps 30 --width 256

Contestants live in the same two ranks and take their steps in turn. A step is forward, backward, clipping and AdamW;
CPU seconds are summed over the ranks, medians over the steps. Losses of all contestants must agree.

    pp=2, gpipe and 1f1b     `parallelize`
    optimus pattern          written here after what OptimusPrime publishes: GPipe by hand, rank by rank; each tensor
                             crosses in five blocking messages (kind, dimensions, shape, dtype, values); each stage
                             clips its own gradients. Its tracer does not run on this torch, so the two stages are
                             transformers' own decoder with half of the layers each; nothing but hidden states crosses.
    tp=2                     `parallelize`
    tp_plan="auto"           transformers' from_pretrained, where the model has a plan
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if __package__ in (None, ""):  # started as a file: then benchmarks/ is on the path, and not the folder that holds it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fms_parallel.cli import run
from fms_parallel.distributed.launch import run_ranks

PIECES = 4
DTYPES = (torch.float32, torch.int64)
Step = Callable[[Tensor], float]
"""Token ids `[B, S]` -> the mean loss; includes the update."""


def config_of(family: str, width: int, layers: int) -> Any:
    """A small config whose head has weights of its own: OptimusPrime unties them, transformers' plan may not."""
    import transformers

    library: Any = transformers
    if family == "gpt2":
        made = library.GPT2Config(
            **{"n_embd": width, "n_layer": layers, "n_head": 4, "vocab_size": 1024, "n_positions": 256},
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False},
        )
        made.architectures = ["GPT2LMHeadModel"]
        return made
    made = library.LlamaConfig(
        **{"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 3 * width, "vocab_size": 1024, "tie_word_embeddings": False},
    )
    made.architectures = ["LlamaForCausalLM"]
    return made


def load(folder: str, **options: Any) -> nn.Module:
    """The model of a folder, in fp32, in training mode."""
    import transformers

    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.train()


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy of the next tokens."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# ---- contestants ------------------------------------------------------------------------------------------------


def ours(folder: str, layout: str, ids: Tensor) -> Step:
    """`parallelize` in a layout."""
    from fms_parallel.auto import parallelize

    engine = parallelize(folder, layout, {"input_ids": ids, "labels": ids})
    optimizer = torch.optim.AdamW(list(engine.parameters()), lr=1e-3)

    def step(ids: Tensor) -> float:
        loss = engine.train_step({"input_ids": ids, "labels": ids})
        engine.clip_grad_norm_(1e6)
        optimizer.step()
        return float(loss)

    return step


def theirs(folder: str) -> Step:
    """transformers' own tensor parallelism."""
    model = load(folder, tp_plan="auto")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)

    def step(ids: Tensor) -> float:
        optimizer.zero_grad()
        loss = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)
        loss.backward()
        # No clipping: clip_grad_norm_ does not take parameters of two meshes, and a global norm is not provided.
        optimizer.step()
        return float(loss)

    return step


class NoPositions(nn.Module):
    """GPT-2's table of positions in a stage that does not begin the model."""

    def forward(self, places: Tensor) -> Tensor:
        return torch.zeros(())


class Half(nn.Module):
    """Transformers' decoder with half of its layers; the first half embeds, the second ends in logits."""

    def __init__(self, model: Any, rank: int) -> None:
        super().__init__()
        body = model.base_model
        name = "h" if hasattr(body, "h") else "layers"
        every = getattr(body, name)
        half = len(every) // 2
        setattr(body, name, every[:half] if rank == 0 else every[half:])
        body.config.num_hidden_layers = half
        if rank == 0:
            setattr(body, "ln_f" if name == "h" else "norm", nn.Identity())
        else:
            setattr(body, "wte" if name == "h" else "embed_tokens", nn.Identity())
            if name == "h":
                body.wpe = NoPositions()
        self.body, self.head = body, (model.lm_head if rank else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        words = {"input_ids": x} if x.dtype == torch.int64 else {"inputs_embeds": x}
        out: Tensor = self.head(self.body(**words, use_cache=False).last_hidden_state)
        return out


def send(tensor: Tensor, peer: int) -> None:
    """Five blocking messages."""
    for number in ([0], [tensor.dim()], list(tensor.shape), [DTYPES.index(tensor.dtype)]):
        dist.send(torch.tensor(number), peer)
    dist.send(tensor.contiguous(), peer)


def receive(peer: int) -> Tensor:
    """What `send` sent."""
    kind, dimensions = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    dist.recv(kind, peer)
    dist.recv(dimensions, peer)
    shape, dtype = torch.zeros(int(dimensions), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    dist.recv(shape, peer)
    dist.recv(dtype, peer)
    tensor = torch.empty(shape.tolist(), dtype=DTYPES[int(dtype)])
    dist.recv(tensor, peer)
    return tensor


def optimus_pattern(folder: str) -> Step:
    """All forwards, then all backwards, each rank waiting for the other."""
    rank = dist.get_rank()
    stage = Half(load(folder), rank)
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=1e-3)

    def step(ids: Tensor) -> float:
        optimizer.zero_grad()
        entered, left, total = [], [], 0.0
        for piece in ids.chunk(PIECES):
            x = piece if rank == 0 else receive(0).requires_grad_()
            out = stage(x)
            if rank == 0:
                send(out.detach(), 1)
            else:
                out = next_token_loss(out, piece) / PIECES
                total += float(out.detach())
            entered.append(x)
            left.append(out)
        for x, out in zip(entered, left, strict=True):
            out.backward(receive(1) if rank == 0 else None)
            if rank == 1:
                assert x.grad is not None
                send(x.grad, 0)
        nn.utils.clip_grad_norm_(stage.parameters(), 1e6)
        optimizer.step()
        found = torch.tensor(total)
        dist.broadcast(found, 1)
        return float(found)

    return step


# ---- the race ---------------------------------------------------------------------------------------------------


def race(folder: str, steps: int, rows: int, length: int) -> tuple[dict[str, float], dict[str, list[float]], str]:
    """(CPU seconds of this rank in the median step, losses of all steps, why tp_plan="auto" is not there)."""
    ids = torch.randint(0, 1024, (rows, length), generator=torch.Generator().manual_seed(1))
    made: dict[str, Step] = {
        "pp=2, gpipe": ours(folder, f"pp=2,schedule=gpipe,microbatches={PIECES}", ids),
        "pp=2, 1f1b": ours(folder, f"pp=2,schedule=1f1b,microbatches={PIECES}", ids),
        "optimus pattern": optimus_pattern(folder),
        "tp=2": ours(folder, "tp=2", ids),
    }
    why = ""
    try:
        made['tp_plan="auto"'] = theirs(folder)
    except Exception as error:  # a peer that cannot run is a result
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    seconds: dict[str, list[float]] = {name: [] for name in made}
    losses: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(steps + 2):
        for name, step in made.items():
            dist.barrier()
            before = resource.getrusage(resource.RUSAGE_SELF)
            losses[name].append(step(ids))
            after = resource.getrusage(resource.RUSAGE_SELF)
            seconds[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {name: statistics.median(found[2:]) for name, found in seconds.items()}, losses, why


def show(family: str, found: list[Any]) -> None:
    """A line for each contestant, beside ours of the same kind."""
    spent = {name: sum(answer[0][name] for answer in found) for name in found[0][0]}
    losses = found[0][1]
    for name, value in spent.items():
        beside = spent["tp=2" if name.startswith("tp") else "pp=2, gpipe"]
        apart = max(abs(a - b) / abs(b) for a, b in zip(losses[name], losses["pp=2, gpipe"], strict=True))
        print(
            f"{family:>6}  {name:<16} {value * 1000:8.1f} ms CPU a step, {value / beside:5.2f} of ours; "
            f"losses differ by {apart:.0e}"
        )
    if found[0][2]:
        print(f'{family:>6}  tp_plan="auto"   did not run: {found[0][2]}')


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args()
    import transformers

    for family in ("llama", "gpt2"):
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            config = config_of(family, args.width, args.layers)
            getattr(transformers, config.architectures[0])(config).save_pretrained(folder)
            show(family, run_ranks(race, 2, folder, args.steps, args.rows, args.length, timeout=600.0))
    return 0


if __name__ == "__main__":
    run(main)
