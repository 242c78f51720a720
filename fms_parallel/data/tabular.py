"""Arrow and Parquet files as documents (extra `[data]`): one column, read in batches, never whole.

It knows columns; it knows nothing of tokenizers or rows. pyarrow is imported when a file is named, not before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fms_parallel.data.corpus import Corpus, Document, find_files
from fms_parallel.errors import DataError, unknown

BATCH_ROWS = 256
"""Rows of the column that are Python objects at once."""


def arrow_corpus(
    path: str | Path | None, *, column: str = "text", suffixes: str | Sequence[str] | None = (".arrow",)
) -> Corpus:
    """Arrow IPC files (file or stream format, so those of `datasets` too); one document per row.

    Args:
        path: a file, or a folder of which the files ending in `suffixes` are read, sorted.
        column: holds text, or lists of token ids of the tokenizer in use. Null rows are left out.

    Raises DataError when nothing is there or pyarrow is missing. Reading raises it for a file or column that does not
    fit.
    """
    return _corpus("arrow", path, column, suffixes)


def parquet_corpus(
    path: str | Path | None, *, column: str = "text", suffixes: str | Sequence[str] | None = (".parquet",)
) -> Corpus:
    """Parquet files; otherwise as `arrow_corpus`."""
    return _corpus("parquet", path, column, suffixes)


def _corpus(style: str, path: str | Path | None, column: str, suffixes: str | Sequence[str] | None) -> Corpus:
    files = find_files(path, style, suffixes)
    _pyarrow(style)  # said now, not when the first row is read
    return Corpus(f"{style} column={column}", tuple(files), partial(_rows, style=style, column=column))


def _pyarrow(style: str) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise DataError(f"dataset style {style!r} needs `pyarrow`: pip install 'fms_parallel[data]'.") from None
    return pyarrow


def _rows(path: Path, style: str, column: str) -> Iterator[Document]:
    """The documents of one file, each in one piece."""
    arrow = _pyarrow(style)
    try:
        for values in _BATCHES[style](path, column):
            _check_type(values.type, f"{path}: column {column!r}")
            for start in range(0, len(values), BATCH_ROWS):
                yield from ([value] for value in values.slice(start, BATCH_ROWS).to_pylist() if value is not None)
    except (arrow.ArrowInvalid, OSError) as error:
        raise DataError(f"cannot read {path} as {style}: {error}") from None


def _parquet_batches(path: Path, column: str) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path, memory_map=True) as file:
        _check_column(file.schema_arrow.names, path, column)
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[column]):
            yield batch.column(0)


def _arrow_batches(path: Path, column: str) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            source.seek(0)
            batches = reader = pyarrow.ipc.open_stream(source)
        _check_column(reader.schema.names, path, column)
        for batch in batches:
            yield batch.column(column)


_BATCHES = {"arrow": _arrow_batches, "parquet": _parquet_batches}


def _check_column(names: list[str], path: Path, column: str) -> None:
    if column not in names:
        raise DataError(f"{path}: {unknown('column', column, names)}")


def _check_type(kind: Any, place: str) -> None:
    from pyarrow import types

    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    texts = (types.is_string, types.is_large_string)
    if any(test(kind) for test in texts) or (any(test(kind) for test in lists) and types.is_integer(kind.value_type)):
        return
    raise DataError(f"{place} is {kind}; text or lists of integers are needed.")
