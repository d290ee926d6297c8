"""The `recommend` stage: the top K for every user of the log, over the whole catalogue, in a Ray Data actor pool."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from springtide.bundle import load_bundle
from springtide.cluster import READ_CPUS, connect
from springtide.config import RecommendConfig, Settings
from springtide.data.prepared import load_prepared
from springtide.errors import SpringtideError
from springtide.files import publish_directory
from springtide.model.batch import History, after_all
from springtide.model.carry import rows_in
from springtide.ranks import block_size
from springtide.schemas import RECOMMENDATIONS, check_schema

log = logging.getLogger(__name__)


class RecommendBatch:
    """One actor of the pool: a loaded bundle that ranks blocks of SEQUENCES."""

    def __init__(
        self, bundle: str, config: RecommendConfig, exclude_seen: bool, actions: list[str] | None = None
    ) -> None:
        """actions: names of the sequences' action numbers; absent: those that the bundle was trained on."""
        import torch

        torch.set_num_threads(max(1, int(config.cpus_per_actor)))
        self.recommender = load_bundle(bundle).recommender
        known = self.recommender.actions
        # Those of the bundle's numbers, 0 = unknown to it: a log that has grown may number its actions anew.
        self.actions = np.maximum(rows_in(known, known if actions is None else actions), 0)
        self.k, self.exclude_seen = config.k, exclude_seen

    def __call__(self, batch: pa.Table) -> pa.Table:
        step = block_size(len(batch), len(self.recommender.item_ids))
        return pa.concat_tables([self._rank(batch.slice(start, step)) for start in range(0, max(1, len(batch)), step)])

    def _rank(self, batch: pa.Table) -> pa.Table:
        histories = [replace(history, actions=self.actions[history.actions]) for history in histories_of(batch)]
        seen = [history.items for history in histories] if self.exclude_seen else None
        # Asked for now, as over HTTP: at the end of the log, and not when each user was last there.
        now = after_all(histories, self.recommender.log_end or 0)
        rows, values = self.recommender.best(histories, self.k, seen, now)
        found = rows >= 0
        ids = np.array(self.recommender.item_ids, dtype=object)
        return pa.table(
            {
                "user_id": pa.array(
                    np.repeat(batch["user_id"].to_numpy(zero_copy_only=False), found.sum(1)), pa.string()
                ),
                "item_id": pa.array(ids[rows[found]], pa.string()),
                "rank": pa.array((np.cumsum(found, 1)[found]).astype(np.int32)),
                "score": pa.array(values[found].astype(np.float32)),
            },
            schema=RECOMMENDATIONS,
        )


def histories_of(table: pa.Table) -> list[History]:
    """The whole history of each row of a SEQUENCES table."""
    columns = {name: table[name].to_pylist() for name in ("items", "actions", "ratings", "timestamps")}
    return [
        History(
            np.array(items, np.int64),
            np.array(actions, np.int64),
            np.array(ratings, np.float32),
            np.array(times, np.int64),
        )
        for items, actions, ratings, times in zip(*columns.values(), strict=True)
    ]


def run(settings: Settings) -> dict[str, Any]:
    """Write `<workspace>/recommendations/` (schemas.RECOMMENDATIONS). Returns the body of results/recommend.json.

    Every event of the log is history: these are recommendations for now, not a test. Raises SpringtideError if the
    workspace has no prepared log or bundle, or if they do not belong together.
    """
    prepared = load_prepared(settings.workspace)
    path = Path(settings.workspace) / "bundle"
    bundle = load_bundle(path)
    if bundle.recommender.item_ids != prepared.items["item_id"].to_pylist():
        raise SpringtideError(
            f"the bundle {path} was trained on another catalogue than {prepared.path}; run the train job again"
        )
    connect()
    import ray

    config = settings.recommend
    produced = (
        ray.data.read_parquet([str(file) for file in prepared.sequence_files], num_cpus=READ_CPUS)
        .map_batches(
            RecommendBatch,
            fn_constructor_args=(str(path), config, settings.data.exclude_seen, prepared.actions),
            batch_size=config.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=config.actors),
            num_cpus=config.cpus_per_actor,
        )
        .iter_batches(batch_size=None, batch_format="pyarrow")
    )
    final = Path(settings.workspace) / "recommendations"
    users = rows = 0
    with publish_directory(final) as out:
        for number, block in enumerate(produced):
            if len(block):
                table = check_schema(block.cast(RECOMMENDATIONS), RECOMMENDATIONS, "recommendations")
                pq.write_table(table, out / f"part-{number:05d}.parquet")
                users, rows = users + len(table["user_id"].unique()), rows + len(table)
    log.info("%d users, %d recommendations", users, rows)
    return {"recommendations": str(final), "users": users, "rows": rows, "bundle": bundle.version}
