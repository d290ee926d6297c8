"""The yardstick of benchmarks/prepare.py: the tables of the `prepare` job by polars alone, in one process.

    python benchmarks/prepare_polars.py EVENTS_FOLDER OUT_FOLDER

Reads the log, drops exact duplicates, orders by (user, time, file, row), takes the 5-core, splits leave-one-out and
writes events, items and sequences. It checks nothing: a bad row, a missing column or a full disk is a traceback.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import polars as pl

CORE = 5
COLUMNS = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "action": pl.String, "rating": pl.Float32}


def read(folder: Path) -> pl.DataFrame:
    """All shards, with the number of the file and of the row in it (from 1)."""
    frames = []
    for number, path in enumerate(sorted(folder.iterdir())):
        if path.suffix == ".parquet":
            frame = pl.scan_parquet(path, row_index_name="row", row_index_offset=1)
        else:
            frame = pl.scan_csv(path, schema=COLUMNS, row_index_name="row", row_index_offset=1)
        frames.append(frame.with_columns(file=pl.lit(number, pl.Int32), row=pl.col("row").cast(pl.Int64)))
    return pl.concat(frames).collect()


def core(events: pl.DataFrame) -> pl.DataFrame:
    """Drop users and items with fewer than CORE events, again and again until nothing changes."""
    for _ in count():
        before = len(events)
        events = events.filter(pl.len().over("user") >= CORE)
        events = events.filter(pl.len().over("item") >= CORE)
        if len(events) == before:
            return events
    raise AssertionError("unreachable")


def codes(ids: pl.Series) -> pl.Series:
    """Numbers from 0 in the order of the ids."""
    return ids.cast(pl.Enum(ids.unique().sort())).to_physical()


def prepare(source: Path, out: Path) -> None:
    events = read(source)
    events = events.filter(pl.struct(list(COLUMNS)).is_first_distinct())
    # Numbers instead of strings make everything below several times faster; the sorted codes keep the order of the ids.
    events = events.with_columns(user=codes(events["user_id"]), item=codes(events["item_id"]))
    events = core(events).sort("user", "timestamp", "file", "row")
    left = pl.len().over("user") - pl.int_range(pl.len()).over("user")
    events = events.with_columns(
        item=codes(events["item_id"]).cast(pl.Int32),
        position=pl.int_range(pl.len(), dtype=pl.Int32).over("user"),
        part=pl.when(left == 1).then(2).when(left == 2).then(1).otherwise(0).cast(pl.Int8),
    )
    actions = events["action"].unique().sort()
    numbers = pl.DataFrame({"action": actions, "number": pl.int_range(1, len(actions) + 1, dtype=pl.Int32, eager=True)})
    sequences = (
        events.join(numbers, on="action", how="left", maintain_order="left")
        .group_by("user", maintain_order=True)
        .agg(
            pl.col("user_id").first(),
            items="item",
            actions="number",
            ratings=pl.col("rating").fill_null(float("nan")),
            timestamps="timestamp",
            parts="part",
            targets=pl.lit(True).repeat_by(pl.len()).first(),
        )
        .drop("user")
    )
    trained = (pl.col("part") == 0).sum().cast(pl.Int64)
    items = events.group_by("item").agg(pl.col("item_id").first(), events=trained).sort("item")
    out.mkdir(parents=True)
    names = ["user_id", "item_id", "timestamp", "action", "rating", "position", "part", "file", "row"]
    events.select(names).write_parquet(out / "events.parquet")
    sequences.write_parquet(out / "sequences.parquet")
    items.write_parquet(out / "items.parquet")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), Path(sys.argv[2]))
