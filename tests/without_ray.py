"""The whole `prepare` stage in this process: the three calls of Ray that it makes are played by plain functions."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import polars as pl
import pyarrow as pa

from springtide.config import DataConfig, Settings, parse_settings
from springtide.data import prepare, reading
from springtide.data.partitions import order_and_deduplicate
from springtide.data.sources import SourceFile

TABLES = ("events", "items", "sequences", "quarantine")


def _shuffle(files: list[SourceFile], config: DataConfig) -> list[tuple[pa.Table, int]]:
    groups = [pa.table({"group": [group]}) for group in reading.group_files(files)]
    chunks = [chunk for some in groups for chunk in reading.read_group(some, files, config.events, config.partitions)]
    table = pa.concat_tables(reversed(chunks))  # the order of arrival must not matter
    buckets, notes = reading.look_through(table)
    reading.check_notes(notes, files, config.events)
    parts = [table.filter(pa.compute.equal(table["bucket"], bucket)) for bucket in buckets]
    return [(order_and_deduplicate(part, config), bucket) for part, bucket in zip(parts, buckets, strict=True)]


def prepare_without_ray(settings: Settings) -> dict[str, Any]:
    """prepare.run(settings)."""
    ray = SimpleNamespace(get=lambda found: found, put=lambda value: value)
    ray.remote = lambda **_: lambda function: SimpleNamespace(remote=function)
    with (
        patch.dict(sys.modules, {"ray": ray}),
        patch.object(prepare, "connect"),
        patch.object(prepare, "_shuffle", _shuffle),
    ):
        return prepare.run(settings)


def settings_for(workspace: Path, events: Any, **data: Any) -> Settings:
    """Settings with `data.events` and other settings of the section `data`."""
    return parse_settings({"workspace": str(workspace), "data": {"events": events, "partitions": 3, **data}})


def read_table(workspace: Path, table: str) -> pl.DataFrame:
    """One table of the prepared log, all files together."""
    assert table in TABLES
    paths = sorted((workspace / "prepared" / table).glob("*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in paths]) if paths else pl.DataFrame()


def read_report(workspace: Path) -> dict[str, Any]:
    """report.json, after checking that every count in it reconciles with the tables."""
    import json

    report: dict[str, Any] = json.loads((workspace / "prepared" / "report.json").read_text(encoding="utf-8"))
    events, quarantine = read_table(workspace, "events"), read_table(workspace, "quarantine")
    for entry in [report["totals"], *report["files"], *report["item_files"]]:
        assert entry["rows"] == entry["kept"] + entry["quarantined"] + entry["deduplicated"]
    for name in ("rows", "kept", "quarantined", "deduplicated"):
        assert report["totals"][name] == sum(entry[name] for entry in report["files"])
    for index, entry in enumerate(report["files"]):
        assert entry["kept"] == (events["file"] == index).sum()
        assert sum(entry["reasons"].values()) == entry["quarantined"]
    by_path = dict(quarantine.group_by("file").len().iter_rows()) if len(quarantine) else {}
    assert sum(by_path.values()) == sum(e["quarantined"] for e in [*report["files"], *report["item_files"]])
    split = report["split"]
    assert split["train"] + split["valid"] + split["test"] == report["totals"]["kept"]
    return report
