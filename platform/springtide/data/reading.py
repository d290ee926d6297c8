"""Groups of files to cleaned rows, with what was found out about each file: one task of `prepare` reads one group.

What is known of a file travels as a row of it with number 0 (rows count from 1), because Ray Data moves rows only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from springtide.config_data import Column, EventSource
from springtide.data.clean import CLEANED, clean_chunk
from springtide.data.readers import column_name, read_chunks
from springtide.data.sources import SourceFile
from springtide.errors import SpringtideError

GROUP_BYTES = 32 << 20  # small files share a task up to this much
REFUSED = "refused"  # the reason of a note whose content is the sentence about a file that cannot be read
READ = "read"  # of one whose content tells which optional columns a file with rows lacks
LOOKS = 20  # files of a source that are looked into before Ray starts


def event_columns(source: EventSource) -> tuple[list[Column], list[Column]]:
    """Every source column that an event source reads, each once, and those of them that a file may lack."""
    columns = source.columns
    needed = [columns.user_id, columns.item_id, *([] if columns.timestamp is None else [columns.timestamp])]
    named = [columns.action, columns.rating, *(rule.column for rule in [*source.action_rules, *source.keep])]
    optional = list(dict.fromkeys(column for column in named if column is not None and column not in needed))
    return list(dict.fromkeys([*needed, *optional])), optional


def look_into(files: list[SourceFile], sources: list[EventSource]) -> None:
    """Read the start of the first files, so that a wrong column is told at once, before Ray has started."""
    for position, source in enumerate(sources):
        mine = [file for file in files if file.source == position]
        columns, optional = event_columns(source)
        notes = []
        for file in mine[:LOOKS]:
            chunk = next(read_chunks(file, columns, optional), None)
            if chunk is None or file.format == "jsonl":  # later lines of it may have what these lack
                break
            notes.append(chunk.lacking)
            if not chunk.lacking:
                break
        if len(notes) == len(mine):
            check_lacking(notes)


def group_files(files: list[SourceFile]) -> list[list[int]]:
    """Indices of the files that each task reads."""
    groups: list[list[int]] = []
    size = 0
    for file in files:
        if not groups or size + file.bytes > GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file.index)
        size += file.bytes
    return groups


def read_group(
    batch: pa.Table, files: list[SourceFile], sources: list[EventSource], partitions: int
) -> Iterator[pa.Table]:
    """The cleaned rows (CLEANED) of a group of files, and a note about each."""
    yield CLEANED.empty_table()
    for index in batch["group"].to_pylist()[0]:
        file = files[index]
        source = sources[file.source]
        columns, optional = event_columns(source)
        lacking: dict[str, str] | None = None
        try:
            for chunk in read_chunks(file, columns, optional):
                yield clean_chunk(chunk, source, file.index, partitions)
                if len(chunk.table):
                    lacking = chunk.lacking
        except SpringtideError as error:  # as a row, because Ray wraps an exception in pages of its own
            yield _note(index, REFUSED, str(error), partitions)
            continue
        if lacking is not None:
            missing = {name: lacking[name] for name in map(column_name, optional) if name in lacking}
            yield _note(index, READ, json.dumps(missing), partitions)


def _note(file: int, kind: str, content: str, partitions: int) -> pa.Table:
    row: dict[str, Any] = {"file": file, "row": 0, "bucket": file % partitions, "reason": kind, "content": content}
    return pa.Table.from_pylist([row], schema=CLEANED)


def look_through(table: pa.Table) -> tuple[list[int], list[tuple[int, str, str]]]:
    """The hash buckets in a partition, and the notes in it: (file, kind, content)."""
    is_note = pc.equal(table["row"], 0)
    notes = table.filter(is_note).select(["file", "reason", "content"]).to_pylist()
    buckets = table.filter(pc.invert(is_note))["bucket"].unique().to_pylist()
    return sorted(buckets), [(note["file"], note["reason"], note["content"]) for note in notes]


def check_notes(notes: list[tuple[int, str, str]], files: list[SourceFile], sources: list[EventSource]) -> None:
    """Raise SpringtideError if a file could not be read, or no file of a source has a column that is wanted of it."""
    notes = sorted(notes)
    refused = [content for _, kind, content in notes if kind == REFUSED]
    if refused:
        raise SpringtideError(refused[0])
    for position in range(len(sources)):
        check_lacking(json.loads(content) for file, _, content in notes if files[file].source == position)


def check_lacking(files: Iterable[dict[str, str]]) -> None:
    """Raise SpringtideError if none of a source's files, each told by what it lacks, has some column."""
    found = list(files)
    for name, sentence in (found[0] if found else {}).items():
        if all(name in lacking for lacking in found):
            raise SpringtideError(sentence + (f" (nor have the other {len(found) - 1})" if len(found) > 1 else ""))
