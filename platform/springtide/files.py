"""Whole-or-nothing output: directories and files are written beside their final name and renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from springtide.errors import SpringtideError


@contextmanager
def publish_directory(final: Path) -> Iterator[Path]:
    """Yield an empty directory beside `final`; on success it becomes `final`, on any error it is removed.

    A reader never sees a half-written `final`: the old one stays until the new one is whole. A process killed between
    the two renames leaves the old one hidden; the next writer brings it back before it begins.
    Raises SpringtideError if the disk refuses a write.
    """
    token = uuid.uuid4().hex[:8]
    fresh = final.parent / f".{final.name}.new-{token}"
    old = final.parent / f".{final.name}.old-{token}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        hidden = sorted(final.parent.glob(f".{final.name}.old-*"), key=lambda path: path.stat().st_mtime)
        if hidden and not final.exists():
            os.rename(hidden[-1], final)
        fresh.mkdir()
        yield fresh
        if final.exists():
            os.rename(final, old)
        os.rename(fresh, final)
    except OSError as error:
        raise disk_error(error, final) from error
    finally:
        if old.exists() and not final.exists():
            os.rename(old, final)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically (UTF-8, sorted nothing, two-space indent). Raises SpringtideError if the disk refuses."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises SpringtideError if the disk refuses."""
    fresh = path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


def replace_durably(fresh: Path, final: Path) -> None:
    """Rename a file that was just written into place; it is on disk, whole and under that name, when this returns."""
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(fresh, final)
    folder = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)  # or a power cut may take the name back
    finally:
        os.close(folder)


def disk_error(error: OSError, path: Path) -> SpringtideError:
    """The sentence for a refused write."""
    return SpringtideError(f"cannot write {path}: {error.strerror or error}; nothing of it was kept, free the disk or "
                           "choose another workspace, then run again")  # fmt: skip


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write `manifest.json`: the sha256 of every file below `directory`, by relative name, with `extra` beside it."""
    files = {
        str(path.relative_to(directory)): sha256_of(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    manifest = {**(extra or {}), "files": files}
    write_json(directory / "manifest.json", manifest)
    return manifest


def verify_manifest(directory: Path, what: str) -> dict[str, Any]:
    """Check every file against `manifest.json` and return it. Raises SpringtideError naming the file that is wrong."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except FileNotFoundError:
        raise SpringtideError(
            f"there is no {what} at {directory} (no manifest.json); run the job that writes it, with the same workspace"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise SpringtideError(f"{what} {directory}: manifest.json is damaged; write the {what} again") from None
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            raise SpringtideError(f"{what} {directory}: {name} is missing; write the {what} again")
        if sha256_of(path) != expected:
            raise SpringtideError(f"{what} {directory}: {name} differs from its checksum; write the {what} again")
    return manifest
