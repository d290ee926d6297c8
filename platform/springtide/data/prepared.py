"""Reading what `prepare` wrote."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from springtide.config_data import DataConfig
from springtide.errors import SpringtideError
from springtide.schemas import ITEMS, SEQUENCES, check_schema

log = logging.getLogger(__name__)
# Settings of the section data that decide which events are learned from and which tested.
OF_THE_SPLIT = ("split", "target_actions", "min_user_events", "min_item_events", "deduplicate")
WHERE = ("paths", "format")  # of a source: the same events may have moved


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


def load_prepared(workspace: str | Path, config: DataConfig | None = None) -> Prepared:
    """The prepared log of a workspace. config: what the settings say of it now.

    Raises SpringtideError if there is none, if it is not whole, or if it was split or filtered by other settings.
    """
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
    prepared = Prepared(path, manifest["content_hash"])
    if config is not None:
        _check_settings(prepared, config)
    return prepared


def _check_settings(prepared: Prepared, config: DataConfig) -> None:
    """Refuse what the prepared log contradicts, as nobody could say afterwards what was learned from and tested."""
    then, now = prepared.report.get("settings", {}), config.model_dump(mode="json")
    for name in OF_THE_SPLIT:
        if name in then and _unordered(then[name]) != _unordered(now[name]):
            raise SpringtideError(
                f"data.{name} is {now[name]!r} in the settings, but the log {prepared.path} was prepared with "
                f"{then[name]!r}; run the prepare job again, or set it back"
            )
    if "events" in then and _read_as(then["events"]) != _read_as(now["events"]):
        raise SpringtideError(
            f"data.events reads other columns, or by other rules, than when the log {prepared.path} was prepared; run "
            "the prepare job again, or set it back"
        )
    changed = [f"data.{name}" for name in ("events", "items") if name in then and then[name] != now[name]]
    if changed:
        log.warning(
            "the log %s was prepared with another %s than the settings have now; run the prepare job again if what is "
            "read has changed", prepared.path, " and ".join(changed),
        )  # fmt: skip


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _read_as(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in source.items() if name not in WHERE} for source in sources]


def _read(folder: Path, schema: pa.Schema) -> pa.Table:
    tables = [check_schema(pq.ParquetFile(path).read(), schema, str(path)) for path in sorted(folder.glob("*.parquet"))]
    return pa.concat_tables(tables) if tables else schema.empty_table()
