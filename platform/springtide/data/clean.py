"""One chunk of raw rows to typed events: every row is either an event or a reject with its reason. All vectorised.

A cleaned chunk is one table, so that good and bad rows travel together and nothing can get lost between two outputs:
`reason` is null for an event; a reject carries `content` instead.
"""

from __future__ import annotations

import zlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from springtide.config_data import ColumnRule, EventSource
from springtide.data.readers import RawChunk, column_name

CLEANED = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("action", pa.string()),
        ("rating", pa.float32()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("bucket", pa.int32()),  # hash partition of the user
        ("reason", pa.string()),
        ("content", pa.string()),
    ]
)

MAX_ID_BYTES = 512
CONTENT_CHARACTERS = 300
MISSING_IDS = pa.array(["", "nan", "NaN", "null", "NULL", "None"])
NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
UNKNOWN_ACTION = "<unknown>"  # the vocabulary's name for a missing action
ISO = r"^\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?)?"
EARLIEST_MS, LATEST_MS = -2_208_988_800_000, 7_258_118_400_000  # the years 1900 to 2200


class Rejects:
    """Reasons collected column by column; the first reason of a row stands."""

    def __init__(self, rows: int) -> None:
        self.reason = np.full(rows, None, dtype=object)
        self.bad = np.zeros(rows, bool)

    def add(self, bad: pa.ChunkedArray | pa.Array | np.ndarray, reason: str) -> None:
        mask = np.asarray(bad.to_numpy(zero_copy_only=False) if isinstance(bad, (pa.Array, pa.ChunkedArray)) else bad)
        mask = mask.astype(bool)
        self.reason[mask & ~self.bad] = reason
        self.bad |= mask


def clean_chunk(chunk: RawChunk, source: EventSource, file: int, partitions: int) -> pa.Table:
    """Type, check and label the rows of one chunk. Returns CLEANED, one row for every raw row.

    Without a column of times `timestamp` has the order of the log, for partitions.make_times.
    """
    rows = chunk.table.num_rows
    rejects = Rejects(rows)
    text = {name: as_text(chunk.table[name], rejects, name) for name in chunk.table.column_names}
    columns = source.columns
    user, item = (pc.utf8_trim_whitespace(text[column_name(name)]) for name in (columns.user_id, columns.item_id))
    for rule in source.keep:
        rejects.add(pc.invert(test_rule(rule, text)), f"filtered: {describe_rule(rule)}")
    for column, ids in (("user_id", user), ("item_id", item)):
        rejects.add(is_missing(ids), f"no {column}")
        rejects.add(
            pc.greater(pc.fill_null(pc.binary_length(ids), 0), MAX_ID_BYTES), f"{column} above {MAX_ID_BYTES} bytes"
        )
    if columns.timestamp is None:
        timestamp = pc.add(chunk.rows, file << 32)  # only an order: rows of earlier files are not counted yet
    else:
        raw_time = chunk.table[column_name(columns.timestamp)]
        timestamp = to_milliseconds(text[column_name(columns.timestamp)] if _is_text(raw_time.type) else raw_time)
    rejects.add(
        pc.is_null(timestamp), "timestamp is no epoch second, epoch millisecond or ISO-8601 time from 1900 to 2199"
    )
    rating = pa.nulls(rows, pa.float32())
    if columns.rating is not None:
        values = text[column_name(columns.rating)]
        rating = to_numbers(values).cast(pa.float32(), safe=False)
        rating = pc.if_else(pc.is_finite(rating), rating, None)  # 1e300 is no float32
        rejects.add(pc.and_(pc.is_null(rating), pc.invert(is_missing(values))), "rating is no number")
    actions = _actions(source, text, rows)
    rejects.add(
        pc.greater(pc.fill_null(pc.binary_length(actions), 0), MAX_ID_BYTES), f"action above {MAX_ID_BYTES} bytes"
    )
    good = ~rejects.bad
    content = pa.nulls(rows, pa.string())
    if not good.all():
        content = content_of(text, ~good)
    cleaned = pa.table(
        {
            "user_id": _where(good, user),
            "item_id": _where(good, item),
            "timestamp": _where(good, timestamp),
            "action": _where(good, actions),
            "rating": _where(good, rating),
            "file": pa.array(np.full(rows, file, np.int32)),
            "row": chunk.rows,
            "bucket": _buckets(_where(good, user), partitions, file),
            "reason": pa.array(rejects.reason, pa.string()),
            "content": content,
        },
        schema=CLEANED,
    )
    return pa.concat_tables([cleaned, _unparsed(chunk.bad_rows, file, partitions)]) if chunk.bad_rows else cleaned


def _unparsed(bad_rows: list[tuple[int, str, str]], file: int, partitions: int) -> pa.Table:
    columns: dict[str, pa.Array] = {field.name: pa.nulls(len(bad_rows), field.type) for field in CLEANED}
    columns["file"] = pa.array([file] * len(bad_rows), pa.int32())
    columns["bucket"] = pa.array([file % partitions] * len(bad_rows), pa.int32())
    columns["row"] = pa.array([row for row, _, _ in bad_rows], pa.int64())
    columns["reason"] = pa.array([f"malformed row: {reason}" for _, reason, _ in bad_rows], pa.string())
    columns["content"] = pa.array([printable(content) for _, _, content in bad_rows], pa.string())
    return pa.table(columns, schema=CLEANED)


def printable(content: str) -> str:
    return content[:CONTENT_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
             pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view,
             pa.types.is_fixed_size_binary)  # fmt: skip
    return any(test(kind) for test in tests)


def as_text(column: pa.ChunkedArray, rejects: Rejects, name: str) -> pa.ChunkedArray:
    """UTF-8 text of a column; values of invalid UTF-8 are rejected and become null."""
    if not _is_text(column.type):
        if pa.types.is_floating(column.type):  # 17850.0 written by a table that had missing ids means 17850
            column = column.cast(pa.float64())
            column = pc.if_else(pc.is_nan(column), None, column)
            whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**53))
            return pc.if_else(
                whole, pc.if_else(whole, column, 0.0).cast(pa.int64()).cast(pa.string()), column.cast(pa.string())
            )
        if pa.types.is_decimal(column.type):  # 5.00 means 5 here too
            short = pc.replace_substring_regex(column.cast(pa.string()), r"(\.\d*?)0+$", r"\1")
            return pc.replace_substring_regex(short, r"\.$", "")
        return column.cast(pa.string())
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        values: list[str | None] = []
        bad = np.zeros(len(column), bool)
        for position, value in enumerate(column.cast(pa.binary()).to_pylist()):
            try:
                values.append(None if value is None else value.decode("utf-8"))
            except UnicodeDecodeError:
                values.append(None)
                bad[position] = True
        rejects.add(bad, f"invalid UTF-8 in {name}")
        return pa.chunked_array([pa.array(values, pa.string())])


def is_missing(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Boolean column: no id at all, white space, or the ways in which programs write a missing value."""
    return pc.or_(pc.is_null(ids), pc.is_in(pc.utf8_trim_whitespace(ids), MISSING_IDS))  # is_in says no to a null


def to_numbers(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """float64 of decimal text; null where it is no finite number."""
    fits = pc.fill_null(pc.match_substring_regex(text, NUMBER), False)
    numbers = pc.utf8_trim_whitespace(pc.if_else(fits, text, None)).cast(pa.float64())
    return pc.if_else(pc.fill_null(pc.is_finite(numbers), False), numbers, None)


def to_milliseconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """int64 milliseconds of epoch seconds, epoch milliseconds or ISO-8601 text; null where it is none of these.

    A number of magnitude 10^11 or more is milliseconds (10^11 seconds is the year 5138). ISO times without a zone are
    UTC.
    """
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return _in_range(column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64()))
    if _is_text(column.type):
        column = column.cast(pa.string())
        numbers = to_numbers(column)
        times = pc.if_else(pc.is_null(numbers), column, None)
        if times.null_count < len(times):
            return _in_range(pc.coalesce(_scale(numbers), _iso_milliseconds(times)))
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        numbers = column.cast(pa.float64(), safe=False)
        numbers = pc.if_else(pc.fill_null(pc.is_finite(numbers), False), numbers, None)
    else:
        return pa.chunked_array([pa.nulls(len(column), pa.int64())])
    return _in_range(_scale(numbers))


def _scale(numbers: pa.ChunkedArray) -> pa.ChunkedArray:
    is_seconds = pc.less(pc.abs(numbers), 1e11)
    milliseconds = pc.if_else(is_seconds, pc.multiply(numbers, 1000.0), numbers)
    sane = pc.if_else(pc.less(pc.abs(milliseconds), 1e15), milliseconds, None)
    return pc.floor(pc.round(sane, 2)).cast(pa.int64())  # 1600000000.003 s is 1600000000002.9998 ms in floating point


def _in_range(milliseconds: pa.ChunkedArray) -> pa.ChunkedArray:
    inside = pc.and_(pc.greater_equal(milliseconds, EARLIEST_MS), pc.less(milliseconds, LATEST_MS))
    return pc.if_else(pc.fill_null(inside, False), milliseconds, None)


def _iso_milliseconds(text: pa.ChunkedArray) -> pa.ChunkedArray:
    text = pc.utf8_trim_whitespace(text)
    zoned = pc.fill_null(pc.match_substring_regex(text, ISO + r"(Z|[+-]\d{2}(:?\d{2})?)$"), False)
    plain = pc.fill_null(pc.match_substring_regex(text, ISO + "$"), False)
    utc = _cast_each(pc.if_else(zoned, text, None), pa.timestamp("ns", "UTC"))
    local = _cast_each(pc.if_else(plain, text, None), pa.timestamp("ns"))
    return pc.coalesce(utc, local)


def _cast_each(text: pa.ChunkedArray, kind: pa.TimestampType) -> pa.ChunkedArray:
    """Milliseconds of text of the right shape; null for dates that do not exist, such as February 30."""

    try:
        return text.cast(kind).cast(pa.timestamp("ms", kind.tz), safe=False).cast(pa.int64())
    except pa.ArrowInvalid:
        if len(text) == 1:
            return pa.chunked_array([pa.nulls(1, pa.int64())])
        half = len(text) // 2  # halves until the impossible dates are alone: few of them cost little
        return pa.chunked_array(
            [*_cast_each(text[:half], kind).chunks, *_cast_each(text[half:], kind).chunks], pa.int64()
        )


def test_rule(rule: ColumnRule, text: dict[str, pa.ChunkedArray]) -> pa.ChunkedArray:
    """Boolean column: which rows pass. A missing value, or text where a number is asked for, does not."""
    column = text[column_name(rule.column)]
    if rule.matches is not None:
        return pc.fill_null(pc.match_substring_regex(column, rule.matches), False)
    numbers = to_numbers(column)
    passed = pc.greater(numbers, rule.above) if rule.above is not None else pc.less(numbers, rule.below)
    return pc.fill_null(passed, False)


def describe_rule(rule: ColumnRule) -> str:
    if rule.matches is not None:
        return f"{rule.column} does not match {rule.matches}"
    return (
        f"{rule.column} is not above {rule.above:g}"
        if rule.above is not None
        else f"{rule.column} is not below {rule.below:g}"
    )


def _actions(source: EventSource, text: dict[str, pa.ChunkedArray], rows: int) -> pa.ChunkedArray | pa.Array:
    """The action of each row: its column, else the first rule that fits, else the source's constant."""
    if source.columns.action is not None:
        given = text[column_name(source.columns.action)]
        actions = pc.if_else(pc.or_(is_missing(given), pc.equal(given, UNKNOWN_ACTION)), None, given)
    else:
        actions = pa.array([source.action or "interaction"] * rows, pa.string())
    for rule in reversed(source.action_rules):
        actions = pc.if_else(test_rule(rule, text), rule.action, actions)
    return actions


def _buckets(user: pa.ChunkedArray, partitions: int, file: int) -> pa.Array:
    """Hash partition of each user, the same on every machine; rejects go with their file."""
    encoded = user.combine_chunks().dictionary_encode()
    hashes = [zlib.crc32(value.encode()) % partitions for value in encoded.dictionary.to_pylist()]
    table = np.array([*hashes, file % partitions], np.int32)
    return pa.array(table[encoded.indices.fill_null(len(hashes)).to_numpy(zero_copy_only=False)])


def content_of(text: dict[str, pa.ChunkedArray], bad: np.ndarray) -> pa.Array:
    """The wanted columns of rejected rows, as one line for a person to read."""
    joined = pc.binary_join_element_wise(*[pc.fill_null(c, "") for c in text.values()], "\t")
    short = pc.utf8_slice_codeunits(joined, 0, CONTENT_CHARACTERS)
    return pc.if_else(pa.array(bad), short, None)


def _where(good: np.ndarray, column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    return column if good.all() else pc.if_else(pa.array(good), column, None)
