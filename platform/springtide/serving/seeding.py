"""Users' first histories: the prepared log of a workspace as rows of the event log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from springtide.serving.store import HistoryStore
from springtide.serving.store_rows import SeedRow


def seed_histories(store: HistoryStore, workspace: Path) -> int:
    """Import `prepared/` of the workspace into the store once per content of the log; returns the rows imported.

    Raises SpringtideError if there is no prepared log or the store refuses.
    """
    from springtide.data.prepared import load_prepared

    prepared = load_prepared(workspace)
    item_ids = prepared.items["item_id"].combine_chunks()
    actions = pa.array([None, *prepared.actions[1:]], pa.string())  # action 0 is "unknown"
    return store.seed(prepared.content_hash, _rows(prepared.sequences(), item_ids, actions))


def _rows(sequences: pa.Table, item_ids: pa.Array, actions: pa.Array) -> Iterator[SeedRow]:
    for batch in sequences.to_batches(max_chunksize=2048):
        owners = pc.list_parent_indices(batch["items"])
        ratings = pc.list_flatten(batch["ratings"])
        columns = (
            batch["user_id"].take(owners),
            item_ids.take(pc.list_flatten(batch["items"])),
            pc.list_flatten(batch["timestamps"]),
            actions.take(pc.list_flatten(batch["actions"])),
            pc.if_else(pc.is_finite(ratings), ratings, None),
        )
        yield from zip(*(column.to_pylist() for column in columns), strict=True)
