"""A log without times: the order of its rows is their order in time, over files and whatever rows are bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.config_data import EventSource
from springtide.data.clean import clean_chunk
from springtide.data.readers import RawChunk
from springtide.errors import SpringtideError
from springtide.schemas import TEST, TRAIN, VALID
from without_ray import prepare_without_ray, read_report, read_table, settings_for

TIMELESS = {"timestamp": None}
BAD = ["short", "u,i,7,8,9", ",i,7"]  # no row of the table, and one without a user


def write(folder: Path, files: list[list[str]]) -> None:
    """CSV files of rows `user,item`, each with a third column that counts all rows of the log, good or bad."""
    folder.mkdir(parents=True)
    number = 0
    for name, rows in enumerate(files):
        lines = ["user_id,item_id,n"]
        for row in rows:
            number += 1
            lines.append(row if row in BAD else f"{row},{number}")
        (folder / f"{name:02d}.csv").write_text("\n".join(lines) + "\n")


def prepare(folder: Path, name: str, timestamp: str | None, **data: Any) -> dict[str, Any]:
    source = {"paths": str(folder / "log"), "columns": {"timestamp": timestamp}}
    prepare_without_ray(settings_for(folder / name, source, **data))
    return read_report(folder / name)


def history(workspace: Path, user: str) -> list[tuple[str, int, int]]:
    events = read_table(workspace, "events").filter(user_id=user).sort("position")
    return events.select("item_id", "timestamp", "part").rows()


def test_rows_come_one_second_apart_over_files_and_the_last_is_the_test(tmp_path: Path) -> None:
    write(tmp_path / "log", [["a,x", "b,x", "a,y"], ["b,y", "a,w", "b,z"], ["a,z", "b,w"]])
    report = prepare(tmp_path, "w", None)
    assert history(tmp_path / "w", "a") == [
        ("x", 1_000, TRAIN),
        ("y", 3_000, TRAIN),
        ("w", 5_000, VALID),
        ("z", 7_000, TEST),
    ]
    assert [(item, part) for item, _, part in history(tmp_path / "w", "b")] == [
        ("x", TRAIN),
        ("y", TRAIN),
        ("z", VALID),
        ("w", TEST),
    ]
    assert report["made_up_times"] is True
    assert report["ties"]["events"] == 0
    assert report["warnings"] == []
    assert prepare(tmp_path, "timed", "n")["made_up_times"] is False


def test_bad_rows_keep_their_place_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "log", [["short", "a,x", ",i,7", "a,y", "u,i,7,8,9"], BAD, ["a,w", "short", "a,z"]])
    report = prepare(tmp_path, "w", None)
    assert [time for _, time, _ in history(tmp_path / "w", "a")] == [2_000, 4_000, 9_000, 11_000]
    assert [item for item, _, part in history(tmp_path / "w", "a") if part == TEST] == ["z"]
    assert [(entry["kept"], entry["quarantined"]) for entry in report["files"]] == [(2, 3), (0, 3), (2, 1)]


@settings(max_examples=30)
@given(
    files=st.lists(
        st.lists(st.sampled_from([*(f"{user},{item}" for user in "abc" for item in "pqrs"), *BAD]), max_size=25),
        min_size=1,
        max_size=4,
    ),
    split=st.sampled_from(["leave_one_out", "temporal", "none"]),
    deduplicate=st.sampled_from(["exact", "user_item"]),
)
def test_the_log_is_prepared_as_if_its_rows_were_counted(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], split: str, deduplicate: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    write(folder / "log", files)
    options = {"split": split, "deduplicate": deduplicate}
    try:
        prepare(folder, "timed", "n", **options)
    except SpringtideError:
        with pytest.raises(SpringtideError):
            prepare(folder, "timeless", None, **options)
        return
    prepare(folder, "timeless", None, **options)
    for table, key in (("events", ["user_id", "position"]), ("sequences", ["user_id"]), ("items", ["item"])):
        assert read_table(folder / "timeless", table).sort(key).equals(read_table(folder / "timed", table).sort(key))


def test_sources_follow_one_another_as_they_are_listed(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": ["u", "u"], "item_id": [3, 4]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(f'{{"user_id": "u", "item_id": {n}}}\n' for n in (1, 2)))
    sources = [{"paths": str(tmp_path / name), "columns": TIMELESS} for name in ("b.jsonl", "a.parquet")]
    prepare_without_ray(settings_for(tmp_path / "w", sources))
    assert [item for item, _, _ in history(tmp_path / "w", "u")] == ["1", "2", "3", "4"]


def test_an_equal_row_is_another_event_unless_only_the_first_of_an_item_counts(tmp_path: Path) -> None:
    write(tmp_path / "log", [["u,x", "u,y", "u,x"], ["u,x", "u,z"]])
    assert prepare(tmp_path, "exact", None)["totals"]["kept"] == 5
    assert prepare(tmp_path, "first", None, deduplicate="user_item")["totals"]["kept"] == 3


def test_a_log_without_rows_is_still_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "log", [[], []])
    with pytest.raises(SpringtideError, match="the log is empty"):
        prepare(tmp_path, "w", None)


def test_times_are_missed_unless_the_settings_say_that_there_are_none(tmp_path: Path) -> None:
    write(tmp_path / "log", [["u,x", "u,y", "u,z"]])
    with pytest.raises(SpringtideError, match="no column 'timestamp'"):
        prepare_without_ray(settings_for(tmp_path / "w", {"paths": str(tmp_path / "log")}))


def test_sources_with_and_without_times_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(SpringtideError, match="nobody can tell what came first; set it to null in all") as caught:
        settings_for(tmp_path, [{"paths": "a.csv", "columns": TIMELESS}, {"paths": "b.csv"}])
    assert "\n" not in str(caught.value)


def test_cleaning_orders_by_file_then_row() -> None:
    source = EventSource.model_validate({"paths": "x", "columns": TIMELESS})
    chunk = RawChunk(pa.table({"user_id": ["u", "", "u"], "item_id": ["x", "y", "z"]}), pa.array([1, 2, 9]), [])
    times = [clean_chunk(chunk, source, file, 4)["timestamp"].to_pylist() for file in (0, 1)]
    assert times[0][1] is times[1][1] is None  # a reject has none
    assert times[0][0] < times[0][2] < times[1][0] < times[1][2]
