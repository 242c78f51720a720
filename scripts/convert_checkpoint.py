"""Convert a checkpoint from any format to any other, one tensor in memory at a time.

    python scripts/convert_checkpoint.py --architecture llama --variant 2-70b --model_path META_FOLDER \\
        --to hf --output_path FOLDER --dtype bf16
    python scripts/convert_checkpoint.py --model_path HF_FOLDER --to native --output_path FOLDER
    python scripts/convert_checkpoint.py --model_path HF_FOLDER --to meta --shards 8 --output_path FOLDER

Formats: hf, meta (LLaMA's consolidated.NN.pth) and native (our own names). The tensors are those of the source, bit for
bit, unless --dtype says otherwise. Without --architecture the folder's config.json says what the model is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fms_parallel.cli import assignments, run
from fms_parallel.errors import ConfigError


def build_parser() -> argparse.ArgumentParser:
    """Every flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="hf_pretrained", help="(default: what config.json says)")
    parser.add_argument("--variant", help="(default: the architecture's first)")
    parser.add_argument("--override", action="append", default=[], metavar="FIELD=VALUE", help="replace a config field")
    parser.add_argument("--model_path", required=True, help="weight file or folder to read")
    parser.add_argument("--source", help="its format: hf, meta, native (default: found out)")
    parser.add_argument("--to", required=True, help="format to write: hf, meta, native")
    parser.add_argument("--output_path", required=True, help="folder to write to")
    parser.add_argument("--shards", type=int, help="files of the meta format (default: 1)")
    parser.add_argument("--max_shard_bytes", type=int, default=5 << 30, help="of a safetensors file (default: 5 GiB)")
    parser.add_argument("--dtype", help="of the tensors written: fp32, bf16, fp16, fp64 (default: as they are)")
    return parser


def main() -> int:
    """Check the command, then convert."""
    args = build_parser().parse_args()
    overrides = assignments(args.override, "--override")
    source, target = Path(args.model_path), Path(args.output_path)
    if (source if source.is_dir() else source.parent).resolve() == target.resolve():
        raise ConfigError(f"--output_path {target} is where the weights are read from: choose another folder.")
    if args.max_shard_bytes < 1:
        raise ConfigError(f"--max_shard_bytes {args.max_shard_bytes}: must be at least 1.")

    from fms_parallel.checkpoint.lazy import Cast
    from fms_parallel.models.build import dtype_of, find_model
    from fms_parallel.models.sources import check_described, open_native, whole_model, write_as

    dtype = dtype_of(args.dtype)
    known, config = find_model(args.architecture, args.variant, source, overrides)
    check_described(known, config, source)
    tensors = whole_model(known, config, open_native(known, config, source, args.source), str(source))
    if dtype is not None:
        tensors = {name: Cast(tensor, dtype) for name, tensor in tensors.items()}
    write_as(known, config, tensors, args.to, target, files=args.shards, max_shard_bytes=args.max_shard_bytes)
    size = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{known.name}: {len(tensors)} tensors, {size / 1e9:.2f} GB, written as {args.to} to {target}")
    return 0


if __name__ == "__main__":
    run(main)
