"""Files of one source that differ: a column that some of them lack is missing there, and refused if all lack it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from springtide.config_data import EventSource, ItemSource
from springtide.data import readers
from springtide.data.items import read_items
from springtide.data.readers import read_chunks
from springtide.data.reading import LOOKS, look_into
from springtide.data.sources import list_files
from springtide.errors import SpringtideError
from without_ray import prepare_without_ray, read_report, read_table, settings_for

FORMATS = ["csv", "tsv", "jsonl", "parquet", "csv.gz"]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One file in the format that its name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        between = "\t" if path.suffix == ".tsv" else ","
        text = "".join(between.join(map(str, line)) + "\n" for line in [rows[0], *(row.values() for row in rows)])
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def events(start: int, **more: Any) -> list[dict[str, Any]]:
    return [{"user_id": "u", "item_id": f"i{n}", "timestamp": n, **more} for n in range(start, start + 3)]


def sentence(folder: Path, **source: Any) -> str:
    with pytest.raises(SpringtideError) as caught:
        prepare_without_ray(settings_for(folder / "w", {"paths": str(folder / "log"), **source}))
    assert not (folder / "w" / "prepared").exists()
    return str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_may_lack_an_optional_column_that_another_has(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "log" / f"a.{kind}", events(1, what="buy"))
    write(tmp_path / "log" / f"b.{kind}", events(4, stars=5))
    columns = {"action": "what", "rating": "stars"}
    prepare_without_ray(settings_for(tmp_path, {"paths": str(tmp_path / "log"), "columns": columns}))
    table = read_table(tmp_path, "events").sort("timestamp")
    assert table["action"].to_list() == ["buy"] * 3 + [None] * 3
    assert table["rating"].to_list() == [None] * 3 + [5.0] * 3
    report = read_report(tmp_path)
    assert [entry["rows"] for entry in report["files"]] == [3, 3]  # notes about files are no rows
    assert len(read_table(tmp_path, "quarantine")) == 0


@pytest.mark.parametrize("kind", FORMATS)
def test_a_column_that_no_file_has_is_refused(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "log" / f"a.{kind}", events(1))
    columns = {"rating": "stars"}
    alone = sentence(tmp_path, columns=columns)
    there = "item_id, timestamp, user_id" if kind == "jsonl" else "user_id, item_id, timestamp"
    assert alone.endswith(f"no column 'stars'; it has {there}: correct columns in the settings")
    write(tmp_path / "log" / f"b.{kind}", events(4, what="buy"))
    assert f"a.{kind} has no column 'stars'" in sentence(tmp_path, columns=columns)
    assert "(nor have the other 1)" in sentence(tmp_path, columns=columns)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["user_id", "item_id", "timestamp"])
def test_every_file_must_have_the_columns_of_an_event(tmp_path: Path, kind: str, name: str) -> None:
    write(tmp_path / "log" / f"a.{kind}", events(1))
    write(tmp_path / "log" / f"b.{kind}", [{k: v for k, v in row.items() if k != name} | {"x": 1} for row in events(4)])
    assert f"b.{kind} has no column '{name}'" in sentence(tmp_path)
    # Not even where a rule reads it too.
    assert f"b.{kind} has no column '{name}'" in sentence(tmp_path, keep=[{"column": name, "matches": "."}])


def test_files_without_rows_say_nothing_of_columns(tmp_path: Path) -> None:
    write(tmp_path / "log" / "b.csv", events(1))
    for name, text in (("a.csv", ""), ("c.csv", "user_id,item_id,timestamp,stars\n"), ("d.jsonl", "{broken\n")):
        (tmp_path / "log" / name).write_text(text)
    assert "b.csv has no column 'stars'" in sentence(tmp_path, columns={"rating": "stars"})


def test_a_key_may_come_late_in_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "JSON_LINES", 2)
    write(tmp_path / "log" / "a.jsonl", [*events(1), *events(4, stars=5)])
    prepare_without_ray(
        settings_for(tmp_path, {"paths": str(tmp_path / "log"), "columns": {"rating": "stars"}}, partitions=1)
    )
    assert read_table(tmp_path, "events")["rating"].to_list() == [None] * 3 + [5.0] * 3
    (file,) = list_files([str(tmp_path / "log")], None, 0, 0)[0]
    columns: list[str | int] = ["user_id", "stars"]
    assert [set(chunk.lacking) for chunk in read_chunks(file, columns, ["stars"])] == [{"stars"}, set(), set()]
    with pytest.raises(SpringtideError, match="has no column 'userid'"):
        list(read_chunks(file, ["userid", "stars"], ["stars"]))


def test_a_rule_fails_where_its_column_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "log" / "a.csv", events(1, price=3))
    write(tmp_path / "log" / "b.csv", events(4))
    keep = [{"column": "price", "above": 0}]
    prepare_without_ray(settings_for(tmp_path, {"paths": str(tmp_path / "log"), "keep": keep}))
    entries = read_report(tmp_path)["files"]
    assert [(entry["kept"], entry["reasons"]) for entry in entries] == [
        (3, {}),
        (0, {"filtered: price is not above 0": 3}),
    ]


def test_positions_beyond_a_file_without_header_are_missing_there(tmp_path: Path) -> None:
    for name, text in (("a.tsv", "u\ti\t1\t5\n"), ("b.tsv", "u\tj\t2\nshort\n")):
        (tmp_path / name).write_text(text)
    values = []
    for file in list_files([str(tmp_path)], None, 0, 0)[0]:
        for chunk in read_chunks(file, [0, 1, 2, 3], [3]):
            values += [(row["f1"], row["f3"]) for row in chunk.table.to_pylist()]
            assert chunk.table.column_names == ["f0", "f1", "f2", "f3"]
    assert values == [(b"i", b"5"), (b"j", None)]


@pytest.mark.parametrize("kind", FORMATS)
def test_an_items_file_may_lack_a_column_that_another_has(tmp_path: Path, kind: str) -> None:
    write(tmp_path / f"a.{kind}", [{"item_id": "1", "name": "one"}])
    write(tmp_path / f"b.{kind}", [{"item_id": "2", "by": "Ann"}])
    columns = {"title": "name"}
    source = ItemSource.model_validate({"paths": str(tmp_path), "columns": columns, "text": "{name} by {by}"})
    found = read_items(source, list_files(source.paths, None, -1, 0)[0])
    assert found.items.select("item_id", "title", "text").rows() == [("1", "one", "one by "), ("2", "", " by Ann")]
    wrong = ItemSource.model_validate({"paths": str(tmp_path), "columns": columns, "text": "{name} by {buy}"})
    with pytest.raises(SpringtideError, match="has no column 'buy'"):
        read_items(wrong, list_files(source.paths, None, -1, 0)[0])


# ---------------------------------------------------------------- before Ray starts
def test_a_wrong_column_is_told_before_anything_is_read_whole(tmp_path: Path) -> None:
    for number in range(LOOKS + 1):
        write(tmp_path / f"{number:02d}.csv", events(1))

    def look(files: int, **columns: str) -> None:
        source = EventSource.model_validate({"paths": str(tmp_path), "columns": columns})
        look_into(list_files(source.paths, None, 0, 0)[0][:files], [source])

    look(LOOKS)
    for files in (1, LOOKS):
        with pytest.raises(SpringtideError, match="00.csv has no column 'stars'"):
            look(files, rating="stars")
    look(LOOKS + 1, rating="stars")  # the last may have it
    with pytest.raises(SpringtideError, match="00.csv has no column 'who'"):
        look(LOOKS + 1, user_id="who")
    write(tmp_path / "01.csv", events(1, stars=3))
    look(LOOKS, rating="stars")
