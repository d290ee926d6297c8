"""Reading what `prepare` wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from springtide.errors import SpringtideError
from springtide.schemas import ITEMS, SEQUENCES, check_schema


@dataclass(frozen=True)
class Prepared:
    """One prepared log. Tables are read when asked for."""

    path: Path
    content_hash: str

    @cached_property
    def items(self) -> pa.Table:
        """The catalogue (schemas.ITEMS), row = catalogue row."""
        return _read(self.path / "items", ITEMS)

    @cached_property
    def actions(self) -> list[str]:
        """Action names by number."""
        return list(json.loads((self.path / "vocabulary.json").read_text(encoding="utf-8"))["actions"])

    @cached_property
    def report(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "report.json").read_text(encoding="utf-8")))

    @property
    def sequence_files(self) -> list[Path]:
        return sorted((self.path / "sequences").glob("*.parquet"))

    def sequences(self) -> pa.Table:
        """Every user's history (schemas.SEQUENCES)."""
        return _read(self.path / "sequences", SEQUENCES)


def load_prepared(workspace: str | Path) -> Prepared:
    """The prepared log of a workspace. Raises SpringtideError if there is none or it is not whole."""
    path = Path(workspace).absolute() / "prepared"
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        missing = [name for name in manifest["files"] if not (path / name).is_file()]
    except FileNotFoundError:
        raise SpringtideError(
            f"there is no prepared log at {path}; run the prepare job with the same workspace first"
        ) from None
    except (ValueError, KeyError):
        raise SpringtideError(f"{path / 'manifest.json'} is damaged; run the prepare job again") from None
    if missing:
        raise SpringtideError(f"the prepared log {path} lacks {missing[0]}; run the prepare job again")
    return Prepared(path, manifest["content_hash"])


def _read(folder: Path, schema: pa.Schema) -> pa.Table:
    tables = [check_schema(pq.ParquetFile(path).read(), schema, str(path)) for path in sorted(folder.glob("*.parquet"))]
    return pa.concat_tables(tables) if tables else schema.empty_table()
