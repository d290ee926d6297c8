"""A workspace as `prepare` and `embed` would leave it, written without running them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from springtide.files import write_json, write_manifest
from springtide.schemas import SEQUENCES, TEST, TRAIN, VALID, VECTORS
from springtide.text.embed import made_from
from toy import ACTIONS, ITEMS_IN_TOY, toy_items, toy_log, toy_settings

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
    for row in rows.values():
        row["parts"] = [TRAIN] * (len(row["items"]) - 2) + [VALID, TEST]
    table = pa.Table.from_pylist(list(rows.values()), SEQUENCES)
    prepared = folder / "prepared"
    (prepared / "sequences").mkdir(parents=True)
    (prepared / "items").mkdir()
    for number in range(FILES):
        pq.write_table(
            table.take(list(range(number, USERS, FILES))), prepared / "sequences" / f"part-{number:05}.parquet"
        )
    pq.write_table(toy_items(), prepared / "items" / "part-0.parquet")
    write_json(prepared / "vocabulary.json", {"actions": ACTIONS})
    write_json(
        prepared / "report.json",
        {
            "users": USERS,
            "totals": {"kept": 600},
            "split": {"valid": USERS, "cuts_ms": []},
            "catalogue": {"with_text": ITEMS_IN_TOY},
        },
    )
    write_manifest(prepared, {"content_hash": "toy"})
    vectors = np.random.default_rng(0).normal(size=(ITEMS_IN_TOY, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    (folder / "vectors").mkdir()
    said = pa.table(
        {"item_id": toy_items()["item_id"], "vector": pa.array(list(vectors), VECTORS.field("vector").type)}
    )
    pq.write_table(said.cast(VECTORS), folder / "vectors" / "part-00000.parquet")
    write_manifest(folder / "vectors", made_from(toy_items(), toy_settings(folder).text))
    return folder
