"""Where raw logs lie: folders and files, local or remote, expanded into a stable list of readable files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from springtide.config_data import FileFormat
from springtide.errors import SpringtideError

SUFFIXES: dict[str, FileFormat] = {
    ".csv": "csv", ".tsv": "tsv", ".inter": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
# What people put beside their logs to say what these are.
ABOUT_LOGS = (".md", ".rst", ".html", ".pdf", ".xml", ".yaml", ".yml", ".ini", ".py", ".sql", ".sh")


@dataclass(frozen=True)
class SourceFile:
    """One raw file. `index` orders files within a job: sources as configured, then by path."""

    index: int
    source: int  # position in data.events
    path: str  # as the filesystem knows it
    uri: str  # what opens it again in any process: an absolute local path or a URI
    format: FileFormat
    compression: Literal["gzip", "zstd", "bz2"] | None
    bytes: int


def list_files(
    paths: list[str], format: FileFormat | None, source: int, first_index: int
) -> tuple[list[SourceFile], list[str]]:
    """Expand files and folders (recursively), sorted by path. Returns the files, and the paths of those not taken.

    Of a folder all files are taken whose names tell a format, or, if `format` is given, all but documents (ABOUT_LOGS)
    and those of another format; hidden ones (. or _ first) never, which are no logs but what programs put beside them.
    Raises SpringtideError for a path that does not exist, a folder without data files or a name that tells no format.
    """
    found: list[SourceFile] = []
    skipped: list[str] = []
    for given in paths:
        path = given if "://" in given else os.path.expanduser(given)
        infos, inner = _look(path)
        before = len(found)
        for entry in infos:
            guessed, compression = guess_format(entry.base_name)
            chosen = format or guessed
            document = PurePosixPath(entry.path).suffix.lower() in ABOUT_LOGS or chosen != (guessed or chosen)
            if chosen is None or (document and entry.path != inner):
                skipped.append(entry.path)
                continue
            uri = _address(path, inner, entry.path)
            found.append(SourceFile(first_index + len(found), source, entry.path, uri, chosen, compression, entry.size))
        if len(found) == before:
            if [entry.path for entry in infos] == [inner]:
                raise SpringtideError(
                    f"cannot tell the format of {path} by its name; set format: csv, tsv, jsonl or parquet"
                )
            raise SpringtideError(
                f"the folder {path} holds no csv, tsv, jsonl or parquet file"
                + (f", but {skipped[-1]}: set format, if that is a log" if infos else "; correct the data paths")
            )
    return found, skipped


def _look(path: str) -> tuple[list[fs.FileInfo], str]:
    """The files that a path names, and its place in its filesystem. Raises SpringtideError if there is none."""
    filesystem, inner = open_filesystem(path)
    try:
        info = filesystem.get_file_info(inner)
    except OSError as error:
        raise SpringtideError(f"cannot look at {path}: {_short(error)}; check the path and your access to it") from None
    if info.type == fs.FileType.NotFound:
        raise SpringtideError(f"there is no file or folder {path}; correct the data paths in the settings")
    if info.type != fs.FileType.Directory:
        return [info], inner
    below = filesystem.get_file_info(fs.FileSelector(inner, recursive=True))
    files = [i for i in below if i.type == fs.FileType.File and not _is_hidden(i.path[len(inner) :])]
    return sorted(files, key=lambda i: i.path), inner


def _is_hidden(inside: str) -> bool:
    return any(part.startswith((".", "_")) for part in PurePosixPath(inside).parts)


def _address(given: str, inner: str, path: str) -> str:
    """What opens `path`, found below the path or URI that the user gave, whose place in its filesystem is `inner`."""
    if "://" not in given:
        return str(Path(path).absolute())
    head, mark, query = given.partition("?")
    base = unquote(head).rstrip("/").removesuffix(inner.rstrip("/"))
    return base + quote(path) + mark + query


def guess_format(name: str) -> tuple[FileFormat | None, Literal["gzip", "zstd", "bz2"] | None]:
    """Format and compression by file name; None where the name does not tell."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    packing: dict[str, Literal["gzip", "zstd", "bz2"]] = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
    compression = packing.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes = suffixes[:-1]
    return (SUFFIXES.get(suffixes[-1]) if suffixes else None), compression


def open_filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a local path or URI and the path inside it. Raises SpringtideError for an unknown scheme."""
    try:
        if "://" in path:
            return fs.FileSystem.from_uri(path)
        return fs.LocalFileSystem(), path.rstrip("/") or "/"
    except (pa.ArrowInvalid, OSError) as error:
        raise SpringtideError(f"cannot open {path}: {_short(error)}; check the address") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
