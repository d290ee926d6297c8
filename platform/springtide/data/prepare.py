"""The `prepare` stage: raw logs to cleaned events, sequences and a split, on Ray Data.

    files -> read and clean (a task per group of files) -> shuffle by hash of user -> order and deduplicate
          -> k-core, time cuts (sums over the partitions) -> split, sequences, Parquet (a task per partition)

Good and rejected rows travel together to the end, so the counts of report.json reconcile by construction.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from functools import partial
from itertools import count as count_from
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from springtide.cluster import connect
from springtide.config import DataConfig, Settings
from springtide.data.clean import UNKNOWN_ACTION
from springtide.data.items import QUARANTINE_COLUMNS, RawItems, read_items
from springtide.data.partitions import (
    IS_ROW,
    Written,
    count_items,
    count_times,
    frame_of,
    last_rows,
    make_times,
    order_and_deduplicate,
    write_partition,
)
from springtide.data.reading import check_notes, group_files, look_into, look_through, read_group
from springtide.data.report import build_report
from springtide.data.sources import SourceFile, list_files
from springtide.errors import SpringtideError
from springtide.files import disk_error, publish_directory, sha256_of, write_json, write_manifest
from springtide.schemas import ITEMS, QUARANTINE, check_schema

log = logging.getLogger(__name__)


def run(settings: Settings) -> dict[str, Any]:
    """Prepare the log of `settings.data` into `<workspace>/prepared`. Returns the body of results/prepare.json.

    Raises SpringtideError for input that cannot be used; the prepared data of an earlier run then stays as it was.
    """
    config = settings.data
    files, item_files, skipped = _files_of(config)
    look_into(files, config.events)
    connect()
    final = Path(settings.workspace) / "prepared"
    with publish_directory(final) as out:
        for folder in ("events", "items", "sequences", "quarantine"):
            (out / folder).mkdir()
        described = (
            read_items(config.items, item_files) if config.items else RawItems(_no_items(), _no_quarantine(), [])
        )
        partitions = _shuffle(files, config)
        if config.timeless and partitions:
            partitions = _make_times(partitions)
        logged, alive, rounds = _k_core(partitions, config) if partitions else (pl.DataFrame(), pl.DataFrame(), 0)
        if not len(alive):
            raise SpringtideError(_nothing_left(partitions, config))
        actions = _vocabulary(partitions)
        _check_targets(config, actions)
        cuts = _time_cuts(partitions, alive, config) if config.split == "temporal" else None
        catalogue = _catalogue(logged, alive, described.items)
        written = _write(partitions, out, config, files, catalogue, actions, cuts)
        report = build_report(config, files, skipped, written, described, catalogue, rounds, cuts)
        for warning in report["warnings"]:
            log.warning("%s", warning)
        if config.split != "none" and not report["split"]["test"]:
            raise SpringtideError(_no_test(config, report))
        _write_items(out, catalogue, written)
        if len(described.quarantine):
            pq.write_table(described.quarantine.cast(QUARANTINE), out / "quarantine" / "items.parquet")
        write_json(out / "vocabulary.json", {"actions": actions})
        write_json(out / "report.json", report)
        content = _content_hash(out)
        write_manifest(out, {"content_hash": content})
    totals = report["totals"]
    log.info(
        "%d rows in = %d kept + %d quarantined + %d deduplicated; %d users, %d items",
        totals["rows"], totals["kept"], totals["quarantined"], totals["deduplicated"], report["users"], report["items"],
    )  # fmt: skip
    return {
        "prepared": str(final),
        "content_hash": content,
        **{k: report[k] for k in ("totals", "users", "items", "split")},
    }


def _files_of(config: DataConfig) -> tuple[list[SourceFile], list[SourceFile], list[str]]:
    """Event files, item files, and the paths of files beside them that are not read; see list_files."""
    files: list[SourceFile] = []
    skipped: list[str] = []
    for position, source in enumerate(config.events):
        found, others = list_files(source.paths, source.format, position, len(files))
        files += found
        skipped += others
    items, others = list_files(config.items.paths, config.items.format, -1, 0) if config.items else ([], [])
    skipped = sorted({*skipped, *others})
    log.info("%d event files, %d item files", len(files), len(items))
    if skipped:
        log.warning(
            "%d files, such as %s, are not read, because their names tell no format, or another than is set; set "
            "format, or name them in paths, if they are logs",
            len(skipped), skipped[0],
        )  # fmt: skip
    return files, items, skipped


# ---------------------------------------------------------------- read, clean, shuffle
def _shuffle(files: list[SourceFile], config: DataConfig) -> list[Any]:
    """References to the ordered and deduplicated partitions, each an Arrow table (CLEANED) with whole users."""
    import ray

    groups = group_files(files)
    read = partial(read_group, files=files, sources=config.events, partitions=config.partitions)
    order = partial(order_and_deduplicate, config=config)
    dataset = (
        ray.data.from_items([{"group": group} for group in groups], override_num_blocks=len(groups))
        .map_batches(read, batch_size=1, batch_format="pyarrow")
        # By value: Ray's repartition by keys would hash the few numbers, and two of them could share a partition.
        .sort("bucket", boundaries=list(range(1, config.partitions + 1)))  # the block after the last bound is empty
        .map_batches(order, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
        .materialize()
    )
    references = dataset.to_arrow_refs()
    found = ray.get([_remote(look_through).remote(reference) for reference in references])
    check_notes([note for _, some in found for note in some], files, config.events)
    buckets = [some for some, _ in found]
    owners = Counter(bucket for some in buckets for bucket in some)
    if any(count > 1 for count in owners.values()):
        raise SpringtideError(
            f"a hash partition was too large for one block; raise data.partitions above {config.partitions}"
        )
    named = [(reference, min(some)) for reference, some in zip(references, buckets, strict=True) if some]
    return sorted(named, key=lambda pair: pair[1])


def _remote(function: Any) -> Any:
    import ray

    return ray.remote(num_cpus=0.5)(function)


# ---------------------------------------------------------------- sums over all partitions
def _make_times(partitions: list[Any]) -> list[Any]:
    """The partitions with times in place of the order of their rows."""
    import ray

    log.info("the log has no times: its rows are taken to have happened one after the other, a second apart")
    last, make = _remote(last_rows), _remote(make_times)
    rows = frame_of(pa.concat_tables(ray.get([last.remote(table) for table, _ in partitions])))
    total = rows.group_by("file").agg(pl.col("row").max()).sort("file")
    before = ray.put(total.select("file", before=pl.col("row").cum_sum() - pl.col("row")).to_arrow())
    return [(make.remote(table, before), bucket) for table, bucket in partitions]


def _k_core(partitions: list[Any], config: DataConfig) -> tuple[pl.DataFrame, pl.DataFrame, int]:
    """(item_id, events) of all logged items and of those in the k-core, and the number of rounds it took."""
    import ray

    count = _remote(count_items)

    def total(alive: pa.Table | None, min_user_events: int) -> pl.DataFrame:
        shared = ray.put(alive)
        counts = ray.get([count.remote(table, shared, min_user_events) for table, _ in partitions])
        return frame_of(pa.concat_tables(counts)).group_by("item_id").agg(pl.col("events").sum()).sort("item_id")

    logged = kept = total(None, 1)
    if config.min_user_events == config.min_item_events == 1:
        return logged, logged, 0
    for rounds in count_from(1):
        before = len(kept)
        kept = total(kept.select("item_id").to_arrow(), config.min_user_events).filter(
            pl.col("events") >= config.min_item_events
        )
        if len(kept) == before:
            return logged, kept, rounds
    raise AssertionError("unreachable")


def _time_cuts(partitions: list[Any], alive: pl.DataFrame, config: DataConfig) -> tuple[int, int]:
    """First millisecond of validation and of test: the times of the events at 80 % and 90 % of the log."""
    import ray

    shared = ray.put(alive.select("item_id").to_arrow())
    count = _remote(count_times)
    counts = ray.get([count.remote(table, shared, config) for table, _ in partitions])
    total = frame_of(pa.concat_tables(counts)).group_by("timestamp").agg(pl.col("events").sum()).sort("timestamp")
    upto = total["events"].cum_sum().to_numpy()
    if not len(upto):
        raise SpringtideError(
            "no event has one of data.target_actions, so a temporal split has nothing to test; correct them"
        )
    times = total["timestamp"].to_numpy()
    valid, test = (
        int(times[np.searchsorted(upto, int(np.floor(share * upto[-1])), side="right")]) for share in (0.8, 0.9)
    )
    if valid <= int(times[0]):
        raise SpringtideError(
            "a temporal split needs events before and after a point in time, but at least 80 % of the log has its"
            " earliest timestamp; use split: leave_one_out"
        )
    return valid, test


# ---------------------------------------------------------------- catalogue
def _catalogue(logged: pl.DataFrame, alive: pl.DataFrame, described: pl.DataFrame) -> pl.DataFrame:
    """The items of the k-core, and described items that the log never mentions if they have a text to be ranked by.

    Sorted by item_id, whose position is the catalogue row.
    """
    joined = alive.select("item_id").join(described, on="item_id", how="left")
    silent = described.join(logged, on="item_id", how="anti").filter(pl.col("text") != "")
    both = pl.concat([joined.with_columns(alive=True), silent.select(described.columns).with_columns(alive=False)])
    return (
        both.sort("item_id")
        .with_row_index("item")
        .with_columns(
            pl.col("item").cast(pl.Int32), pl.col("title", "text").fill_null(""), pl.col("categories").fill_null([])
        )
    )


def _write_items(out: Path, catalogue: pl.DataFrame, written: list[Written]) -> None:
    counts = (
        frame_of(pa.concat_tables([w.train_events for w in written])).group_by("item_id").agg(pl.col("events").sum())
    )
    items = catalogue.join(counts, on="item_id", how="left", maintain_order="left").with_columns(
        pl.col("events").fill_null(0)
    )
    table = items.select(ITEMS.names).to_arrow().cast(ITEMS)
    pq.write_table(check_schema(table, ITEMS, "items"), out / "items" / "part-00000.parquet")


def _no_items() -> pl.DataFrame:
    columns: dict[str, Any] = {
        "item_id": pl.String, "title": pl.String, "categories": pl.List(pl.String), "text": pl.String
    }  # fmt: skip
    return pl.DataFrame(schema=columns)


def _no_quarantine() -> pa.Table:
    return pl.DataFrame(schema=QUARANTINE_COLUMNS).to_arrow()


# ---------------------------------------------------------------- write
def _write(
    partitions: list[Any],
    out: Path,
    config: DataConfig,
    files: list[SourceFile],
    catalogue: pl.DataFrame,
    actions: list[str],
    cuts: tuple[int, int] | None,
) -> list[Written]:
    import ray

    shared = ray.put(catalogue.select("item", "item_id", "alive").to_arrow())
    paths = ray.put([file.path for file in files])
    write = _remote(_write_one)
    written: list[Written | str] = ray.get(
        [
            write.remote(table, f"part-{bucket:05d}", out, config, paths, shared, actions, cuts)
            for table, bucket in partitions
        ]
    )
    refused = [sentence for sentence in written if isinstance(sentence, str)]
    if refused:
        raise SpringtideError(refused[0])
    return [some for some in written if not isinstance(some, str)]


def _vocabulary(partitions: list[Any]) -> list[str]:
    """Action names by number; 0 stands for an action that is missing or was never seen."""
    import ray

    names = ray.get([_remote(_actions_in).remote(table) for table, _ in partitions])
    return [UNKNOWN_ACTION, *sorted(set().union(*names))]


def _check_targets(config: DataConfig, actions: list[str]) -> None:
    unknown = [action for action in config.target_actions or [] if action not in actions[1:]]
    if unknown:
        raise SpringtideError(
            f"data.target_actions has {unknown[0]!r}, but the log has only"
            f" {', '.join(actions[1:]) or 'events without action'}; correct it"
        )


def _actions_in(table: pa.Table) -> set[str]:
    return {action for action in table["action"].unique().to_pylist() if action is not None}


def _write_one(table: pa.Table, name: str, out: Path, *rest: Any) -> Written | str:
    """What was written, or the sentence why not: an exception would remove `out` while other partitions write to it."""
    try:
        return write_partition(table, name, out, *rest)
    except OSError as error:
        return str(disk_error(error, out.parent))


def _content_hash(out: Path) -> str:
    """One hash of everything that later stages read: equal input gives an equal hash."""
    digest = hashlib.sha256()
    for folder in ("events", "items", "sequences"):
        for path in sorted((out / folder).iterdir()):
            digest.update(f"{folder}/{path.name} {sha256_of(path)}\n".encode())
    digest.update((out / "vocabulary.json").read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- logs that cannot be used
def _nothing_left(partitions: list[Any], config: DataConfig) -> str:
    import ray

    reasons = Counter[str]()
    for counts in ray.get([_remote(_reasons_in).remote(table) for table, _ in partitions]):
        reasons.update(counts)
    rows = reasons.total()
    if not rows:
        return "the log is empty: no row in any of the files under data.events; check the paths"
    kept = reasons.pop("", 0)
    if kept:
        return (
            f"no event is left of {rows} rows after the k-core filter; lower data.min_user_events "
            f"({config.min_user_events}) or data.min_item_events ({config.min_item_events})"
        )
    reason, count = reasons.most_common(1)[0]
    return (
        f'no usable event among {rows} rows: {count} were rejected with "{reason}"; correct data.events in the settings'
    )


def _reasons_in(table: pa.Table) -> dict[str, int]:
    rows = frame_of(table).filter(IS_ROW)
    return dict(rows.select(pl.col("reason").fill_null("").value_counts()).unnest("reason").iter_rows())


def _no_test(config: DataConfig, report: dict[str, Any]) -> str:
    if config.split == "leave_one_out":
        return (
            f"split: leave_one_out needs users with at least 3 events, and none of the {report['users']} has them; "
            "use split: none"
        )
    return "the temporal split leaves no test event; use split: leave_one_out or none"
