"""The catalogue: one title, category list and text for each item, whatever the rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from springtide.config_data import ItemSource
from springtide.data import items as items_module
from springtide.data.items import RawItems, read_items
from springtide.data.sources import list_files
from springtide.errors import SpringtideError
from without_ray import prepare_without_ray, read_report, read_table, settings_for

COLUMNS = {"item_id": "id", "title": "name", "categories": "kind"}


def read(path: Path, **values: Any) -> RawItems:
    source = ItemSource.model_validate({"paths": str(path), "columns": COLUMNS, **values})
    raw = read_items(source, list_files(source.paths, source.format, -1, 0)[0])
    for entry in raw.files:
        assert entry["rows"] == entry["kept"] + entry["deduplicated"] + entry["quarantined"]  # type: ignore[operator]
    assert sum(entry["quarantined"] for entry in raw.files) == len(raw.quarantine)  # type: ignore[misc]
    assert sum(entry["kept"] for entry in raw.files) == len(raw.items)  # type: ignore[misc]
    return raw


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def texts(raw: RawItems) -> dict[str, str]:
    return dict(raw.items.select("item_id", "text").iter_rows())


def test_title_categories_and_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,name,kind,by\n1, Red   tea ,Drink| Hot ||,Ann\n2,,Drink,\n3,红茶,,安\n4,,,\n")
    raw = read(path)
    assert raw.items.rows() == [
        ("1", "Red tea", ["Drink", "Hot"], "Red tea. Drink Hot"),
        ("2", "", ["Drink"], "Drink"),
        ("3", "红茶", [], "红茶"),
        ("4", "", [], ""),
    ]
    assert texts(read(path, text="by")) == {"1": "Ann", "2": "", "3": "安", "4": ""}
    assert texts(read(path, text=["name", "by"])) == {"1": "Red tea. Ann", "2": "", "3": "红茶. 安", "4": ""}
    assert texts(read(path, text="{name} by {by}")) == {"1": "Red tea by Ann", "2": "", "3": "红茶 by 安", "4": ""}


def test_the_most_frequent_description_wins_then_the_first_and_none_loses(tmp_path: Path) -> None:
    rows = ["1,one,x", "1,two,x", "1,two,x", "2,b,", "2,a,", "3,,", "3,,", "3,late,", "4,,"]
    raw = read(write(tmp_path / "a.csv", "\n".join(["id,name,kind", *rows])))
    assert dict(raw.items.select("item_id", "title").iter_rows()) == {"1": "two", "2": "b", "3": "late", "4": ""}
    assert raw.files[0] | {"path": ""} == {"path": "", "rows": 9, "kept": 4, "deduplicated": 5, "quarantined": 0}


def test_bad_rows_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,name,kind\n1,a,b\n,x,y\nshort\n\xff,n,k\n5,\xff,k\n" + b"6" * 600 + b",n,k\n7,g,h\n")
    raw = read(path)
    assert raw.items["item_id"].to_list() == ["1", "7"]
    found = {row["row"]: row["reason"] for row in raw.quarantine.to_pylist()}
    assert found == {
        2: "no item_id",
        3: "malformed row: 1 columns, not 3",
        4: "invalid UTF-8 in id",
        5: "invalid UTF-8 in name",
        6: "item_id above 512 bytes",
    }


def test_white_space_around_ids_is_no_part_of_them(tmp_path: Path) -> None:
    raw = read(write(tmp_path / "a.csv", "id,name,kind\n 1 ,one,\n1,one,\n\u30002,two,\n"))
    assert raw.items.select("item_id", "title").rows() == [("1", "one"), ("2", "two")]
    assert len(raw.quarantine) == 0


def test_keep_rules_and_the_same_file_as_log_and_catalogue(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,name,kind\n12345,cup,\nPOST,postage,\n23456,,\n")
    raw = read(path, keep=[{"column": "id", "matches": "^[0-9]"}])
    assert raw.items["item_id"].to_list() == ["12345", "23456"]
    assert raw.quarantine["reason"].to_pylist() == ["filtered: id does not match ^[0-9]"]


def test_other_formats_and_positions(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"id": 1, "name": "a", "kind": ["x", "y"]}, {"id": 2, "name": None}]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(record) for record in records))
    expected = [("1", "a", ["x", "y"], "a. x y"), ("2", "", [], "")]
    assert read(path).items.rows() == expected
    pq.write_table(
        pa.table({"id": [1.0, 2.0], "name": ["a", None], "kind": [["x", "y"], None]}), tmp_path / "a.parquet"
    )
    assert read(tmp_path / "a.parquet").items.rows() == expected
    write(tmp_path / "a.tsv", "1\ta\tx|y\n2\t\t\n")
    positions = {"columns": {"item_id": 0, "title": 1, "categories": 2}}
    assert read(tmp_path / "a.tsv", **positions).items.rows() == expected
    assert texts(read(tmp_path / "a.tsv", **positions, text=["2", "1"])) == {"1": "x|y. a", "2": ""}
    assert texts(read(tmp_path / "a.tsv", **positions, text="{1}!")) == {"1": "a!", "2": ""}


def test_a_column_may_be_named_like_a_number(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,name,kind,2024\n1,a,b,c\n")
    assert texts(read(path, text=["2024"])) == {"1": "c"}


def test_an_endless_text_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.csv", f"id,name,kind\n1,{'长' * 3_000_000},\n2,b,\n")
    items = read(path).items
    assert items["title"].str.len_chars().to_list() == [items_module.TITLE_CHARACTERS, 1]
    assert items["text"].str.len_chars().to_list() == [items_module.TEXT_CHARACTERS, 1]


@pytest.mark.parametrize("text", ["", "id,name,kind\n"])
def test_an_empty_catalogue(tmp_path: Path, text: str) -> None:
    raw = read(write(tmp_path / "a.csv", text))
    assert raw.items.rows() == []
    assert raw.files[0]["rows"] == 0


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,name,kind\n1,a,b\n")
    for text in ("author", "{name} by {author}"):
        with pytest.raises(SpringtideError, match="no column 'author'; it has id, name, kind"):
            read(path, text=text)


def test_the_catalogue_of_a_log(tmp_path: Path) -> None:
    """Logged items without description and described items without events; k-core drops both row and description."""
    events = [f"{user},{item},{time}" for user in "ab" for time, item in enumerate(["x", "y", "w"])] + ["a,rare,9"]
    log = write(tmp_path / "log.csv", "\n".join(["user_id,item_id,timestamp", *events]))
    items = write(tmp_path / "items.csv", "id,name,kind\nx,Ex,k\nrare,Rare,k\nnew,New,k\nmute,,\nx,Ex,k\n,no id,k\n")
    workspace = tmp_path / "w"
    source = {"paths": str(items), "columns": COLUMNS}
    prepare_without_ray(settings_for(workspace, {"paths": str(log)}, items=source, min_item_events=2))
    table = read_table(workspace, "items")
    assert table["item"].to_list() == [0, 1, 2, 3]
    assert table.select("item_id", "title", "categories", "text", "events").rows() == [
        ("new", "New", ["k"], "New. k", 0),
        ("w", "", [], "", 0),  # the last event of both users is the test
        ("x", "Ex", ["k"], "Ex. k", 2),
        ("y", "", [], "", 0),
    ]
    report = read_report(workspace)
    assert report["catalogue"] == {"with_text": 2, "without_text": 2, "without_events": 1, "described_but_dropped": 2}
    quarantine = read_table(workspace, "quarantine").select("row", "reason").rows()
    assert sorted(quarantine) == [
        (6, "no item_id"),
        (7, "k-core: user with fewer than 1 or item with fewer than 2 events"),
    ]
