"""Users' first histories: the prepared log of a workspace as rows of the event log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from springtide.serving.store import HistoryStore
from springtide.serving.store_rows import SeedRow

log = logging.getLogger("springtide.serving")
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 60.0
FAILED = "the prepared log could not be imported yet; the log of this Ingress says why"  # on /readyz, which is open


def seed_histories(store: HistoryStore, workspace: Path) -> int:
    """Import `prepared/` of the workspace into the store once per content of the log; returns the rows imported.

    Raises SpringtideError if there is no prepared log or the store refuses.
    """
    from springtide.data.prepared import load_prepared

    prepared = load_prepared(workspace)
    item_ids = prepared.items["item_id"].combine_chunks()
    actions = pa.array([None, *prepared.actions[1:]], pa.string())  # action 0 is "unknown"
    return store.seed(prepared.content_hash, _rows(prepared.sequences(), item_ids, actions))


def seed_until_done(
    store: HistoryStore,
    workspace: Path,
    tell: Callable[[str], None],
    wanted: Callable[[], bool],
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Import the prepared log, again and again while that fails, ever more seldom, for as long as it is `wanted`.

    tell: takes "ok", or FAILED while it is not done; the reason goes to the log alone.
    """
    pause_s = FIRST_PAUSE_S
    while wanted():
        try:
            rows = seed_histories(store, workspace)
        except Exception as error:  # whatever it is: without the log every history would stay incomplete
            log.error("the prepared log was not imported, next try in %.0f s: %r", pause_s, error)
            tell(FAILED)
            wait(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)
        else:
            log.info("imported %d events of the prepared log", rows)
            if wanted():
                tell("ok")
            return


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
