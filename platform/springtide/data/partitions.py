"""Inside one hash partition of users: duplicates, k-core, split, sequences. Columns only, no Python per user.

All of a user's rows are in one partition, so only two things need the other partitions: how many events an item has
(k-core) and where the time cuts lie (temporal split). The caller adds those up and hands them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from springtide.config import DataConfig
from springtide.data.doubts import look_at_times
from springtide.schemas import EVENTS, PARTS, QUARANTINE, SEQUENCES, TEST, TRAIN, VALID, check_schema

DUPLICATE = "duplicate"
IS_ROW = pl.col("row") > 0  # and no note about its file, see reading.py
KEPT = pl.col("reason").is_null()


def order_and_deduplicate(table: pa.Table, config: DataConfig) -> pa.Table:
    """Put a partition in (user, time, file, row) order and mark repeated rows with the reason "duplicate".

    Equal timestamps keep the order of the log. table: clean.CLEANED; returns the same columns.
    """
    frame = frame_of(table).sort("user_id", "timestamp", "file", "row")
    same = ["user_id", "item_id", "action"]
    if config.deduplicate == "exact":
        same += ["timestamp", "rating"]
    repeated = KEPT & ~pl.struct(same).is_first_distinct()
    frame = frame.with_columns(reason=pl.when(repeated).then(pl.lit(DUPLICATE)).otherwise("reason"))
    return _arrow(frame, table.schema)


def last_rows(table: pa.Table) -> pa.Table:
    """The number of the last row of each file that is in a partition: (file, row)."""
    return frame_of(table).group_by("file").agg(pl.col("row").max()).to_arrow()


def make_times(table: pa.Table, before: pa.Table) -> pa.Table:
    """Give the rows of a log without times one second each, from 1970 on: bad rows too, so that none need be counted.

    before: (file, before), the rows of all earlier files. table: clean.CLEANED; returns the same columns.
    """
    frame = frame_of(table).join(frame_of(before), on="file", how="left", maintain_order="left")
    seconds = pl.when(pl.col("timestamp").is_not_null()).then(pl.col("before") + pl.col("row"))
    return _arrow(frame.with_columns(timestamp=seconds * 1000), table.schema)


def count_items(table: pa.Table, alive: pa.Table | None, min_user_events: int) -> pa.Table:
    """One k-core pass: events per item among users who keep enough events of the items still alive.

    alive: (item_id), None = all. Returns (item_id, events).
    """
    kept = _core(frame_of(table).lazy().filter(KEPT), alive, min_user_events)
    return kept.group_by("item_id").agg(events=pl.len().cast(pl.Int64)).collect().to_arrow().cast(ITEM_COUNTS)


def count_times(table: pa.Table, alive: pa.Table, config: DataConfig) -> pa.Table:
    """Target events per distinct timestamp: (timestamp, events), for the cuts of a temporal split."""
    kept = _core(frame_of(table).lazy().filter(KEPT), alive, config.min_user_events).filter(_is_target(config))
    return kept.group_by("timestamp").agg(events=pl.len().cast(pl.Int64)).collect().to_arrow()


ITEM_COUNTS = pa.schema([("item_id", pa.string()), ("events", pa.int64())])


@dataclass(frozen=True)
class Written:
    """What one partition wrote."""

    fates: pa.Table  # (file, fate, rows): fate is "kept", "duplicate" or a quarantine reason
    train_events: pa.Table  # (item_id, events) in the training part
    users: int
    parts: dict[str, int]  # events in train, valid, test
    tied: int  # events with the timestamp of the event before
    tied_last: int  # users whose last two events share a timestamp
    actions: dict[str, int]
    times: pl.DataFrame  # see doubts.look_at_times


def write_partition(
    table: pa.Table,
    name: str,
    out: Path,
    config: DataConfig,
    files: list[str],
    catalogue: pa.Table,
    actions: list[str],
    cuts: tuple[int, int] | None,
) -> Written:
    """Apply k-core and split, then write events, sequences and quarantine of one partition.

    catalogue: (item, item_id, alive); actions: vocabulary, position = number; cuts: (valid, test) first milliseconds of
    a temporal split.
    """
    frame = _outside_core(frame_of(table).filter(IS_ROW), catalogue, config)
    events = _split(frame.filter(KEPT), config, cuts)
    sequences = _sequences(events, catalogue, actions)
    for folder, rows, schema in (
        ("events", events.select(EVENTS.names), EVENTS),
        ("sequences", sequences, SEQUENCES),
        ("quarantine", _quarantine(frame, files), QUARANTINE),
    ):
        if len(rows) or folder != "quarantine":
            pq.write_table(check_schema(_arrow(rows, schema), schema, folder), out / folder / f"{name}.parquet")
    fates = frame.group_by("file", fate=pl.col("reason").fill_null("kept")).agg(rows=pl.len().cast(pl.Int64))
    trained = events.filter(pl.col("part") == TRAIN).group_by("item_id").agg(events=pl.len().cast(pl.Int64))
    tied = events.select(
        same=(pl.col("timestamp") == pl.col("timestamp").shift(1).over("user_id")).fill_null(False), user="user_id"
    )
    return Written(
        fates=fates.sort("file", "fate").to_arrow(),
        train_events=trained.to_arrow(),
        users=len(sequences),
        parts={part: int((events["part"] == number).sum()) for part, number in PARTS.items()},
        tied=int(tied["same"].sum()),
        tied_last=int(tied.group_by("user", maintain_order=True).agg(pl.col("same").last())["same"].sum()),
        actions=dict(events.group_by(pl.col("action").fill_null("<unknown>")).agg(pl.len()).sort("action").iter_rows()),
        times=look_at_times(events),
    )


def _outside_core(frame: pl.DataFrame, catalogue: pa.Table, config: DataConfig) -> pl.DataFrame:
    """Give the rows that the k-core filter drops their reason."""
    alive = catalogue.filter(catalogue["alive"]).select(["item_id"])
    core = _core(frame.lazy().filter(KEPT), alive, config.min_user_events).select("file", "row")
    frame = frame.join(core.with_columns(core=True).collect(), on=["file", "row"], how="left", maintain_order="left")
    too_few = (
        f"k-core: user with fewer than {config.min_user_events} or item with fewer than {config.min_item_events} events"
    )
    outside = KEPT & pl.col("core").is_null()
    content = pl.concat_str("user_id", "item_id", "timestamp", separator="\t")
    return frame.with_columns(
        reason=pl.when(outside).then(pl.lit(too_few)).otherwise("reason"),
        content=pl.when(outside).then(content).otherwise("content"),
    )


def _quarantine(frame: pl.DataFrame, files: list[str]) -> pl.DataFrame:
    """The rejected rows with the names of their files; a repeated row is counted, not rejected."""
    paths = pl.DataFrame({"file": range(len(files)), "path": files}, schema={"file": pl.Int32, "path": pl.String})
    rejected = frame.filter(~KEPT & (pl.col("reason") != DUPLICATE)).join(paths, on="file", how="left")
    return rejected.sort("file", "row").select(pl.col("path").alias("file"), "row", "reason", "content")


def _sequences(events: pl.DataFrame, catalogue: pa.Table, actions: list[str]) -> pl.DataFrame:
    """A row per user, items and actions as numbers."""
    rows = pl.DataFrame(catalogue.select(["item", "item_id"]))
    numbers = pl.DataFrame(
        {"action": actions, "number": range(len(actions))}, schema={"action": pl.String, "number": pl.Int32}
    )
    numbered = events.join(rows, on="item_id", how="left", maintain_order="left")
    numbered = numbered.join(numbers, on="action", how="left", maintain_order="left")
    return numbered.group_by("user_id", maintain_order=True).agg(
        items="item",
        actions=pl.col("number").fill_null(0),
        ratings=pl.col("rating").fill_null(float("nan")),
        timestamps="timestamp",
        parts="part",
        targets="target",
    )


def frame_of(table: pa.Table) -> pl.DataFrame:
    """The table as a polars frame, without copying."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _core(kept: pl.LazyFrame, alive: pa.Table | None, min_user_events: int) -> pl.LazyFrame:
    """Rows of `kept` whose item is alive and whose user has enough such rows."""
    if alive is not None:
        kept = kept.join(pl.LazyFrame(frame_of(alive)), on="item_id", how="semi")
    return kept.filter(pl.len().over("user_id") >= min_user_events) if min_user_events > 1 else kept


def _is_target(config: DataConfig) -> pl.Expr:
    if config.target_actions is None:
        return pl.lit(True)
    return pl.col("action").is_in(config.target_actions).fill_null(False)


def _split(events: pl.DataFrame, config: DataConfig, cuts: tuple[int, int] | None) -> pl.DataFrame:
    """Add `position`, `part` and `target`. Parts never interleave in a history: train, then valid, then test."""
    events = events.with_columns(
        position=pl.int_range(pl.len(), dtype=pl.Int32).over("user_id"), target=_is_target(config)
    )
    if config.split == "leave_one_out":
        # The last target is the test, the one before it the validation; what lies between is history of the later one.
        # Users with fewer than three targets train only.
        targets_ahead = pl.col("target").cast(pl.Int32).cum_sum(reverse=True).over("user_id")
        left = targets_ahead + (~pl.col("target")).cast(pl.Int32)
        enough = pl.col("target").sum().over("user_id") >= 3
        part = pl.when(~enough).then(TRAIN).when(left <= 1).then(TEST).when(left == 2).then(VALID).otherwise(TRAIN)
    elif config.split == "temporal":
        assert cuts is not None
        time = pl.col("timestamp")
        part = pl.when(time >= cuts[1]).then(TEST).when(time >= cuts[0]).then(VALID).otherwise(TRAIN)
    else:
        part = pl.lit(TRAIN)
    return events.with_columns(part=part.cast(pl.Int8))


def _arrow(frame: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    return frame.select(schema.names).to_arrow().cast(schema)
