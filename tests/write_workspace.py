"""A workspace as `prepare` and `embed` would leave it, written without running them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from springtide.files import write_json, write_manifest
from springtide.schemas import ITEMS, SEQUENCES, TEST, TRAIN, VALID, VECTORS
from springtide.text.embed import made_from
from toy import ACTIONS, DAY_MS, ITEMS_IN_TOY, toy_items, toy_log, toy_settings

FILES, USERS = 4, 40


def write_workspace(folder: Path) -> Path:
    """What `prepare` and `embed` would have left: four files of users, the last two events of each held back."""
    rows: dict[str, dict[str, Any]] = {}
    for event in toy_log(USERS):
        row = rows.setdefault(event["user_id"], {name: [] for name in SEQUENCES.names} | {"user_id": event["user_id"]})
        row["items"].append(int(event["item_id"][1:]))
        row["actions"].append(ACTIONS.index(event["action"]))
        row["ratings"].append(event["rating"])
        row["timestamps"].append(event["timestamp"])
        row["targets"].append(True)
    write_prepared(folder, list(rows.values()), toy_items(), ACTIONS, "toy")
    write_vectors(folder, toy_items())
    return folder


def write_prepared(folder: Path, rows: list[dict[str, Any]], items: pa.Table, actions: list[str], name: str) -> None:
    """Histories (schemas.SEQUENCES without their parts) as `prepare` leaves them; name: hash of their content."""
    rows = [row | {"parts": [TRAIN] * (len(row["items"]) - 2) + [VALID, TEST]} for row in rows]
    prepared = folder / "prepared"
    (prepared / "sequences").mkdir(parents=True)
    (prepared / "items").mkdir()
    for number in range(FILES):
        part = pa.Table.from_pylist(rows[number::FILES], SEQUENCES)
        pq.write_table(part, prepared / "sequences" / f"part-{number:05}.parquet")
    pq.write_table(items, prepared / "items" / "part-0.parquet")
    write_json(prepared / "vocabulary.json", {"actions": actions})
    write_json(
        prepared / "report.json",
        {
            "users": len(rows),
            "totals": {"kept": 600},
            "split": {"valid": len(rows), "cuts_ms": []},
            "catalogue": {"with_text": len(items)},
        },
    )
    write_manifest(prepared, {"content_hash": name})


def write_vectors(folder: Path, items: pa.Table) -> None:
    """Vectors as `embed` leaves them, drawn at random; an item of a given id always has the same one."""
    ids = items["item_id"].to_pylist()
    vectors = np.stack([np.random.default_rng(int(name[1:])).normal(size=32) for name in ids]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    (folder / "vectors").mkdir()
    said = pa.table({"item_id": items["item_id"], "vector": pa.array(list(vectors), VECTORS.field("vector").type)})
    pq.write_table(said.cast(VECTORS), folder / "vectors" / "part-00000.parquet")
    write_manifest(folder / "vectors", made_from(items, toy_settings(folder).text))


def grow_workspace(folder: Path, new_items: int = 2, new_events: int = 3, users: int = 8) -> None:
    """The same log later on: its catalogue in another order and with more items, and one more action.

    So many users have taken the last items of the catalogue, so many times, a day after the last event of all.
    """
    files = sorted((folder / "prepared" / "sequences").iterdir())
    rows = sorted((row for file in files for row in pq.read_table(file).to_pylist()), key=lambda row: row["user_id"])
    actions = [ACTIONS[0], "cart", *ACTIONS[1:]]
    count = ITEMS_IN_TOY + new_items
    items = (
        toy_items(count)
        .take(list(range(count))[::-1])
        .set_column(0, ITEMS.field(0), pa.array(range(count), pa.int32()))
    )
    latest = max(row["timestamps"][-1] for row in rows)
    for number, row in enumerate(rows):
        row["items"] = [count - 1 - item for item in row["items"]]
        row["actions"] = [actions.index(ACTIONS[action]) for action in row["actions"]]
        for event in range(new_events if number < users else 0):
            row["items"].append(event % 2)
            row["actions"].append(1)
            row["ratings"].append(4.0)
            row["timestamps"].append(latest + DAY_MS + event)
            row["targets"].append(True)
    shutil.rmtree(folder / "prepared")
    shutil.rmtree(folder / "vectors")
    write_prepared(folder, rows, items, actions, "grown")
    write_vectors(folder, items)
