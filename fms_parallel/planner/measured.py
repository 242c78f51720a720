"""Reading measurements: files of step times and of collectives become plain cases that a cost model can be scored on.

It knows the forms in which others publish (rows of vTrain, rows of NCCL tests, tables of papers and of torchtitan) and
what their captions mean; it knows no cost. A setting that was not published is left open: `validate` then takes the
planner's own best, as the authors took theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.planner.catalog import find_model
from fms_parallel.planner.hardware import read_json
from fms_parallel.planner.topology import SWITCHED
from fms_parallel.shape import ModelShape

VOCAB = 51200
"""GPT-2's 50,257 padded to what Megatron pads to."""


@dataclass(frozen=True)
class Case:
    """One measured step.

    Attributes:
        settings: columns of the layout (pp, dp, ..., micro, recompute as an index). unknown: column -> values that the
            source does not tell apart. seconds: measured, of one step. memory_gb: measured peak of a rank, 2^30 bytes.
    """

    label: str
    shape: ModelShape
    device: str
    software: str
    precision: str
    sequence: int
    global_batch: int
    settings: Mapping[str, int]
    seconds: float
    unknown: Mapping[str, Sequence[int]] = field(default_factory=dict)
    memory_gb: float | None = None


@dataclass(frozen=True)
class Collective:
    """One measured collective: `size` bytes of the whole tensor, on `nodes` nodes with `inside` members each."""

    operation: str
    size: float
    nodes: int
    inside: int
    seconds: float


@dataclass(frozen=True)
class Table:
    """Measurements that belong together: cases, or collectives of one network."""

    name: str
    cases: Sequence[Case] = ()
    collectives: Sequence[Collective] = ()


def read_measured(path: str | Path) -> list[Table]:
    """Every table of a file.

    Raises:
        ConfigError: not JSON, none of the known forms, or a row without what its form needs (file, row, reason).
    """
    content = read_json(path)
    if "tables" in content:
        entries = content["tables"]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ConfigError(f"{path}: tables: needs a list of objects; see --help for the forms.")
        found = [table for entry in entries for table in _published(path, entry)]
        if not found:
            raise ConfigError(
                f"{path}: tables: none of {len(entries)} in a form that is read: rows with hidden, heads, layers, or "
                "torchtitan's tables with their captions; see --help."
            )
        return found
    rows = {key: value for key, value in content.items() if isinstance(value, list) and value}
    if not rows:
        raise ConfigError(f"{path}: neither rows nor tables of measurements; see --help for the forms.")
    return [_table(path, name, entries) for name, entries in rows.items()]


def _table(path: str | Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: {name} row {index}: is {row!r}, needs an object with a value for each column.")
    if "op" in rows[0]:
        return Table(name, collectives=[_guard(path, name, i, _collective, row) for i, row in enumerate(rows)])
    return Table(name, cases=[_guard(path, name, i, _vtrain, row) for i, row in enumerate(rows)])


def _guard(path: str | Path, table: str, index: int, read: Callable[[Mapping[str, Any]], Any], row: Any) -> Any:
    try:
        return read(row)
    except KeyError as error:
        raise ConfigError(f"{path}: {table} row {index}: no {error}.") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: {table} row {index}: {error}.") from None


def _check(row: Mapping[str, Any], *names: str) -> None:
    """Raises KeyError for a column that is missing, ValueError for one that is no number > 0."""
    for name in names:
        value = row[name]
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ValueError(f"{name}={value!r}: needs a number > 0")


def _collective(row: Mapping[str, Any]) -> Collective:
    _check(row, "size", "num_nodes", "gpus_per_node", "time-o")
    if row["op"] not in (*SWITCHED, "p2p"):
        raise ValueError(unknown("collective", str(row["op"]), (*SWITCHED, "p2p")).removesuffix("."))
    return Collective(row["op"], row["size"], row["num_nodes"], row["gpus_per_node"], row["time-o"] * 1e-6)


def gpt(width: int, layers: int, heads: int, sequence: int, vocab: int = VOCAB) -> ModelShape:
    """A GPT of Megatron's papers: two feed-forward matrices of 4 E, biases, learned positions, tied head."""
    return ModelShape(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        ffn_width=4 * width,
        vocab=vocab,
        max_positions=sequence,
        gated=False,
        tied=True,
        attention_bias=True,
        ffn_bias=True,
        learned_positions=True,
        norm_bias=True,
    )


def _vtrain(row: Mapping[str, Any]) -> Case:
    """Megatron-LM with full recomputation on nodes of eight A100 behind 800 Gb/s."""
    _check(row, "tp", "dp", "pp", "mbs", "gbs", "hidden", "layers", "heads", "seq", "iter_ms")
    settings = {key: int(row[key]) for key in ("tp", "dp", "pp")}
    micro = int(row["mbs"])
    settings |= {"micro": micro, "count": max(int(row["gbs"]) // settings["dp"] // micro, 1), "recompute": 2}
    return Case(
        label=" ".join(f"{key}={row[key]}" for key in ("hidden", "layers", "gpus", "gbs", "tp", "dp", "pp", "mbs")),
        shape=gpt(row["hidden"], row["layers"], row["heads"], row["seq"]),
        device="a100-vtrain",
        software="megatron-2021",
        precision="bf16",
        sequence=int(row["seq"]),
        global_batch=int(row["gbs"]),
        settings=settings,
        seconds=float(row["iter_ms"]) / 1e3,
    )


# ---- published tables -----------------------------------------------------------------------------------------------


def _published(path: str | Path, entry: Mapping[str, Any]) -> list[Table]:
    """One entry of `tables`: rows of GPT models, or torchtitan's captioned tables; others are skipped."""
    name = str(entry.get("id", "table"))
    if "tables" in entry:
        return [
            Table(f"{name} {number}", cases=cases)
            for number, table in enumerate(entry["tables"], 1)
            if (cases := _guard(path, name, number, lambda t: list(_torchtitan(entry, t)), table))
        ]
    rows = entry.get("rows")
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict) or "hidden" not in rows[0]:
        return []
    cases = [_guard(path, name, i, lambda row: _gpt_case(entry, row), row) for i, row in enumerate(rows)]
    return [Table(name, cases=cases)]


SECONDS = (
    ("iteration_s", 1.0),
    ("derived_iteration_s", 1.0),
    ("step_time_s", 1.0),
    ("seconds", 1.0),
    ("iteration_ms", 1e-3),
    ("iter_ms", 1e-3),
)


def _gpt_case(entry: Mapping[str, Any], row: Mapping[str, Any]) -> Case:
    whole = {**entry, **row}
    _check(row, "hidden", "heads", "layers")
    _check(whole, *(key for key in ("tp", "pp", "dp", "gpus", "seq", "vocab", *dict(SECONDS)) if key in whole))
    seconds = next((float(row[key]) * unit for key, unit in SECONDS if key in row), None)
    sequence, heads = int(whole.get("seq", 2048)), int(row["heads"])
    batch = int(row.get("global_batch", row.get("gbs", row.get("batch", 0))))
    shape = gpt(row["hidden"], row["layers"], heads, sequence, int(whole.get("vocab", VOCAB)))
    tp, pp = int(row.get("tp", 1)), int(row.get("pp", 1))
    gpus = int(row.get("gpus", tp * pp))
    recent = any(word in str(whole.get("hardware", "")).lower() for word in ("h100", "h200", "b200"))
    recompute = str(whole.get("recompute", "none" if recent else "full")).lower()
    settings = {"tp": tp, "pp": pp, "dp": int(row.get("dp", gpus // (tp * pp)))}
    settings["recompute"] = 2 if "full" in recompute else 1 if "select" in recompute else 0
    settings["sp"] = int(tp > 1 and bool(whole.get("sp", "sequence" in recompute or settings["recompute"] < 2)))
    device, software = _hardware(str(whole.get("hardware", "A100")), settings)
    if software == "megatron-core":
        settings["zero"] = 1  # its distributed optimizer
    if seconds is None:
        # Narayanan et al. count the recomputed forward pass, later tables do not.
        factor = 96 if software == "megatron-2021" else 72
        v, width = shape.vocab, shape.width
        flops = float(factor * batch * sequence * shape.layers * width**2)
        flops *= 1 + sequence / (6 * width) + 6 * v / (factor * shape.layers * width)
        seconds = flops / (float(row["tflops_per_gpu"]) * 1e12 * gpus)
    fixed, unknown = _micro_and_virtual(whole, settings, batch, shape)
    return Case(
        label=f"{row.get('params_B', row['hidden'])}B tp={tp} pp={pp} dp={settings['dp']} batch={batch}",
        shape=shape,
        device=device,
        software=software,
        precision="bf16",
        sequence=sequence,
        global_batch=batch,
        settings={**settings, **fixed},
        seconds=seconds,
        unknown=unknown,
        memory_gb=row.get("memory_gb"),
    )


def _hardware(text: str, settings: Mapping[str, int]) -> tuple[str, str]:
    """Device and software that a table's `hardware` line means."""
    text = text.lower()
    for word, device in (
        ("h100 96", "h100-96gb"),
        ("h100", "h100"),
        ("h200", "h200"),
        ("b200", "b200"),
        ("v100", "v100"),
    ):
        if word in text:
            return device, "megatron-core"
    return "a100", "megatron-2021" if settings["recompute"] == 2 and not settings["sp"] else "megatron-2022"


def _micro_and_virtual(
    row: Mapping[str, Any], settings: Mapping[str, int], batch: int, shape: ModelShape
) -> tuple[dict[str, int], dict[str, Sequence[int]]]:
    """Micro-batch and interleaving: as published, else every value that divides."""
    share = batch // settings["dp"]
    published = next((row[key] for key in ("mbs", "micro_batch_size") if key in row), row.get("micro_batch"))
    micros = [int(published)] if isinstance(published, int) else [m for m in (1, 2, 4, 8, 16) if share % m == 0]
    pp, stages = settings["pp"], row.get("virtual", row.get("vp", row.get("interleave")))
    blocks = shape.layers // pp
    if isinstance(stages, int):
        virtuals: Sequence[int] = [max(stages, 1)]
    elif pp > 1 and "interleav" in str(row.get("schedule", "")).lower():
        virtuals = [v for v in range(1, min(blocks, 8) + 1) if blocks % v == 0]
    else:
        virtuals = [1]
    return {}, {"micro": micros, "virtual": virtuals}


def _torchtitan(entry: Mapping[str, Any], table: Mapping[str, Any]) -> list[Case]:
    """Rows of one of torchtitan's tables; settings come from its caption, then from the row's first cell."""
    caption = str(table.get("caption", ""))
    size = re.search(r"llama ?3(?:\.1)? (\d+)b", caption, re.IGNORECASE)
    columns = [str(cell).lower() for cell in table["header"]]
    speeds = [i for i, cell in enumerate(columns) if "tps" in cell or "tokens/sec" in cell]
    if not speeds or (size is None and "8b" not in str(entry.get("id"))):
        return []
    model = find_model(f"llama:3.1-{size.group(1) if size else 8}b").shape
    return [
        case
        for row in table["rows"]
        for speed in speeds
        if (case := _torchtitan_case(entry, caption, columns, row, speed, model)) is not None
    ]


def _number(pattern: str, text: str, otherwise: int) -> int:
    found = re.search(pattern, text, re.IGNORECASE)
    return int(found.group(1).replace(",", "")) if found else otherwise


def _torchtitan_case(
    entry: Mapping[str, Any], caption: str, columns: list[str], row: Sequence[str], speed: int, model: ModelShape
) -> Case | None:
    words = f"{caption} {row[0]} {columns[speed]}"
    if "rowwise" in words.lower() or not re.search(r"batch size", caption, re.IGNORECASE):
        return None  # rowwise scaling is another algorithm; without a batch size nothing can be predicted
    gpus = _number(r"(\d+) (?:GPUs|H100s)", caption, 8)
    local = _number(r"local batch size (\d+)", caption, 1)
    sequence = next((int(row[i]) for i, c in enumerate(columns) if "sequence" in c), int(entry.get("seq", 8192)))
    tps = float(row[speed].replace(",", ""))
    compiled = "compile" in words.lower()
    asynchronous = "async" in words.lower() and "vanilla" not in columns[speed]
    settings = _torchtitan_settings(caption, row[0], gpus, local)
    batch = local * settings["fsdp"]
    return Case(
        label=f"{row[0]} {columns[speed]} {gpus} GPUs S={sequence}",
        shape=model,
        device=_hardware(str(entry.get("hardware", "")), settings)[0],
        software="torchtitan" + ("-compile" if compiled else "") + ("-async" if asynchronous else ""),
        precision="fp8" if "float8" in words.lower() else "bf16",
        sequence=sequence,
        global_batch=batch,
        settings=settings,
        seconds=batch * sequence / (tps * gpus),
        memory_gb=next((float(row[i]) for i, c in enumerate(columns) if "memory" in c), None),
    )


def _torchtitan_settings(caption: str, cell: str, gpus: int, local: int) -> dict[str, int]:
    """Columns of the layout: what a row's first cell says counts over the caption of its table."""
    degree = {
        axis: _number(rf"{axis}\s*=?\s*(\d+)", cell, _number(rf"{axis}\s*=?\s*(\d+)", caption, 1))
        for axis in ("tp", "pp", "cp")
    }
    fsdp = _number(r"FSDP\s*=?\s*(\d+)", cell, _number(r"FSDP\s*=?\s*(\d+)", caption, 0))
    return {
        **degree,
        "fsdp": fsdp or gpus // (degree["tp"] * degree["pp"] * degree["cp"]),
        "sp": int(degree["tp"] > 1),
        "recompute": 2 if re.search(r"full (activation|AC)", caption, re.IGNORECASE) else 1,
        # Its pipeline cuts a batch into as many micro-batches as there are stages unless told otherwise.
        "micro": max(local // degree["pp"], 1),
        "count": min(degree["pp"], local),
        **({"schedule": 2, "virtual": 2} if "interleaved" in cell.lower() else {}),
    }
