"""Raw files to Arrow tables, chunk by chunk: every row keeps its number, and a row that cannot be parsed is set aside.

Text formats yield binary columns, so that one invalid byte costs one row and not the file; Parquet keeps its types.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from springtide.config import Column
from springtide.data.sources import SourceFile, open_filesystem
from springtide.errors import SpringtideError

BLOCK_BYTES = 16 << 20  # text is parsed in blocks of this size, so no line may be longer
JSON_LINES = 50_000
PARQUET_ROWS = 500_000


@dataclass(frozen=True)
class RawChunk:
    """Some rows of one file. `table` holds the wanted columns by name; `rows` [n] int64 counts from 1."""

    table: pa.Table
    rows: pa.Array
    bad_rows: list[tuple[int, str, str]]  # (row, reason, content) of rows that are no rows of a table


def column_name(column: Column) -> str:
    """The name a column has in a RawChunk: as configured, or `f<position>` in a file without a header."""
    return column if isinstance(column, str) else f"f{column}"


def read_chunks(file: SourceFile, columns: list[Column], list_separator: str = "|") -> Iterator[RawChunk]:
    """Read the wanted columns of one file.

    Raises SpringtideError for an unreadable file, a missing column (naming those there are) or a line above 16 MiB.
    """
    reader = {"csv": _read_delimited, "tsv": _read_delimited, "jsonl": _read_jsonl, "parquet": _read_parquet}[file.format]
    try:
        yield from reader(file, columns, list_separator)
    except (pa.ArrowException, OSError, EOFError) as error:
        message = " ".join(str(error).split())
        if "straddling" in message:
            message = f"it has a line longer than {BLOCK_BYTES >> 20} MiB or an unclosed quote"
        raise SpringtideError(f"cannot read {file.path} as {file.format}: {message}; repair or remove the file") from None


def _open(file: SourceFile) -> pa.NativeFile:
    filesystem, path = open_filesystem(file.uri)
    return filesystem.open_input_stream(path, compression=file.compression)


def _check_columns(file: SourceFile, wanted: list[Column], present: list[str]) -> None:
    missing = [c for c in wanted if column_name(c) not in present]
    if missing:
        raise SpringtideError(
            f"{file.path} has no column {missing[0]!r}; it has {', '.join(present)}: correct columns in the settings"
        )


def _read_delimited(file: SourceFile, columns: list[Column], _: str) -> Iterator[RawChunk]:
    if len({type(c) for c in columns}) > 1:
        raise SpringtideError(f"{file.path}: name all columns, or give all by position; not some of each")
    bad: list[tuple[int, str, str]] = []
    headerless = isinstance(columns[0], int)

    def set_aside(row: pacsv.InvalidRow) -> str:
        reason = f"{row.actual_columns} columns, not {row.expected_columns}"
        bad.append((row.number - (0 if headerless else 1), reason, row.text))
        return "skip"

    names = [column_name(c) for c in columns]
    tabbed = file.format == "tsv"
    with _open(file) as stream:
        try:
            batches = pacsv.open_csv(
                stream,
                read_options=pacsv.ReadOptions(
                    use_threads=False, block_size=BLOCK_BYTES, autogenerate_column_names=headerless, encoding="utf8"
                ),
                parse_options=pacsv.ParseOptions(
                    delimiter="\t" if tabbed else ",",
                    quote_char=False if tabbed else '"',
                    newlines_in_values=not tabbed,
                    invalid_row_handler=set_aside,
                ),
                convert_options=pacsv.ConvertOptions(
                    column_types={name: pa.binary() for name in names}, strings_can_be_null=False, include_columns=names
                ),
            )
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):
                return
            raise
        except KeyError:
            _check_columns(file, columns, _header(file, headerless))
            raise
        next_row, used = 1, 0
        for batch in batches:
            # Rows set aside still count, so a later row keeps the number that an editor shows for it.
            numbers = []
            limit = next_row + batch.num_rows
            for number, _reason, _content in bad[used:]:
                if number > limit:
                    break
                numbers.append(number)
                limit += 1
            rows = np.setdiff1d(np.arange(next_row, limit), numbers, assume_unique=True)
            table = pa.Table.from_batches([batch]).select(names)
            yield RawChunk(table, pa.array(rows, pa.int64()), bad[used : used + len(numbers)])
            next_row, used = limit, used + len(numbers)
        if used < len(bad):
            yield RawChunk(pa.table({name: pa.array([], pa.binary()) for name in names}), pa.array([], pa.int64()), bad[used:])


def _header(file: SourceFile, headerless: bool) -> list[str]:
    """Column names of a delimited file, for the error that lists them."""
    with _open(file) as stream:
        first = stream.read(1 << 16).splitlines()[0].decode("utf-8", "replace")
    names = next(csv.reader([first], delimiter="\t" if file.format == "tsv" else ","))
    return [f"f{position}" for position in range(len(names))] if headerless else names


def _read_jsonl(file: SourceFile, columns: list[Column], list_separator: str) -> Iterator[RawChunk]:
    names = [column_name(c) for c in columns]
    present: set[str] = set()
    with _open(file) as stream, io.BufferedReader(stream) as lines:  # type: ignore[type-var]
        row, values, rows, bad = 0, _empty(names), [], []
        for line in lines:
            if not line.strip():
                continue
            row += 1
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                present.update(record)
                rows.append(row)
                for name in names:
                    values[name].append(_as_bytes(record.get(name), list_separator))
            else:
                bad.append((row, "not a JSON object", line[:200].decode("utf-8", "replace")))
            if len(rows) + len(bad) >= JSON_LINES:
                yield RawChunk(_binary_table(values), pa.array(rows, pa.int64()), bad)
                values, rows, bad = _empty(names), [], []
        if row and present:
            _check_columns(file, columns, sorted(present))
        if rows or bad:
            yield RawChunk(_binary_table(values), pa.array(rows, pa.int64()), bad)


def _empty(names: list[str]) -> dict[str, list[bytes | None]]:
    return {name: [] for name in names}


def _binary_table(values: dict[str, list[bytes | None]]) -> pa.Table:
    return pa.table({name: pa.array(column, pa.binary()) for name, column in values.items()})


def _as_bytes(value: Any, list_separator: str) -> bytes | None:
    if value is None:
        return None
    if isinstance(value, list):
        value = list_separator.join(str(part) for part in value)
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    elif isinstance(value, (dict, bool)):
        value = json.dumps(value)
    return str(value).encode("utf-8", "replace")


def _read_parquet(file: SourceFile, columns: list[Column], list_separator: str) -> Iterator[RawChunk]:
    filesystem, path = open_filesystem(file.uri)
    names = [column_name(c) for c in columns]
    with filesystem.open_input_file(path) as stream:
        parquet = pq.ParquetFile(stream)
        _check_columns(file, columns, parquet.schema_arrow.names)
        row = 1
        for batch in parquet.iter_batches(PARQUET_ROWS, columns=list(dict.fromkeys(names)), use_threads=False):
            table = pa.Table.from_batches([batch])
            for position, field in enumerate(table.schema):
                if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
                    joined = ["" if v is None else list_separator.join(map(str, v)) for v in table[position].to_pylist()]
                    table = table.set_column(position, field.name, pa.array(joined, pa.string()))
                elif pa.types.is_dictionary(field.type):
                    table = table.set_column(position, field.name, table[position].cast(field.type.value_type))
            yield RawChunk(table, pa.array(np.arange(row, row + len(table)), pa.int64()), [])
            row += len(table)
