"""Raw files to Arrow tables, chunk by chunk: every row keeps its number, and a row that cannot be parsed is set aside.

Text formats yield binary columns, so that one invalid byte costs one row and not the file; Parquet keeps its types.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from springtide.config_data import Column
from springtide.data.sources import SourceFile, open_filesystem
from springtide.errors import SpringtideError

BLOCK_BYTES = 16 << 20  # text is parsed in blocks of this size, so no line may be longer
JSON_LINES = 50_000
PARQUET_ROWS = 500_000
MARK = "\U0010fffd"  # a private-use character that stands for one byte of invalid UTF-8
END_COLUMNS = 4096  # more columns than any log has


Bad = tuple[int, str, str]  # row, reason and content of what is no row of a table


@dataclass(frozen=True)
class RawChunk:
    """Some rows of one file. `table` holds the wanted columns by name; `rows` [n] int64 counts from 1."""

    table: pa.Table
    rows: pa.Array
    bad_rows: list[Bad]
    # Optional columns that the file has not shown up to here, all null in `table`: name -> sentence that says so.
    lacking: dict[str, str] = field(default_factory=dict)


def column_name(column: Column) -> str:
    """The name a column has in a RawChunk: as configured, or `f<position>` in a file without a header."""
    return column if isinstance(column, str) else f"f{column}"


def read_chunks(
    file: SourceFile, columns: list[Column], optional: Collection[Column] = (), list_separator: str = "|"
) -> Iterator[RawChunk]:
    """Read the wanted columns of one file. Those that are `optional` may be missing.

    Raises SpringtideError for an unreadable file, a missing column (naming those there are), a line above 16 MiB or a
    quote that is never closed.
    """
    reader = {"csv": _read_delimited, "tsv": _read_delimited, "jsonl": _read_jsonl, "parquet": _read_parquet}[
        file.format
    ]
    names = [column_name(c) for c in columns]
    try:
        for chunk in reader(file, columns, optional, list_separator):
            absent = pa.nulls(len(chunk.table), pa.binary())
            table = pa.table({n: absent if n in chunk.lacking else chunk.table[n] for n in names})
            yield replace(chunk, table=table)
    except (pa.ArrowException, OSError, EOFError) as error:
        message = " ".join(str(error).split())
        if "straddling" in message:
            message = f"it has a line longer than {BLOCK_BYTES >> 20} MiB or a quote that is never closed"
        raise SpringtideError(
            f"cannot read {file.path} as {file.format}: {message}; repair or remove the file"
        ) from None


def _open(file: SourceFile) -> pa.NativeFile:
    filesystem, path = open_filesystem(file.uri)
    return filesystem.open_input_stream(path, compression=file.compression)


class _Marked(io.RawIOBase):
    """The bytes of a stream, every byte of invalid UTF-8 replaced by MARK, and a last line `end` if it has any line.

    Without the mark Arrow gives up on a file at a malformed row that is no UTF-8. The last line tells whether the file
    ends inside quotes: Arrow would take everything after an unclosed quote for one value and say nothing.
    """

    def __init__(self, stream: pa.NativeFile, end: bytes) -> None:
        self._stream, self._end = stream, end
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._ready, self._any, self._over = b"", False, False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while not self._over and (size < 0 or len(self._ready) < size):
            raw = self._stream.read(max(size, 1 << 20))
            self._over = not raw
            more = raw if raw.isascii() and not self._decoder.getstate()[0] else self._mark(raw)
            self._any = self._any or bool(more.strip())
            self._ready += more + (self._end if self._over and self._any else b"")
        size = len(self._ready) if size < 0 else size
        out, self._ready = self._ready[:size], self._ready[size:]
        return out

    def _mark(self, raw: bytes) -> bytes:
        text = self._decoder.decode(raw, final=self._over)
        try:
            return text.encode()
        except UnicodeEncodeError:
            return re.sub("[\udc80-\udcff]", MARK, text).encode()


def _check_columns(
    file: SourceFile, wanted: list[Column], optional: Collection[Column], present: list[str]
) -> dict[str, str]:
    """Optional columns that are missing, each with the sentence that says so. Raises SpringtideError for any other."""
    lacking = {}
    for column in wanted:
        if column_name(column) not in present:
            sentence = (
                f"{file.path} has no column {column!r}; it has {', '.join(present)}: correct columns in the settings"
            )
            if column not in optional:
                raise SpringtideError(sentence)
            lacking[column_name(column)] = sentence
    return lacking


def _read_delimited(
    file: SourceFile, columns: list[Column], optional: Collection[Column], separator: str
) -> Iterator[RawChunk]:
    if len({type(c) for c in columns}) > 1:
        raise SpringtideError(f"{file.path}: name all columns, or give all by position; not some of each")
    bad: list[Bad] = []
    headerless = isinstance(columns[0], int)
    names = [column_name(c) for c in columns]
    tabbed = file.format == "tsv"
    end = MARK + ("\t" if tabbed else ",") * END_COLUMNS
    ended = False

    def set_aside(row: pacsv.InvalidRow) -> str:
        nonlocal ended
        if row.text == end:
            ended = True
            return "skip"
        lines = row.text.count("\n") + 1
        reason = f"{row.actual_columns} columns, not {row.expected_columns}" + (
            f", over {lines} lines" if lines > 1 else ""
        )
        bad.append((row.number - (0 if headerless else 1), reason, row.text.replace(MARK, "\ufffd")))
        return "skip"

    with _open(file) as raw, _Marked(raw, f"\n{end}\n".encode()) as stream:
        try:
            batches = _open_csv(stream, names, headerless, tabbed, set_aside)
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):
                return
            raise
        except KeyError:
            lacking = _check_columns(file, columns, optional, _header(file, headerless))
            if not lacking:
                raise
            there = [column for column in columns if column_name(column) not in lacking]
            for chunk in _read_delimited(file, there, optional, separator):
                yield replace(chunk, lacking=chunk.lacking | lacking)
            return
        last = 0
        for batch in batches:
            rows, aside, last = _take_numbers(batch.num_rows, bad, last)
            yield RawChunk(_unmarked(pa.Table.from_batches([batch]).select(names)), pa.array(rows, pa.int64()), aside)
        if bad:
            last = bad[-1][0]
            nothing = pa.table({name: pa.array([], pa.binary()) for name in names})
            yield RawChunk(nothing, pa.array([], pa.int64()), bad)
        if not ended:
            raise SpringtideError(
                f"cannot read {file.path} as {file.format}: the quote opened in row {last} is never closed and"
                " swallows what follows; close it or remove that row"
            )


def _open_csv(
    stream: Any, names: list[str], headerless: bool, tabbed: bool, set_aside: Callable[[pacsv.InvalidRow], str]
) -> pacsv.CSVStreamingReader:
    """The wanted columns as bytes, batch by batch; set_aside is asked about every row with too many or too few."""
    return pacsv.open_csv(
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


def _take_numbers(count: int, bad: list[Bad], last: int) -> tuple[np.ndarray, list[Bad], int]:
    """Numbers of the next `count` rows after row `last`, the rows set aside among them (taken off `bad`), and the last.

    Rows set aside count too, so a later row keeps the number that an editor shows for it.
    """
    until, aside = last + count, 0
    while aside < len(bad) and bad[aside][0] <= until + 1:
        aside, until = aside + 1, until + 1
    taken = bad[:aside]
    del bad[:aside]  # in place, as the reader may be adding to it from its thread
    rows = np.setdiff1d(np.arange(last + 1, until + 1), [number for number, _, _ in taken], assume_unique=True)
    return rows, taken, until


def _unmarked(table: pa.Table) -> pa.Table:
    """MARK back to a byte that is no UTF-8, so that cleaning rejects exactly the rows that need the value."""
    mark = MARK.encode()
    for position, name in enumerate(table.column_names):
        if pc.any(pc.match_substring(table[position], mark)).as_py():
            table = table.set_column(position, name, pc.replace_substring(table[position], mark, b"\xff"))
    return table


def _header(file: SourceFile, headerless: bool) -> list[str]:
    """Column names of a delimited file, for the error that lists them."""
    with _open(file) as stream:
        start = stream.read(1 << 16)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SpringtideError(f"{file.path} is UTF-16 text; convert it to UTF-8")
    first = next((line for line in start.decode("utf-8-sig", "replace").splitlines() if line), "")
    names = next(csv.reader([first], delimiter="\t" if file.format == "tsv" else ","))
    return [f"f{position}" for position in range(len(names))] if headerless else names


def _read_jsonl(
    file: SourceFile, columns: list[Column], optional: Collection[Column], list_separator: str
) -> Iterator[RawChunk]:
    names = [column_name(c) for c in columns]
    present: set[str] = set()
    with _open(file) as stream, io.BufferedReader(stream) as lines:
        row, values, rows, bad = 0, _empty(names), [], []
        while line := lines.readline(BLOCK_BYTES + 1):
            if len(line) > BLOCK_BYTES:
                raise SpringtideError(
                    f"{file.path} has a line longer than {BLOCK_BYTES >> 20} MiB after row {row}; repair or remove it"
                )
            if not line.strip():
                continue
            row += 1
            try:
                record = json.loads(line)
                reason = "not a JSON object"
            except (ValueError, RecursionError) as error:
                record, reason = None, "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
            if isinstance(record, dict):
                present.update(record)
                rows.append(row)
                for name in names:
                    values[name].append(_as_bytes(record.get(name), list_separator))
            else:
                bad.append((row, reason, line[:1000].decode("utf-8", "replace")))
            if len(rows) + len(bad) >= JSON_LINES:
                lacking = _check_columns(file, columns, columns, sorted(present))  # later lines may have them
                yield RawChunk(_binary_table(values), pa.array(rows, pa.int64()), bad, lacking)
                values, rows, bad = _empty(names), [], []
        lacking = _check_columns(file, columns, optional if present else columns, sorted(present))
        if rows or bad:
            yield RawChunk(_binary_table(values), pa.array(rows, pa.int64()), bad, lacking)


def _empty(names: list[str]) -> dict[str, list[bytes | None]]:
    return {name: [] for name in names}


def _binary_table(values: dict[str, list[bytes | None]]) -> pa.Table:
    return pa.table({name: pa.array(column, pa.binary()) for name, column in values.items()})


def _as_bytes(value: Any, list_separator: str) -> bytes | None:
    if value is None:
        return None
    if isinstance(value, list):
        value = list_separator.join(str(part) for part in value if part is not None)
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    elif isinstance(value, (dict, bool)):
        value = json.dumps(value)
    return str(value).encode("utf-8", "replace")


def _open_parquet(file: SourceFile) -> pa.NativeFile:
    """A file to be read from its end. What is packed as a whole must be unpacked first, into memory."""
    if file.compression:
        with _open(file) as stream:
            return pa.BufferReader(stream.read())
    filesystem, path = open_filesystem(file.uri)
    return filesystem.open_input_file(path)


def _read_parquet(
    file: SourceFile, columns: list[Column], optional: Collection[Column], list_separator: str
) -> Iterator[RawChunk]:
    with _open_parquet(file) as stream:
        parquet = pq.ParquetFile(stream)
        lacking = _check_columns(file, columns, optional, parquet.schema_arrow.names)
        names = [name for name in map(column_name, columns) if name not in lacking]
        row = 1
        for batch in parquet.iter_batches(PARQUET_ROWS, columns=list(dict.fromkeys(names)), use_threads=False):
            table = pa.Table.from_batches([batch])
            for position, field in enumerate(table.schema):
                if (
                    pa.types.is_list(field.type)
                    or pa.types.is_large_list(field.type)
                    or pa.types.is_fixed_size_list(field.type)
                ):
                    joined = [None if v is None else list_separator.join(str(p) for p in v if p is not None)
                              for v in table[position].to_pylist()]  # fmt: skip
                    table = table.set_column(position, field.name, pa.array(joined, pa.string()))
                elif pa.types.is_dictionary(field.type):
                    table = table.set_column(position, field.name, table[position].cast(field.type.value_type))
                elif pa.types.is_nested(field.type):
                    raise SpringtideError(
                        f"{file.path}: column {field.name!r} holds {field.type}; choose a column of plain values"
                    )
            yield RawChunk(table, pa.array(np.arange(row, row + len(table)), pa.int64()), [], lacking)
            row += len(table)
