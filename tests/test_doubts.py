"""What is read but hardly meant is told, and what is normal is not."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from without_ray import prepare_without_ray, read_report, settings_for

DATES, DAYS = "look like dates written as numbers", "look like days as Excel counts them"


def warnings(folder: Path, *files: Sequence[Any], users: int = 3, **data: Any) -> list[str]:
    """Of a log with these times, file by file."""
    (folder / "log").mkdir()
    for number, times in enumerate(files):
        rows = "".join(f"u{n % users},i{n % 7},{time}\n" for n, time in enumerate(times))
        (folder / "log" / f"{number}.csv").write_text("user_id,item_id,timestamp\n" + rows)
    prepare_without_ray(settings_for(folder / "w", {"paths": str(folder / "log")}, **data))
    found: list[str] = read_report(folder / "w")["warnings"]
    return found


def days(start: int, count: int) -> list[str]:
    return [(dt.date(2021, 1, 1) + dt.timedelta(n)).strftime("%Y%m%d") for n in range(start, start + count)]


# ---------------------------------------------------------------- times
def test_dates_written_as_numbers_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (found,) = warnings(tmp_path, days(0, 40), ["2021-03-05"] * 5, days(40, 20))
    assert found.startswith(f"the times of {tmp_path / 'log' / '0.csv'} and 1 more files of its source {DATES}")
    assert "2021-03-05" in found
    assert found in caplog.messages


@pytest.mark.parametrize("times", [range(44_000, 44_040), [44_000 + n / 8 for n in range(40)], [44_260] * 30])
def test_days_of_excel_are_told(tmp_path: Path, times: Sequence[Any]) -> None:
    (found,) = warnings(tmp_path, times)
    assert DAYS in found


def test_a_few_other_times_change_nothing(tmp_path: Path) -> None:
    (found,) = warnings(tmp_path, [*days(0, 98), "1600000000", "2021-03-05"])
    assert DATES in found


@pytest.mark.parametrize(
    "files",
    [
        [range(1, 100)],
        [range(1, 30_001), range(30_001, 60_001, 50)],  # a counter that goes on in a file of its own
        [range(20_210_000, 20_210_100)],  # as many days as no month has
        [range(20_212_001, 20_212_032)],
        [["1970-01-01T12:00:00"] * 3 + ["1970-08-22"] * 30],
        [[1_600_000_000 + n for n in range(30)]],
        [["2021-03-05"] * 30],
        [[0] * 30],
        [[-n for n in range(30)]],
        [[*days(0, 15), *(1_600_000_000 + n for n in range(15))]],
    ],
)
def test_other_times_are_silent(tmp_path: Path, files: list[Sequence[Any]]) -> None:
    assert warnings(tmp_path, *files, deduplicate="exact") == []


def test_typed_numbers_are_looked_at_too(tmp_path: Path) -> None:
    times = pa.array([int(day) for day in days(0, 20)], pa.int32())
    table = pa.table({"user_id": ["u"] * 20, "item_id": [str(n) for n in range(20)], "timestamp": times})
    pq.write_table(table, tmp_path / "a.parquet")
    prepare_without_ray(settings_for(tmp_path / "w", {"paths": str(tmp_path / "a.parquet")}))
    (found,) = read_report(tmp_path / "w")["warnings"]
    assert DATES in found


# ---------------------------------------------------------------- items
def with_items(folder: Path, *ids: str) -> list[str]:
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"{item},t\n" for item in ids))
    items = {"paths": str(folder / "items.csv"), "columns": {"title": "title"}}
    return warnings(folder, range(1, 30), items=items)


def test_a_catalogue_that_describes_hardly_any_logged_item_is_told(tmp_path: Path) -> None:
    (found,) = with_items(tmp_path, *(f"i{n}.0" for n in range(7)), "i3", "i4", "i5")
    assert "only 3 of 7 logged items are described in data.items ('i0' of the log is not, while 'i0.0' is)" in found


def test_an_empty_catalogue_is_told(tmp_path: Path) -> None:
    (found,) = with_items(tmp_path)
    assert "only 0 of 7 logged items are described in data.items ('i0' of the log is not);" in found


def test_a_catalogue_of_half_of_the_items_and_many_others_is_silent(tmp_path: Path) -> None:
    assert with_items(tmp_path, *(f" i{n} " for n in range(4)), *(f"j{n}" for n in range(50))) == []


def test_a_log_without_items_file_is_silent(tmp_path: Path) -> None:
    assert warnings(tmp_path, range(1, 30)) == []
