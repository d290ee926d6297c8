"""The live event log as Parquet, and back through `prepare`."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from springtide import jobs
from springtide.errors import SpringtideError
from springtide.serving import export
from springtide.serving.export import export_events
from springtide.serving.replay import read_parquet_log
from springtide.serving.seeding import seed_histories
from springtide.serving.store_rows import Retention
from springtide.serving.store_sqlite import SQLiteStore
from without_ray import prepare_without_ray, read_report, read_table, settings_for

START = 1_600_000_000_000
DAY = 86_400_000


def event(number: int, user: str, timestamp: int = START, **more: Any) -> dict[str, Any]:
    return {"event_id": f"e{number}", "user_id": user, "item_id": f"ü{number % 7}", "timestamp": timestamp, **more}


EVENTS = [event(n, f"user-{n % 5}", START + n // 3, **({"action": "buy", "rating": n / 4} if n % 2 else {}))
          for n in range(60)]  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    opened = SQLiteStore(tmp_path / "workspace" / "history.sqlite3")
    yield opened
    opened.close()


def exported(folder: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted(folder.glob("*.parquet"))])


def test_prepare_reads_the_same_events_back(
    store: SQLiteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "FILE_ROWS", 25)
    monkeypatch.setattr(export, "PAGE", 10)
    (tmp_path / "first.csv").write_text(f"user_id,item_id,timestamp\nuser-1,ü1,{START - 9}\nuser-9,old,{START - 8}\n")
    store.seed("log", [("user-1", "ü1", START - 9, None, None)])  # known to prepare, and no part of the export
    store.append(EVENTS)
    folder = tmp_path / "workspace" / "exported"
    assert export_events(store, folder) == {"events": 60, "files": 3, "total": 60, "early": 0}
    live = {"paths": str(folder), "columns": {"action": "action", "rating": "rating"}}
    settings = settings_for(tmp_path / "workspace", [{"paths": str(tmp_path / "first.csv")}, live])
    prepare_without_ray(settings)
    read_report(tmp_path / "workspace")
    got = read_table(tmp_path / "workspace", "events").filter(pl.col("timestamp") >= START)
    for user in {e["user_id"] for e in EVENTS}:  # order within a user, through equal timestamps
        columns = ("item_id", "timestamp", "action", "rating")
        expected = [tuple(e.get(column) for column in columns) for e in EVENTS if e["user_id"] == user]
        assert got.filter(pl.col("user_id") == user).sort("position").select(columns).rows() == expected
    assert len(got) == 60


def test_a_history_is_the_same_after_the_whole_cycle(store: SQLiteStore, tmp_path: Path) -> None:
    """Stored, exported, prepared and imported again: no event appears twice, and none is lost."""
    workspace = tmp_path / "workspace"
    (tmp_path / "first.csv").write_text(f"user_id,item_id,timestamp\nuser-1,ü1,{START - 9}\nuser-9,old,{START - 8}\n")
    live = {"paths": str(workspace / "exported"), "columns": {"action": "action", "rating": "rating"}}
    settings = settings_for(workspace, [{"paths": str(tmp_path / "first.csv")}, live])
    users = {e["user_id"] for e in EVENTS}
    for end in (40, 60):
        store.append(EVENTS[:end])
        before = {user: store.history(user) for user in users}
        export_events(store, workspace / "exported")
        prepare_without_ray(settings)
        assert seed_histories(store, workspace) == end + 2
        first = [{"item_id": "ü1", "timestamp": START - 9, "action": "interaction"}]
        earlier = {user: first if user == "user-1" and end == 40 else [] for user in users}  # known from then on
        assert {user: store.history(user) for user in users} == {u: earlier[u] + before[u] for u in users}


def test_the_next_export_adds_what_is_new(store: SQLiteStore, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    assert export_events(store, folder)["total"] == 0
    assert len(exported(folder)) == 0  # prepare finds a folder that it can read
    for end in (20, 20, 60):
        store.append(EVENTS[:end])
        export_events(store, folder)
        assert exported(folder)["event_id"].to_list() == [e["event_id"] for e in EVENTS[:end]]
    assert len(list(folder.glob("*.parquet"))) == 3


def test_it_ends_while_events_keep_coming(store: SQLiteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "FILE_ROWS", 20)
    monkeypatch.setattr(export, "PAGE", 10)
    store.append(EVENTS[:45])
    real, pages = store.since, [0]

    def since(cursor: int = 0, limit: int = 1000) -> Any:
        pages[0] += 1
        assert pages[0] < 50, "it follows the log for ever"
        store.append([event(1000 + 20 * pages[0] + n, "busy") for n in range(20)])
        return real(cursor, limit)

    monkeypatch.setattr(store, "since", since)
    first = export_events(store, tmp_path / "exported")
    assert 45 <= first["events"] <= 45 + 10
    monkeypatch.setattr(store, "since", real)
    export_events(store, tmp_path / "exported")
    assert exported(tmp_path / "exported")["event_id"].to_list() == [row["event_id"] for row in real(0, 10_000)[0]]


def test_a_file_is_on_disk_before_it_has_its_name(
    store: SQLiteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut must not leave a name with nothing behind it: the next export would go on after that."""
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: [steps.append("fsync"), fsync(number)])
    monkeypatch.setattr(os, "replace", lambda *names: [steps.append("replace"), replace(*names)])
    store.append(EVENTS[:5])
    (tmp_path / ".events-killed-7.parquet.new").touch()
    export_events(store, tmp_path)
    assert steps == ["fsync", "replace", "fsync"]
    assert sorted(path.suffix for path in tmp_path.glob("*events*")) == [".parquet"]


def test_what_was_exported_outlives_retention_and_a_new_log(tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    old = SQLiteStore(tmp_path / "log", Retention(events=1))
    old.append(EVENTS[:30])
    export_events(old, folder)
    assert old.retain(START * 2) == 25
    old.append(EVENTS[30:40])
    assert export_events(old, folder) == {"events": 10, "files": 1, "total": 40, "early": 0}
    new = SQLiteStore(tmp_path / "another log")
    new.append(EVENTS[40:])
    assert export_events(new, folder) == {"events": 20, "files": 1, "total": 20, "early": 0}
    assert sorted(exported(folder)["event_id"]) == sorted(e["event_id"] for e in EVENTS)
    old.close()
    new.close()


def copied(source: Path, target: Path) -> None:
    """A log as it is now, as a replica that lags behind has it."""
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)


def test_events_that_took_the_numbers_of_lost_ones_are_exported(tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    with closing(SQLiteStore(tmp_path / "first")) as first:
        first.append(EVENTS[:10])
        export_events(first, folder)
        first.append(EVENTS[10:20])
        copied(tmp_path / "first", tmp_path / "replica")
        first.append(EVENTS[20:30])
        export_events(first, folder)
        first.append(EVENTS[30:32])
        export_events(first, folder)
    with closing(SQLiteStore(tmp_path / "replica")) as replica:
        assert export_events(replica, folder)["total"] == 20  # while its end is only missing
        replica.append(EVENTS[32:42])  # numbers 21 to 30 again, a file's name among them
        assert export_events(replica, folder) == {"events": 10, "files": 1, "total": 30, "early": 0}
        assert export_events(replica, folder)["events"] == 0
        replica.append(EVENTS[42:])
        assert export_events(replica, folder)["events"] == 18
    found = exported(folder)
    assert set(found["event_id"]) == {e["event_id"] for e in EVENTS}  # those that the replica lacks too
    assert len(found) > len(EVENTS) == len(read_parquet_log(folder, 0).events)  # a replay takes each of them once
    settings = settings_for(tmp_path / "workspace", [{"paths": str(folder)}])
    prepare_without_ray(settings)
    assert len(read_table(tmp_path / "workspace", "events")) == len(EVENTS)


def test_a_number_that_was_given_again_is_noticed_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    with closing(SQLiteStore(tmp_path / "first")) as first:
        first.append(EVENTS[:10])
        copied(tmp_path / "first", tmp_path / "replica")
        first.append(EVENTS[10:20])
        export_events(first, folder)
    with closing(SQLiteStore(tmp_path / "replica")) as replica:
        replica.append(EVENTS[20:30])
        export_events(replica, folder)
    assert set(exported(folder)["event_id"]) == {e["event_id"] for e in EVENTS[:30]}


def test_a_last_event_that_retention_removed_is_not_a_lost_one(tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    with closing(SQLiteStore(tmp_path / "log", Retention(days=1))) as log:
        log.append(EVENTS[:10])
        export_events(log, folder)
        assert log.retain(START * 2) == 10
        assert export_events(log, folder)["files"] == 0
        log.append(EVENTS[10:20])
        assert export_events(log, folder) == {"events": 10, "files": 1, "total": 20, "early": 0}


def test_one_export_at_a_time(store: SQLiteStore, tmp_path: Path) -> None:
    with export._alone(tmp_path), pytest.raises(SpringtideError, match="another export"):
        export_events(store, tmp_path)


def test_the_job_finds_the_log_and_counts(
    store: SQLiteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "experiment.yaml"
    workspace = tmp_path / "workspace"
    config.write_text(yaml.safe_dump({"workspace": str(workspace), "data": {"events": {"paths": "log.csv"}}}))
    store.append([*EVENTS, event(99, "u", 5)])
    jobs.main("export", ["--config", str(config)])
    result = json.loads((workspace / "results" / "export.json").read_text())
    assert (result["status"], result["events"], result["total"], result["early"]) == ("ok", 61, 61, 1)
    with pytest.raises(SystemExit):
        jobs.main("export", ["--config", str(config), "--set", "serve.store=elsewhere/log"])
    assert f"there is no event log {workspace}/elsewhere/log" in capsys.readouterr().err
