"""The item catalogue: raw item rows to one title, category list and text per item."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from springtide.config_data import Column, ItemSource
from springtide.data.clean import (
    MAX_ID_BYTES,
    Rejects,
    as_text,
    content_of,
    describe_rule,
    is_missing,
    printable,
    test_rule,
)
from springtide.data.readers import column_name, read_chunks
from springtide.data.reading import check_lacking
from springtide.data.sources import SourceFile

FIELD = re.compile(r"\{([^{}]+)\}")
TITLE_CHARACTERS = 1_000
TEXT_CHARACTERS = 20_000  # an encoder reads at most 512 tokens; a page of 10 MB would only hold it up


@dataclass(frozen=True)
class RawItems:
    """Described items, and what became of every row."""

    items: pl.DataFrame  # item_id, title, categories (list), text; one row per item
    quarantine: pa.Table  # file, row, reason, content
    files: list[dict[str, object]]  # per file: path, rows, kept, deduplicated, quarantined


def read_items(source: ItemSource, files: list[SourceFile]) -> RawItems:
    """Read the catalogue. An item described in several ways keeps its most frequent description, ties by first row.

    Raises SpringtideError as read_chunks does, or if no file has a column that is wanted.
    """
    columns = _wanted(source)
    optional = [column for column in columns if column != source.columns.item_id]
    frames: list[pl.DataFrame] = []
    rejected: list[pl.DataFrame] = []
    lacking: dict[int, dict[str, str]] = {}  # by file that has rows
    for file in files:
        for chunk in read_chunks(file, columns, optional, source.category_separator):
            if len(chunk.table):
                lacking[file.index] = chunk.lacking
            good, bad = _clean(chunk.table, chunk.rows, source, file.path)
            frames.append(good)
            rejected.append(bad)
            for row, reason, content in chunk.bad_rows:
                malformed = {
                    "file": [file.path],
                    "row": [row],
                    "reason": [f"malformed row: {reason}"],
                    "content": [printable(content)],
                }
                rejected.append(pl.DataFrame(malformed, schema=QUARANTINE_COLUMNS))
    check_lacking(lacking.values())
    rows = pl.concat(frames) if frames else pl.DataFrame(schema=dict.fromkeys(ROW_COLUMNS, pl.String))
    kept = (
        rows.with_row_index("order")
        .group_by("item_id", "title", "categories", "text", maintain_order=True)
        .agg(pl.len().alias("times"), pl.first("order"), pl.first("file"))
        .with_columns(described=(pl.col("title") != "") | (pl.col("text") != ""))
        .sort(["described", "times", "order"], descending=[True, True, False])
        .unique("item_id", keep="first", maintain_order=True)
        .sort("order")
    )
    quarantine = pl.concat(rejected) if rejected else pl.DataFrame(schema=QUARANTINE_COLUMNS)
    total, good_of, bad_of = rows["file"].value_counts(), kept["file"].value_counts(), quarantine["file"].value_counts()
    counts = [dict(frame.iter_rows()) for frame in (total, good_of, bad_of)]
    report: list[dict[str, object]] = [
        {
            "path": file.path,
            "rows": counts[0].get(file.path, 0) + counts[2].get(file.path, 0),
            "kept": counts[1].get(file.path, 0),
            "deduplicated": counts[0].get(file.path, 0) - counts[1].get(file.path, 0),
            "quarantined": counts[2].get(file.path, 0),
        }
        for file in files
    ]
    separator = pl.col("categories").str.split(source.category_separator)
    cleaned = separator.list.eval(pl.element().str.strip_chars()).list.eval(pl.element().filter(pl.element() != ""))
    items = kept.with_columns(categories=cleaned).select("item_id", "title", "categories", "text")
    return RawItems(items, quarantine.to_arrow(), report)


ROW_COLUMNS = ("item_id", "title", "categories", "text", "file")
QUARANTINE_COLUMNS = {"file": pl.String, "row": pl.Int64, "reason": pl.String, "content": pl.String}


def _wanted(source: ItemSource) -> list[Column]:
    """Every source column that the catalogue reads, each once."""
    named = [source.columns.item_id, source.columns.title, source.columns.categories]
    columns = [column for column in named if column is not None] + [rule.column for rule in source.keep]
    if source.text and len(source.text) == 1 and FIELD.search(source.text[0]):
        columns += [_as_column(name, source) for name in FIELD.findall(source.text[0])]
    else:
        columns += [_as_column(name, source) for name in source.text or []]
    return list(dict.fromkeys(columns))


def _as_column(name: str, source: ItemSource) -> Column:
    """A column of `text`: a position if the other columns are given by position."""
    return int(name) if isinstance(source.columns.item_id, int) and name.isdigit() else name


def _clean(table: pa.Table, rows: pa.Array, source: ItemSource, path: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    rejects = Rejects(len(table))
    text = {name: as_text(table[name], rejects, name) for name in table.column_names}
    ids = pc.utf8_trim_whitespace(text[column_name(source.columns.item_id)])
    for rule in source.keep:
        rejects.add(pc.invert(test_rule(rule, text)), f"filtered: {describe_rule(rule)}")
    rejects.add(is_missing(ids), "no item_id")
    rejects.add(pc.greater(pc.fill_null(pc.binary_length(ids), 0), MAX_ID_BYTES), f"item_id above {MAX_ID_BYTES} bytes")

    def column(of: Column | None) -> pa.ChunkedArray | pa.Array:
        return pa.array([""] * len(table), pa.string()) if of is None else _tidy(text[column_name(of)])

    title, categories = column(source.columns.title), column(source.columns.categories)
    if source.text is None:
        joined = _join([title, _tidy(pc.replace_substring(categories, source.category_separator, " "))])
    elif len(source.text) == 1 and FIELD.search(source.text[0]):
        joined = _fill(source, text, len(table))
    else:
        joined = _join([column(_as_column(name, source)) for name in source.text])
    title = pc.utf8_slice_codeunits(title, 0, TITLE_CHARACTERS)
    joined = pc.utf8_slice_codeunits(joined, 0, TEXT_CHARACTERS)
    good = ~rejects.bad
    frame = pl.DataFrame(
        {
            "item_id": pl.Series(ids),
            "title": pl.Series(title),
            "categories": pl.Series(categories),
            "text": pl.Series(joined),
        }
    ).with_columns(file=pl.lit(path))
    bad = pl.DataFrame(
        {
            "file": [path] * int((~good).sum()),
            "row": rows.to_numpy()[~good],
            "reason": [str(reason) for reason in rejects.reason[~good]],
            "content": content_of(text, ~good).filter(pa.array(~good)).to_pylist() if not good.all() else [],
        },
        schema=QUARANTINE_COLUMNS,
    )
    return frame.filter(pl.Series(good)), bad


def _tidy(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Null to "", white space folded."""
    folded = pc.replace_substring_regex(pc.fill_null(column, ""), r"\s+", " ")
    return pc.utf8_trim_whitespace(folded)


def _join(columns: list[pa.ChunkedArray | pa.Array]) -> pa.ChunkedArray | pa.Array:
    """Columns joined by ". ", empty ones left out."""
    blanked = [pc.if_else(pc.equal(column, ""), None, column) for column in columns]
    # The closing "" is there because Arrow drops a row in which every column is null.
    closed = pc.binary_join_element_wise(*blanked, "", ". ", null_handling="skip")
    return pc.utf8_slice_codeunits(closed, 0, -2)


def _fill(source: ItemSource, text: dict[str, pa.ChunkedArray], rows: int) -> pa.ChunkedArray | pa.Array:
    """A template such as "{title} by {author}"; a row in which every field is empty has no text."""
    pieces: list[pa.ChunkedArray | pa.Array] = []
    blank = pa.array(np.ones(rows, bool))
    assert source.text is not None
    for position, piece in enumerate(FIELD.split(source.text[0])):
        if position % 2:
            values = _tidy(text[column_name(_as_column(piece, source))])
            blank = pc.and_(blank, pc.equal(values, ""))
            pieces.append(values)
        else:
            pieces.append(pa.array([piece] * rows, pa.string()))
    return pc.if_else(blank, "", pc.binary_join_element_wise(*pieces, ""))
