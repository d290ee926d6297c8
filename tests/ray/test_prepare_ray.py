"""`prepare` on Ray: a log of several formats from end to end, reruns, and inputs refused in one sentence."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from springtide.config import Settings, parse_settings
from springtide.data.prepare import run
from springtide.data.prepared import load_prepared
from springtide.jobs import explain
from toy import toy_log
from without_ray import prepare_without_ray, read_report, read_table

pytestmark = pytest.mark.ray


def write_mixed_log(folder: Path) -> dict[str, Any]:
    """A log in three formats with some bad rows, and its catalogue. Returns the section `data`."""
    folder.mkdir(parents=True)
    log = toy_log(users=40)
    csv, jsonl, parquet = log[0::3], log[1::3], log[2::3]
    lines = [f"{e['user_id']},{e['item_id']},{e['timestamp'] / 1000},{e['action']},{e['rating']}" for e in csv]
    lines[5:5] = ["malformed", ",i01,1600000000,view,1", lines[0], "u1,i01,yesterday,view,1"]
    (folder / "csv").mkdir()
    for number in range(3):
        text = "\n".join(["who,what,when,how,stars", *lines[number::3]]) + "\n"
        (folder / "csv" / f"{number}.csv.gz").write_bytes(gzip.compress(text.encode()))
    records = [json.dumps({**event, "extra": None}) for event in jsonl]
    records[3:3] = ["{broken", '{"user_id": null}', ""]
    (folder / "events.jsonl").write_text("\n".join(records))
    columns = {name: [event[name] for event in parquet] for name in ("user_id", "item_id", "timestamp", "rating")}
    columns["timestamp"] = pa.array(columns["timestamp"], pa.timestamp("ms", "UTC"))
    columns["rating"][0] = float("nan")
    pq.write_table(pa.table(columns), folder / "events.parquet")
    items = [
        "id\ttitle\tkind",
        *(f"i{n:02d}\tItem {n}\todd|even" for n in range(35)),
        "i00\tanother title\t",
        "\tnobody\t",
    ]
    (folder / "items.tsv").write_text("\n".join(items))
    named = {"user_id": "who", "item_id": "what", "timestamp": "when", "action": "how", "rating": "stars"}
    return {
        "events": [
            {"paths": str(folder / "csv"), "columns": named},
            {"paths": str(folder / "events.jsonl"), "columns": {"action": "action", "rating": "rating"}},
            {"paths": str(folder / "events.parquet"), "columns": {"rating": "rating"}, "action": "purchase"},
        ],
        "items": {
            "paths": str(folder / "items.tsv"),
            "columns": {"item_id": "id", "title": "title", "categories": "kind"},
        },
        "min_user_events": 2,
        "min_item_events": 2,
        "partitions": 3,
    }


def settings_of(workspace: Path, data: dict[str, Any]) -> Settings:
    return parse_settings({"workspace": str(workspace), "data": data})


def sentence(settings: Settings) -> str:
    """What a job prints when `prepare` fails."""
    try:
        run(settings)
    except Exception as error:
        message = explain(error, Path(settings.workspace))
    else:
        raise AssertionError("it was accepted")
    assert message is not None
    assert "\n" not in message
    return message


def test_a_mixed_log_from_end_to_end(ray_session: Any, tmp_path: Path) -> None:
    data = write_mixed_log(tmp_path / "log")
    first = run(settings_of(tmp_path / "first", data))
    report = read_report(tmp_path / "first")
    assert len(report["files"]) == 5
    assert report["totals"]["rows"] == len(toy_log(users=40)) + 6
    assert report["totals"]["deduplicated"] == 1
    others = {reason: count for reason, count in report["reasons"].items() if not reason.startswith("k-core")}
    assert others == {
        "malformed row: 1 columns, not 5": 1,
        "malformed row: not JSON": 1,
        "no user_id": 2,
        "timestamp is no epoch second, epoch millisecond or ISO-8601 time from 1900 to 2199": 1,
    }
    quarantine = read_table(tmp_path / "first", "quarantine")
    assert quarantine.filter(reason="malformed row: not JSON").select("row", "content").rows() == [(4, "{broken\n")]
    prepared = load_prepared(tmp_path / "first")
    assert prepared.content_hash == first["content_hash"]
    assert prepared.actions == ["<unknown>", "purchase", "view"]
    assert prepared.items["item_id"].to_pylist() == sorted(prepared.items["item_id"].to_pylist())
    assert len(prepared.sequences()) == report["users"] == 40

    again = run(settings_of(tmp_path / "first", data))
    assert again == first
    assert [path.name for path in (tmp_path / "first").iterdir()] == ["prepared"]
    # The unit tests run the stage without Ray: both must be the same thing.
    prepare_without_ray(settings_of(tmp_path / "plain", data))
    for table, key in (("events", ["user_id", "position"]), ("items", ["item"]), ("sequences", ["user_id"])):
        assert read_table(tmp_path / "first", table).sort(key).equals(read_table(tmp_path / "plain", table).sort(key))


def test_each_hash_of_a_user_is_a_partition_of_its_own(ray_session: Any, tmp_path: Path) -> None:
    users = [f"u{n}" for n in range(200)]
    (tmp_path / "a.csv").write_text(LOG + "".join(f"{user},i{n},{n}\n" for user in users for n in range(3)))
    run(settings_of(tmp_path / "workspace", {"events": {"paths": str(tmp_path / "a.csv")}, "partitions": 8}))
    parts = sorted((tmp_path / "workspace" / "prepared" / "sequences").iterdir())
    found = [pq.read_table(part, columns=["user_id"])["user_id"].to_pylist() for part in parts]
    assert [sorted(part) for part in found] == [
        sorted(user for user in users if zlib.crc32(user.encode()) % 8 == bucket) for bucket in range(8)
    ]


LOG = "user_id,item_id,timestamp\n"
BAD: list[tuple[str, dict[str, str | None], dict[str, Any], str]] = [
    ("missing file", {"a.csv": None}, {}, "there is no file or folder"),
    ("empty file", {"a.csv": ""}, {}, "the log is empty"),
    ("only a header", {"a.csv": LOG}, {}, "the log is empty"),
    (
        "wrong column",
        {"a.csv": "user,item_id,timestamp\n1,2,3\n"},
        {},
        "no column 'user_id'; it has user, item_id, timestamp",
    ),
    ("NaN ids", {"a.csv": LOG + "nan,i,1\nNaN,j,2\n"}, {}, '2 were rejected with "no user_id"'),
    ("one event", {"a.csv": LOG + "u,i,1\n"}, {}, "at least 3 events"),
    (
        "equal times",
        {"a.csv": LOG + "".join(f"u{n},i{n % 3},1\n" for n in range(30))},
        {"split": "temporal"},
        "earliest",
    ),
    ("k-core of nothing", {"a.csv": LOG + "u,i,1\nu,j,2\nu,k,3\n"}, {"min_item_events": 5}, "k-core"),
    (
        "the second file is another",
        {"a.csv": LOG + "u,i,1\n", "b.csv": "x\n1\n"},
        {},
        "b.csv has no column 'user_id'; it has x",
    ),
    ("a torn archive", {"a.csv": LOG + "u,i,1\n", "b.csv.gz": LOG}, {}, "b.csv.gz as csv"),
    ("unclosed quote", {"a.csv": LOG + 'u,"i,1\nu,j,2\n'}, {}, "never closed"),
    ("unknown target", {"a.csv": LOG + "u,i,1\n"}, {"target_actions": "buy"}, "'buy'"),
]


@pytest.mark.parametrize(("files", "options", "says"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_input_is_one_sentence_and_leaves_the_old_log(
    ray_session: Any, tmp_path: Path, files: dict[str, str | None], options: dict[str, Any], says: str
) -> None:
    old = tmp_path / "workspace" / "prepared"
    old.mkdir(parents=True)
    (old / "old.txt").write_text("old")
    for name, text in files.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    data = {"events": {"paths": [str(tmp_path / name) for name in files]}, "partitions": 2, **options}
    assert says in sentence(settings_of(tmp_path / "workspace", data))
    assert [path.name for path in (tmp_path / "workspace").rglob("*")] == ["prepared", "old.txt"]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(ray_session: Any, tmp_path: Path, full_disk: Path) -> None:
    text = LOG + "".join(f"u{n % 97},i{n * 7919 % 1009},{n}\n" for n in range(5000))
    (tmp_path / "a.csv").write_text(text)
    data = {"events": {"paths": str(tmp_path / "a.csv")}, "partitions": 8}
    message = sentence(settings_of(full_disk, data))
    assert "No space left on device" in message
    assert "run again" in message
    assert list(full_disk.iterdir()) == []


def test_wild_rows_cost_only_themselves(ray_session: Any, tmp_path: Path) -> None:
    """A line of 10 MB, invalid UTF-8, ratings as text, items unknown to the catalogue and described twice."""
    good = b"".join(b"u%d,i%d,%d,4\n" % (n % 3, n % 5, n) for n in range(30))
    wild = b"u1," + b"x" * 10_000_000 + b",1,2\n\xff,i1,1,2\n\xff\nu1,i1,1,good\n"
    (tmp_path / "a.csv").write_bytes(b"user_id,item_id,timestamp,rating\n" + wild + good)
    (tmp_path / "items.csv").write_text("item_id,title\ni1,one\ni1,one\ni1,uno\ni2,\ni9,nine\n")
    data = {
        "events": {"paths": str(tmp_path / "a.csv"), "columns": {"rating": "rating"}},
        "items": {"paths": str(tmp_path / "items.csv"), "columns": {"title": "title"}},
        "partitions": 2,
    }
    run(settings_of(tmp_path / "workspace", data))
    report = read_report(tmp_path / "workspace")
    assert report["totals"] == {"rows": 34, "kept": 30, "quarantined": 4, "deduplicated": 0}
    assert sorted(report["reasons"]) == [
        "invalid UTF-8 in user_id", "item_id above 512 bytes", "malformed row: 1 columns, not 4", "rating is no number"
    ]  # fmt: skip
    titles = dict(read_table(tmp_path / "workspace", "items").select("item_id", "title").iter_rows())
    assert titles == {"i0": "", "i1": "one", "i2": "", "i3": "", "i4": "", "i9": "nine"}
    assert report["item_files"][0]["deduplicated"] == 2
